"""What of an encoder is trained: selections by name and LoRA, on open_clip, timm and transformers encoders."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import timm
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from small_models import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tva.callbacks import TaskVectorCallback

from tva import TaskVector, open_weights, save_weights
from tva.checkpoints import open_finetuned
from tva.compose.apply import compose
from tva.data import ImageTask
from tva.edit.options import EditOptions
from tva.edit.run import run_edit
from tva.models import ClipClassifier, VisionClassifier
from tva.models.adapters import CallingAttention, adapt, add_lora, select
from tva.models.clip import load_clip


def bert():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    return transformers.BertModel(config, add_pooling_layer=False)


class TextModel(L.LightningModule):
    """Any LightningModule with an encoder and something beside it."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = bert()
        self.other = nn.Linear(16, 2)
        adapt(self, **options)

    def forward(self, tokens):
        return self.other(self.encoder(tokens).last_hidden_state.mean(dim=1))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def train_dataloader(self):
        tokens = torch.randint(0, 50, (16, 5), generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(tokens, tokens[:, 0] % 2), batch_size=4)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


# --- selections


def test_presets_choose_by_what_a_parameter_belongs_to():
    clip = load_clip("tva-tiny")[0].visual
    block = "transformer.resblocks.2"
    projections = {
        f"{block}.attn.{part}" for part in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    }
    mlp = {f"{block}.mlp.{part}" for part in ("c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias")}

    def chosen(preset, within=block):
        return {name for name in select(clip, preset) if name.startswith(f"{within}.")}

    assert chosen("attention") == projections
    assert chosen("linear") == projections | mlp
    assert chosen("bias") == {n for n in projections | mlp if n.endswith("bias")} | {
        f"{block}.ln_1.bias",
        f"{block}.ln_2.bias",
    }
    assert "proj" not in select(clip, "linear")
    text = select(bert(), "attention")
    assert "encoder.layer.1.attention.self.query.weight" in text
    assert "encoder.layer.1.attention.output.dense.bias" in text
    assert not [name for name in text if "LayerNorm" in name or "intermediate" in name]
    small = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, embed_dim=32, depth=1, num_heads=2)
    assert select(small, "attention") == {f"blocks.0.attn.{n}.{p}" for n in ("qkv", "proj") for p in ("weight", "bias")}


def test_patterns_are_searched_for_and_added_to_presets():
    clip = load_clip("tva-tiny")[0].visual
    assert select(clip, [r"resblocks\.0\..*c_fc", "^proj$"]) == {
        "proj",
        "transformer.resblocks.0.mlp.c_fc.weight",
        "transformer.resblocks.0.mlp.c_fc.bias",
    }
    assert select(clip, ["attention", "^conv1"]) == select(clip, "attention") | {"conv1.weight"}


def test_all_else_is_frozen_and_nothing_beside_the_encoder_is():
    model = TextModel(train_only=["query"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    queries = {f"encoder.encoder.layer.{i}.attention.self.query.{p}" for i in (0, 1) for p in ("weight", "bias")}
    assert trained == queries | {"other.weight", "other.bias"}


@pytest.mark.parametrize("tangent", [False, True])
def test_a_fit_moves_only_the_selection_and_lists_the_rest_as_frozen(tangent):
    model = ClipClassifier(train_only="attention", tangent=tangent, learning_rate=1e-3, warmup_steps=0)
    vector = fit(Path(), model)
    assert set(vector.deltas) == select(model.encoder, "attention")  # the network's own names
    assert set(vector.untouched.values()) == {"frozen"}
    assert vector.names == set(ClipClassifier().encoder.state_dict())
    assert vector.origin.hyperparameters["train_only"] == "attention"
    assert vector.origin.kind == ("tangent" if tangent else None)


def fit(folder, model, **options):
    callbacks = [TaskVectorCallback(**options), ModelCheckpoint(folder, filename="last")]
    trainer = quiet_trainer(*callbacks, max_steps=2, limit_val_batches=0)
    text = isinstance(model, TextModel)
    trainer.fit(model, datamodule=None if text else ImageTask("builtin:digits", batch_size=16, limit_train=64))
    return None if "lora" in options else TaskVector.load(folder / "last.tv.safetensors")


def test_selections_that_choose_nothing_are_refused():
    clip = load_clip("tva-tiny")[0].visual
    with pytest.raises(ValueError, match=r"'c_fcc', which no parameter of VisionTransformer.*nearest are .*c_fc"):
        select(clip, ["attention", "c_fcc"])
    with pytest.raises(ValueError, match=r"must be one of attention, linear, bias, or.*'attn'.*Write \['attn'\]"):
        select(clip, "attn")
    with pytest.raises(ValueError, match=r"'\(', which is not a regular expression"):
        select(clip, ["("])
    with pytest.raises(ValueError, match="empty list"):
        select(clip, [])
    with pytest.raises(ValueError, match=r"'attention', which no parameter of EfficientNet matches.*It has 'conv_stem"):
        select(timm.create_model("test_efficientnet"), "attention")


def test_the_part_to_adapt_may_have_another_name():
    model = nn.Module()
    model.network = bert()
    adapt(model, lora={"target_modules": ["value"]}, part="network")
    assert sum("lora_A" in name for name, _ in model.network.named_parameters()) == 2


# --- LoRA


def filled(network, value=0.02):
    """Make the product of every LoRA other than zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.copy_(value * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masked", [None, "float", "bool"])
def test_attention_that_calls_its_projection_is_torchs(batch_first, masked):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, batch_first=batch_first).double()
    calling = copy.deepcopy(attention)
    calling.__class__ = CallingAttention
    one, other = torch.randn(5, 5, 16).double(), torch.randn(5, 5, 16).double()
    mask = torch.ones(5, 5).triu(1).bool()
    mask = {None: None, "bool": mask, "float": torch.zeros(5, 5).double().masked_fill(mask, float("-inf"))}[masked]
    for inputs in ((one, one, one), (one, other, other)):
        found = calling(*inputs, need_weights=False, attn_mask=mask)[0]
        torch.testing.assert_close(found, attention(*inputs, need_weights=False, attn_mask=mask)[0])
    with pytest.raises(ValueError, match="gives no attention weights"):
        calling(one, one, one)


def test_lora_in_clip_is_a_dense_delta_that_the_vector_holds():
    model = ClipClassifier(lora={"r": 4, "alpha": 8}, learning_rate=1e-3, warmup_steps=0)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    filled(model)
    vector = fit(Path(), model)
    layers = [f"transformer.resblocks.{i}" for i in range(4)]
    parts = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    assert set(vector.deltas) == {f"{layer}.{part}" for layer in layers for part in parts}
    assert all(torch.linalg.matrix_rank(delta, atol=1e-5) == 4 for delta in vector.deltas.values())
    assert vector.origin.kind is None
    assert vector.origin.hyperparameters["lora"] == {"r": 4, "alpha": 8}
    # the base with the vector is the model with LoRA; the base itself did not move
    plain = ClipClassifier()
    base = open_weights(next(Path().glob("base-*")))
    assert all(torch.equal(base[name], tensor) for name, tensor in plain.encoder.state_dict().items())
    plain.load_state_dict(vector.apply_to(plain.state_dict()))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for mode in (True, False):
            plain.train(mode)
            model.train(mode)
            torch.testing.assert_close(model.encoder(images), plain.encoder(images), rtol=1e-4, atol=1e-5)


def test_lora_in_a_transformers_encoder_merged_and_kept_as_it_is():
    model = TextModel(lora={"target_modules": ["query", "layer.1.output"]})
    names = {name for name, p in model.named_parameters() if p.requires_grad and "lora_A" in name}
    assert len(names) == 3  # two queries, and the one linear layer within layer.1.output
    assert {name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name} == {
        "other.weight",
        "other.bias",
    }
    base = TextModel().state_dict()
    vector = fit(Path("merged"), model)
    assert set(vector.deltas) == {
        "encoder.encoder.layer.0.attention.self.query.weight",
        "encoder.encoder.layer.1.attention.self.query.weight",
        "encoder.encoder.layer.1.output.dense.weight",
        "other.weight",
        "other.bias",
    }
    merged = copy.deepcopy(model.encoder).merge_and_unload().state_dict()
    edited = vector.apply_to(base)
    for name, tensor in merged.items():
        torch.testing.assert_close(edited[f"encoder.{name}"], tensor, rtol=1e-5, atol=1e-6)
    model = TextModel(lora={"target_modules": ["query", "layer.1.output"]})
    fit(Path("kept"), model, lora="adapter")
    merged = model.encoder.merge_and_unload().state_dict()
    tuned = open_finetuned("kept/last.adapter", {f"encoder.{n}": base[f"encoder.{n}"] for n in merged})
    for name, tensor in merged.items():
        torch.testing.assert_close(tuned[f"encoder.{name}"], tensor, rtol=1e-5, atol=1e-6)
    query = "encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(merged[query], base[f"encoder.{query}"])


def test_lora_in_convolutions():
    encoder = timm.create_model("test_efficientnet", num_classes=0)
    with pytest.raises(ValueError, match=r"lora needs target_modules: EfficientNet has no linear layer.*'conv_stem'"):
        add_lora(copy.deepcopy(encoder), {})
    adapted = filled(add_lora(encoder, {"r": 2, "target_modules": ["conv_stem", "conv_head"]}))
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 2
    assert adapted(torch.randn(2, 3, 64, 64)).shape == (2, encoder.num_features)


def test_vision_classifier_has_the_same_options():
    torch.manual_seed(0)
    options = {"num_classes": 0, "pretrained": False}
    save_weights(timm.create_model("test_vit", **options).state_dict(), "vit.safetensors")

    def make(**more):
        return VisionClassifier("test_vit", "vit.safetensors", **more)

    trained = [name for name, parameter in make(train_only="bias").named_parameters() if parameter.requires_grad]
    assert trained
    assert all(name.endswith("bias") for name in trained)
    assert any("attn.qkv.lora_A" in name for name, _ in make(lora={}).named_parameters())
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(make(tangent=True).encoder(images), make().encoder(images), rtol=1e-4, atol=1e-5)


def test_lora_that_finds_nothing_or_contradicts_is_refused(monkeypatch):
    clip = load_clip("tva-tiny")[0].visual
    with pytest.raises(ValueError, match=r"'c_fcc', which no module of VisionTransformer matches.*nearest are .*c_fc"):
        add_lora(clip, {"target_modules": ["attn", "c_fcc"]})
    with pytest.raises(ValueError, match=r"no option 'rank'; its options are r, alpha, target_modules, dropout"):
        add_lora(clip, {"rank": 3})
    with pytest.raises(ValueError, match="target_modules is empty"):
        add_lora(clip, {"target_modules": []})
    with pytest.raises(ValueError, match="LayerNorm.*is not supported"):
        add_lora(copy.deepcopy(clip), {"target_modules": ["ln_1"]})
    with pytest.raises(ValueError, match="lora and tangent exclude each other"):
        ClipClassifier(lora={}, tangent=True)
    with pytest.raises(ValueError, match="lora and train_only exclude each other"):
        ClipClassifier(lora={}, train_only="bias")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"lora needs peft: pip install 'tva\[lora\]'"):
        ClipClassifier(lora={})


def test_an_adapter_of_torchs_attention_cannot_be_kept_as_it_is():
    with pytest.raises(ValueError, match=r"'in_proj_weight' has one too.*Use lora='merge'"):
        fit(Path(), ClipClassifier(lora={}), lora="adapter")


def test_an_edit_takes_the_plain_model():
    options = {"vectors": {"a": "none"}, "recipe": "a", "output": ".", "scaling_coef": 1.0}
    trainer = quiet_trainer()
    with pytest.raises(ValueError, match="takes the plain model, and this one holds LoRA. Leave lora out"):
        run_edit(trainer, ClipClassifier(lora={}), EditOptions(targets={"a": ImageTask("builtin:digits")}, **options))


# --- as a user types it


USE = """
import os
import sys
from tva.cli.main import main

digits = "{digits: {class_path: tva.data.ImageTask, init_args: {path: 'builtin:digits', batch_size: 500}}}"
for config in sys.argv[2:]:
    os.mkdir(config)
    os.chdir(config)
    short = ["--trainer.max_steps", "15", "--trainer.val_check_interval", "15", "--trainer.default_root_dir", "fit"]
    main(["fit", "--config", f"{sys.argv[1]}/{config}.yaml", *short])
    vector = "fit/checkpoints/last.tv.safetensors"
    options = ["--vectors", f"{{digits: {vector}}}", "--recipe", "digits", "--scaling_coef", "1", "--output", "edit"]
    tangent = str(config == "tangent").lower()
    main(["edit", "--model", "tva.models.ClipClassifier", "--model.tangent", tangent, "--targets", digits, *options])
    os.chdir("..")
"""
USED = ["lora", "tangent", "attention-only"]


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    # in a process of its own: what fits leave in memory counts against the compose of later tests
    folder = tmp_path_factory.mktemp("used")
    words = [sys.executable, "-c", USE, str(Path(__file__).parents[2] / "configs/fit"), *USED]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("config", USED)
def test_the_configs_fit_and_their_vectors_are_edited_and_composed(config, used):
    folder, tangent = used / config, config == "tangent"
    task = json.loads((folder / "edit/edit.json").read_text())["tasks"]["digits"]
    assert task["edited"]["value"] == task["finetuned"]["value"]
    assert task["edited"]["value"] > task["base"]["value"] + 0.05
    base = str(next((folder / "fit/checkpoints").glob("base-*")))
    vector, half = str(folder / "fit/checkpoints/last.tv.safetensors"), "half.safetensors"
    compose(base, {"a": vector}, "0.5 * a", half, max_memory="8GiB")
    state = ClipClassifier(weights=half, tangent=tangent).state_dict()
    composed = {name.removeprefix("encoder."): tensor for name, tensor in state.items()}
    expected = TaskVector.load(vector).apply_to(open_weights(base), 0.5)
    assert all(torch.equal(composed[name], expected[name]) for name in expected)
