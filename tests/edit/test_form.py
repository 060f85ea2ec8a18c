"""What an edit writes is what the user's library loads, whatever the model came from."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from small_models import quiet_trainer
from small_text import write_classifier, write_model

from tva import MismatchError, TaskVector, edit_model, fingerprint, open_weights, save_weights
from tva.compose import compose, revert, verify
from tva.models import TextClassifier

IDS = torch.arange(8, 20)[None]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
PIXELS = torch.linspace(-1, 1, 192).view(1, 3, 8, 8)


def move(network, seed=1):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw).to(parameter.dtype)


def between(base, tuned, coef=0.5):
    """Move a network along a task vector, in float64."""
    with torch.no_grad():
        for old, new in zip(base.parameters(), tuned.parameters(), strict=True):
            old.copy_((old.double() + coef * (new.double() - old.double())).to(old.dtype))
    return base.eval()


def predict(network):
    with torch.no_grad():
        if "ViT" in type(network).__name__:
            return network(pixel_values=PIXELS).logits
        found = network(input_ids=IDS)
        return found.logits if hasattr(found, "logits") else found.last_hidden_state


def scores(network, split):
    return predict(network).flatten()[:8].tolist()


def edited(network, tuned, output, **options):
    task = {"t": options.pop("task", scores)}
    return edit_model(network, vectors={"a": tuned}, targets=task, scaling_coef=0.5, output=output, **options).to_json()


@pytest.fixture
def folders(tmp_path):
    write_classifier(Path("base"))
    write_classifier(Path("tuned"), moved=0.1)
    return tmp_path


def load(folder, auto="AutoModelForSequenceClassification", **options):
    return getattr(transformers, auto).from_pretrained(folder, dtype=torch.float32, **options).eval()


def test_a_transformers_folder_comes_out_as_one_and_is_verified_reverted_and_replaced(folders):
    content = edited(load("base"), "tuned", "out", keep_undo=True)
    assert content["edited"]["format"] == "transformers"
    written = {path.name for path in Path("out").iterdir()}
    assert written == {*content["edited"]["files"], "edit.json", "report.html", "README.md"}
    assert {"config.json", "tokenizer.json", "model.safetensors", "undo.safetensors"} <= written
    expected = predict(between(load("base"), load("tuned")))
    torch.testing.assert_close(predict(load("out")), expected, rtol=0, atol=1e-6)
    assert "AutoModel.from_pretrained" in Path("out/README.md").read_text()
    assert "library_name: transformers" in Path("out/README.md").read_text()
    assert verify("out").holds
    revert("out", output="back")
    assert fingerprint(open_weights("back")) == fingerprint(open_weights("base"))
    assert {path.name for path in Path("back").iterdir()} == {path.name for path in Path("base").iterdir()}
    Path("out/notes.txt").write_text("mine")
    edited(load("base"), "tuned", "out", subject_to=["t/score >= base + 100"])  # which is refused
    (kept,) = Path("out").glob("accepted-*")
    assert Path("out/notes.txt").exists()
    assert not Path("out/model.safetensors").exists()
    torch.testing.assert_close(predict(load(kept)), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="base is an input of the edit, which would replace it"):
        edited(load("base"), "tuned", "base")
    shutil.copytree("base", "other")
    with pytest.raises(ValueError, match="where a file is that tva did not write"):
        edited(load("base"), "tuned", "other")


def test_an_encoder_is_put_back_among_the_weights_that_its_folder_has_besides(folders):
    wrapped = TextClassifier("base")
    content = edit_model(
        wrapped, vectors={"a": "tuned"}, targets={"t": lambda m, s: [1.0]}, scaling_coef=0.5, output="out"
    ).to_json()
    assert content["edited"]["format"] == "transformers"
    out, base = load("out"), load("base")
    assert fingerprint(out.bert.state_dict()) == fingerprint(wrapped.encoder.state_dict())
    assert torch.equal(out.classifier.weight, base.classifier.weight)
    expected = between(load("base").bert, load("tuned").bert)
    torch.testing.assert_close(predict(out.bert), predict(expected), rtol=0, atol=1e-6)
    assert verify("out").holds
    again = TextClassifier("out")
    assert fingerprint(again.state_dict()) == fingerprint(wrapped.state_dict())


def test_a_vector_of_the_encoder_goes_onto_the_folder_that_it_came_from(folders):
    wrapped, tuned = TextClassifier("base"), TextClassifier("tuned")
    TaskVector.between(wrapped.encoder.state_dict(), tuned.encoder.state_dict()).save("a.tv.safetensors")
    with pytest.raises(MismatchError, match=r"under 'bert.'. .*leave it out by exclude"):
        compose("base", {"a": "a.tv.safetensors"}, "a", "never")
    compose("base", {"a": "a.tv.safetensors"}, "a", "out", exclude="^classifier[.]")
    torch.testing.assert_close(load("out").bert.state_dict(), tuned.encoder.state_dict())


def test_the_form_can_be_chosen(folders):
    content = edited(load("base"), "tuned", "plain", format="state_dict")
    assert content["edited"]["files"] == ["edited.safetensors"]
    network = load("base")
    network.load_state_dict(dict(open_weights("plain/edited.safetensors")))
    torch.testing.assert_close(predict(network), predict(between(load("base"), load("tuned"))), rtol=0, atol=1e-6)
    assert verify("plain", base="base").holds
    fresh = transformers.BertForSequenceClassification(load("base").config)
    fresh.load_state_dict(load("base").state_dict())
    fresh.config._name_or_path = fresh.name_or_path = ""
    content = edited(fresh.eval(), "tuned", "made", format="transformers")
    torch.testing.assert_close(predict(load("made")), predict(network), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="format='timm' needs a network of timm.*found BertForSequenceClassification"):
        edited(load("base"), "tuned", "never", format="timm")
    assert not Path("never").exists()


MODELS = {
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}),
    "llama": ("LlamaForCausalLM", {**SMALL, "vocab_size": 32, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "mixtral": ("MixtralForCausalLM", {**SMALL, "vocab_size": 32, "num_key_value_heads": 2, "num_local_experts": 2}),
    "vit": ("ViTForImageClassification", {**SMALL, "image_size": 8, "patch_size": 4}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", ["float32", "sharded bfloat16"])
def test_models_that_tie_shard_or_convert_their_weights(name, form):
    kind, options = MODELS[name]
    torch.manual_seed(0)
    made = getattr(transformers, kind)
    network = made(made.config_class(**options)).to(getattr(torch, form.split()[-1]))
    network.save_pretrained("base", max_shard_size="3KB" if "sharded" in form else "1GB")
    move(network)
    network.save_pretrained("tuned")
    base, tuned = (made.from_pretrained(folder, dtype=torch.float32).eval() for folder in ("base", "tuned"))
    edited(base, "tuned", "out", base="base", keep_undo=True)
    out, info = made.from_pretrained("out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert set(open_weights("out")) == set(open_weights("base"))  # transformers' own names on disk
    expected = predict(between(made.from_pretrained("base", dtype=torch.float32), tuned))
    torch.testing.assert_close(predict(out.eval()), expected, rtol=0, atol=1e-5)
    if form == "float32" and name in ("mixtral", "vit"):
        check_plain(made)
    config = json.loads(Path("out/config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "float32"
    assert out.dtype == torch.float32
    assert verify("out").holds
    revert("out", output="back")
    assert fingerprint(open_weights("back")) == fingerprint(open_weights("base"))


def check_plain(made):
    """A state dict has other names in memory than in the folder, and is verified from inputs that have these too."""
    base, tuned = (made.from_pretrained(folder, dtype=torch.float32).eval() for folder in ("base", "tuned"))
    save_weights(base.state_dict(), "base.safetensors")
    TaskVector.between(base.state_dict(), tuned.state_dict()).save("a.tv.safetensors")
    edited(base, "a.tv.safetensors", "plain", base="base", format="state_dict")
    with pytest.raises(MismatchError, match="plain has the names of the model in memory, .* and base has others"):
        verify("plain", base="base", vectors={"a": "tuned"})
    assert verify("plain", base="base.safetensors").holds


def test_a_vector_that_unties_what_the_model_ties_is_refused():
    write_model(Path("base"), "causal")
    network = load("base", "AutoModelForCausalLM")
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state["lm_head.weight"] += 1
    save_weights(state, "tuned.safetensors")
    with pytest.raises(MismatchError, match="'lm_head.weight' are tied in the model.*tie_word_embeddings=False"):
        edited(network, "tuned.safetensors", "out")


LOADS = """
import json, sys, torch
x = {name: torch.linspace(-1, 1, count) for name, count in (("timm", 76800), ("open_clip", 768))}
out = {}
if "timm" in sys.argv:
    import timm
    network = timm.create_model("local-dir:timm/out", pretrained=True).eval()
    out["timm"] = network(x["timm"].view(1, 3, 160, 160)).flatten().tolist()
if "open_clip" in sys.argv:
    import open_clip
    network = open_clip.create_model("local-dir:open_clip/out", require_pretrained=True).eval()
    out["open_clip"] = network.encode_image(x["open_clip"].view(1, 3, 16, 16)).flatten().tolist()
if "sentence_transformers" in sys.argv:
    from sentence_transformers import SentenceTransformer
    network = SentenceTransformer("sentence_transformers/out", device="cpu")
    out["sentence_transformers"] = network.encode(["good film", "bad food"]).flatten().tolist()
if "lightning" in sys.argv:
    from small_models import LinearNet
    network = LinearNet.load_from_checkpoint("lightning/out/edited.ckpt", map_location="cpu").eval()
    out["lightning"] = network(torch.ones(1, 4)).flatten().tolist()
print("FOUND" + json.dumps(out))
"""


def timm_case():
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=3)
    for folder in ("base", "tuned"):
        save_for_hf(network, f"timm/{folder}", safe_serialization=True)
        move(network)
    loaded = [timm.create_model(f"local-dir:timm/{each}", pretrained=True).eval() for each in ("base", "tuned")]
    return *loaded, lambda net: net(torch.linspace(-1, 1, 76800).view(1, 3, 160, 160))


def open_clip_case():
    import open_clip
    from open_clip.model import CLIP

    vision = {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    network = CLIP(**config)
    for each in ("base", "tuned"):
        folder = Path("open_clip", each)
        folder.mkdir(parents=True)
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
        save_weights(network.state_dict(), folder / "open_clip_model.safetensors")
        move(network)
    names = (f"local-dir:open_clip/{each}" for each in ("base", "tuned"))
    loaded = [open_clip.create_model(name, require_pretrained=True).eval() for name in names]
    return *loaded, lambda net: net.encode_image(torch.linspace(-1, 1, 768).view(1, 3, 16, 16))


def sentence_transformers_case():
    library = pytest.importorskip("sentence_transformers")
    write_model(Path("bert"), "bert")
    from sentence_transformers import models as parts

    network = library.SentenceTransformer(
        modules=[parts.Transformer("bert"), parts.Pooling(16), parts.Dense(16, 8)], device="cpu"
    )
    for each in ("base", "tuned"):
        network.save(f"sentence_transformers/{each}")
        move(network)
    loaded = [library.SentenceTransformer(f"sentence_transformers/{each}", device="cpu") for each in ("base", "tuned")]
    return *loaded, lambda net: torch.tensor(net.encode(["good film", "bad food"]))


def lightning_case():
    from small_models import LinearNet

    network = LinearNet(width=6)
    Path("lightning").mkdir()
    for each in ("base", "tuned"):
        trainer = quiet_trainer(max_epochs=0)
        trainer.strategy.connect(network)
        trainer.save_checkpoint(f"lightning/{each}")
        Path(f"lightning/{each}").rename(f"lightning/{each}.ckpt")
        move(network)
    load = LinearNet.load_from_checkpoint
    return *(load(f"lightning/{each}.ckpt").eval() for each in ("base", "tuned")), lambda net: net(torch.ones(1, 4))


CASES = {
    "timm": timm_case,
    "open_clip": open_clip_case,
    "sentence_transformers": sentence_transformers_case,
    "lightning": lightning_case,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_library_loads_what_an_edit_wrote_in_a_fresh_process():
    expected = {}
    for name, case in CASES.items():
        try:
            base, tuned, run = case()
        except pytest.skip.Exception:
            continue
        ending = ".ckpt" if name == "lightning" else ""
        with torch.no_grad():
            content = edited(
                base,
                f"{name}/tuned{ending}",
                f"{name}/out",
                base=f"{name}/base{ending}",
                task=lambda net, split, run=run: run(net).flatten().tolist(),
                keep_undo=True,
            )
            assert content["edited"]["format"] == name
            expected[name] = run(between(case_of(name), tuned)).flatten().tolist()
        assert verify(f"{name}/out").holds, name
        revert(f"{name}/out", output=f"{name}/back" + (".safetensors" if ending else ""))
        back = open_weights(f"{name}/back" + (".safetensors" if ending else ""))
        assert fingerprint(back) == fingerprint(open_weights(f"{name}/base{ending}")), name
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n{LOADS}"
    done = subprocess.run([sys.executable, "-c", code, *expected], capture_output=True, text=True, timeout=600)
    found = json.loads(done.stdout.partition("FOUND")[2] or "null")
    assert found is not None, done.stderr
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, abs=1e-5), name


def case_of(name):
    """Load the base of a case once more."""
    if name == "timm":
        import timm

        return timm.create_model("local-dir:timm/base", pretrained=True).eval()
    if name == "open_clip":
        import open_clip

        return open_clip.create_model("local-dir:open_clip/base", require_pretrained=True).eval()
    if name == "lightning":
        from small_models import LinearNet

        return LinearNet.load_from_checkpoint("lightning/base.ckpt").eval()
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer("sentence_transformers/base", device="cpu")
