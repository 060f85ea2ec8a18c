"""LoRA adapters of language models: embeddings, tied heads and GPT-2's transposed layers, against peft's own merge."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tva import MismatchError, open_weights, save_weights
from tva.checkpoints import open_adapter, open_finetuned
from tva.checkpoints.lora import AdapterTensors, Factors
from tva.compose.apply import compose
from tva.errors import NoEffectError

EMBEDDING = "model.embed_tokens.weight"

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


def llama(tied):
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config).double()


def gpt2(num_labels):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=24, n_embd=16, n_layer=1, n_head=2, n_positions=8, pad_token_id=0)
    config.num_labels = num_labels
    return transformers.GPT2ForSequenceClassification(config).double()


def adapt(model, **settings):
    """Save base and adapter as transformers and peft do, and return what peft's merge makes of them, by name."""
    model.save_pretrained("base")
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    adapter = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, **settings))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapter.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = parameter.data.double().normal_(generator=generator)
    adapter.save_pretrained("adapter")
    merged = adapter.merge_and_unload().state_dict()
    return {name: tensor for name, tensor in merged.items() if name in names}


def check(weights, expected):
    for name in weights:
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("tied", "targets"),
    [
        (False, ["embed_tokens"]),
        (False, ["embed_tokens", "q_proj", "lm_head"]),
        (False, ["lm_head"]),
        (True, ["embed_tokens", "q_proj"]),
    ],
)
def test_embeddings_and_heads_saved_with_their_base_weights_are_those_of_peft(tied, targets):
    expected = adapt(llama(tied), target_modules=targets)
    saved = load_file("adapter/adapter_model.safetensors")
    assert any("base_layer" in name for name in saved)  # as peft does by default
    base = open_weights("base")
    weights = open_adapter(Path("adapter"), base)
    check(weights, expected)
    moved = {name.split(".")[-2] for name in base if not torch.equal(base[name], weights[name])}
    assert moved == set(targets)


def tied_base(folder, kind):
    """Store both names of a tied base: in one storage, as alias in a header, as copies, or in memory."""
    state = load_file(folder / "base/model.safetensors")
    both = {**state, "lm_head.weight": state[EMBEDDING]}
    (folder / "both").mkdir()
    if kind == "bin":
        torch.save(both, folder / "both/pytorch_model.bin")
    elif kind == "alias":
        save_file(state, folder / "both/model.safetensors", {"lm_head.weight": EMBEDDING})
    elif kind == "copies":
        save_weights(both, folder / "both/model.safetensors")
    return both if kind == "memory" else open_weights(folder / "both")


@pytest.mark.parametrize("kind", ["bin", "alias", "copies", "memory"])
def test_an_adapter_of_a_tied_embedding_moves_every_name(kind):
    expected = adapt(llama(True), target_modules=["embed_tokens", "q_proj"])
    base = tied_base(Path(), kind)
    weights = open_adapter(Path("adapter"), base)
    assert "lm_head.weight" in weights
    check(weights, expected)
    assert "tied, and moved together: 'lm_head.weight'" in str(weights.info)
    if kind in ("bin", "alias"):
        assert len(weights.ties()) in (0, 1)


@pytest.mark.parametrize("kind", ["one name", "bin", "alias", "copies", "memory"])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["low rank", "both", "saved"],
)
def test_an_adapter_of_a_tied_head_is_refused(kind, settings):
    adapt(llama(True), **settings)
    base = open_weights("base") if kind == "one name" else tied_base(Path(), kind)
    with pytest.raises(MismatchError, match="tied.* Untie the base: set tie_word.*'lm_head.weight'"):
        open_adapter(Path("adapter"), base)


def test_copies_of_a_model_that_is_said_not_to_be_tied_are_moved_apart():
    adapt(llama(True), target_modules=["q_proj", "lm_head"])
    base = tied_base(Path(), "copies")
    config = json.loads(Path("base/config.json").read_text())
    Path("both/config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    weights = open_adapter(Path("adapter"), base)
    assert torch.equal(weights[EMBEDDING], base[EMBEDDING])
    assert not torch.equal(weights["lm_head.weight"], base["lm_head.weight"])


def test_equal_copies_on_one_side_are_as_if_stored_once():
    llama(True).save_pretrained("base")
    both = tied_base(Path(), "copies")
    one = open_weights("base")
    assert "lm_head.weight" not in one
    assert set(open_finetuned("both", one)) == set(one)
    assert set(open_finetuned("base", both)) == set(both)


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("num_labels", [3, 16], ids=["wide", "square"])
@pytest.mark.parametrize("targets", [["attn.c_proj", "score"], ["c_attn", "score"], ["c_attn", "attn.c_proj", "c_fc"]])
def test_transposed_and_plain_layers_in_one_adapter_are_those_of_peft(targets, num_labels, with_config):
    expected = adapt(gpt2(num_labels), target_modules=targets)
    if not with_config:
        Path("base/config.json").unlink()
        if num_labels == 16 and "score" in targets and "c_attn" in targets:
            with pytest.raises(ValueError, match=r"'score' is square \(\[16, 16\]\), so that nothing says how"):
                open_adapter(Path("adapter"), open_weights("base"))
            return
    for flag in (True, False):  # peft stores that of the last module it saw
        file = Path("adapter/adapter_config.json")
        file.write_text(json.dumps({**json.loads(file.read_text()), "fan_in_fan_out": flag}))
        if not with_config and num_labels == 16 and "score" in targets:
            continue
        check(open_adapter(Path("adapter"), open_weights("base")), expected)


def test_a_head_that_the_base_lacks_is_named_with_what_to_do():
    adapt(gpt2(3), target_modules=["c_attn"], task_type="SEQ_CLS")
    transformers.GPT2Model(gpt2(3).config).double().save_pretrained("headless")
    with pytest.raises(MismatchError, match="'score.weight'.*trained on a model with another head"):
        open_adapter(Path("adapter"), open_weights("headless"))


def test_a_vocabulary_that_was_grown_is_named():
    adapt(llama(False), target_modules=["q_proj", "embed_tokens"])
    base = dict(open_weights("base"))
    base[EMBEDDING] = base[EMBEDDING][:20]
    with pytest.raises(MismatchError, match="vocabularies have 24 and 20 entries: resize the base's"):
        open_adapter(Path("adapter"), base)


def test_no_tensor_of_an_adapter_is_left_unused():
    pair = Factors(None, None, False, ("a.lora_A.weight", "a.lora_B.weight"))
    tensors = AdapterTensors({"a": pair}, {"b.weight": None}, {"b.weight": ("base_model.model.b.weight",)}, {})
    tensors.check_used(Path(), {"a.weight", "b.weight"})
    with pytest.raises(ValueError, match="holds 3 tensors, and 2 of them would not be used: 'a.lora_A.weight'"):
        tensors.check_used(Path(), {"b.weight"})


def test_an_adapter_may_be_given_by_its_file_and_with_names_of_its_adapter():
    expected = adapt(llama(False), target_modules=["q_proj", "embed_tokens"])
    file = Path("adapter/adapter_model.safetensors")
    save_file({re.sub(r"(lora_\w*[AB])\b", r"\1.default", n): t for n, t in load_file(file).items()}, file)
    base = open_weights("base")
    check(open_adapter(file, base), expected)
    for name, tensor in open_finetuned(file, base).items():
        torch.testing.assert_close(tensor.double(), expected[name])


def test_a_checkpoint_with_unmerged_factors_is_refused():
    model = llama(False)
    base = dict(model.state_dict())
    adapter = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["q_proj"]))
    torch.save({"state_dict": adapter.state_dict()}, "last.ckpt")
    with pytest.raises(ValueError, match="together with its LoRA factors .* Merge them before saving"):
        open_finetuned("last.ckpt", base)


def test_a_merged_model_beside_an_adapter_is_mentioned():
    adapt(llama(False), target_modules=["q_proj"])
    base = open_weights("base")
    save_weights(dict(base), "adapter/model.safetensors")
    said = "model.safetensors beside the adapter was not read"
    assert said in str(open_adapter(Path("adapter"), base).info)
    arguments = {"base": "base", "vectors": {"a": "adapter"}}
    with pytest.raises(NoEffectError, match=f"every delta is zero.*What was read: .*{said}"):
        compose(**arguments, recipe="a - a", output="out.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"(a|a|aa)+b": 4}}, "rank_pattern holds '.*', which could take forever to match"),
        ({"alpha_pattern": {"(.*)*(.*)*(.*)*y": 4}}, "alpha_pattern holds '.*', which could take forever to match"),
        ({"rank_pattern": {"[": 4}}, "rank_pattern holds .*, which is not a regular expression"),
        ({"rank_pattern": 5}, "'rank_pattern' must be an object or null; it is 5"),
        ({"lora_alpha": "8"}, "'lora_alpha' must be a number; it is '8'"),
        ({"r": 10**400}, "is not valid JSON .an integer of 401 digits"),
        ({"peft_type": ["LORA"]}, "'peft_type' must be text or null; it is a list"),
    ],
)
def test_settings_of_another_form_are_refused_with_their_names(settings, message):
    adapt(llama(False), target_modules=["q_proj"])
    file = Path("adapter/adapter_config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    with pytest.raises(ValueError, match=f"adapter_config.json.*{message}"):
        open_adapter(Path("adapter"), open_weights("base"))


@pytest.mark.parametrize("tied", [True, False])
def test_trained_tokens_are_those_of_peft_also_where_the_head_is_tied(tied):
    settings = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 20, 4]}
    model = llama(tied)
    model.save_pretrained("base")
    adapter = peft.get_peft_model(model, peft.LoraConfig(r=3, **settings))
    for name, parameter in adapter.named_parameters():
        if "lora_" in name or "trainable_tokens_delta" in name:
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64)
    adapter.save_pretrained("adapter")
    expected = adapter.merge_and_unload().state_dict()
    weights = open_adapter(Path("adapter"), open_weights("base"))
    check(weights, expected)
    assert not torch.equal(weights[EMBEDDING], open_weights("base")[EMBEDDING])
