"""LoRA adapters: the fine-tuned weights are those of peft's own merge, and what peft would do otherwise is refused."""

import json
from pathlib import Path

import pytest
import torch
from small_adapters import adapted, net
from torch import nn

from tva import MismatchError, open_weights, save_weights
from tva.checkpoints import open_adapter

LORAS = {
    "plain": {"target_modules": ["q", "k"]},
    "rslora": {"target_modules": ["q"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q", "k", "head"],
        "rank_pattern": {"q": 2, "block.k": 4},
        "alpha_pattern": {r"block\.[qk]": 7},
        "use_rslora": True,
    },
    "convolutions": {"target_modules": ["conv", "point"]},
    "embedding": {"target_modules": ["embed", "q"]},
    "modules_to_save": {"target_modules": ["q"], "modules_to_save": ["head"]},
    "dora": {"target_modules": ["q", "k"], "use_dora": True, "use_rslora": True},
    "dora of an embedding": {"target_modules": ["embed", "q"], "use_dora": True},
    "dora of convolutions": {"target_modules": ["conv", "point"], "use_dora": True},
    "tokens": {"target_modules": ["q"], "trainable_token_indices": {"embed": [2, 7, 5]}},
}


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("kind", LORAS)
def test_adapted_weights_are_those_of_peft_merge(kind, safe):
    expected = adapted(Path(), safe=safe, **LORAS[kind])
    save_weights(net().state_dict(), "base/model.safetensors")
    base = open_weights("base")
    weights = open_adapter(".", base)
    assert list(weights) == list(base)
    moved = [name for name in base if not torch.equal(weights[name], base[name])]
    assert moved == [name for name in base if not torch.equal(expected[name], base[name])]
    assert moved
    for name in weights:
        assert weights.spec(name) == base.spec(name)
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=1e-6)
    assert f"{len(moved)} of {len(base)} tensors" in str(weights.info) or kind == "modules_to_save"


@pytest.mark.parametrize("kind", LORAS)
def test_in_float64_the_weights_are_those_of_peft_merge_in_float64(kind):
    expected = adapted(Path(), net().double(), **LORAS[kind])
    weights = open_adapter(".", net().double().state_dict())
    for name in weights:
        assert weights[name].dtype == torch.float64
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=1e-14)
        flat = weights[name].reshape(-1)
        for start in (0, 1, 3):
            stop = min(start + 40, len(flat))
            assert torch.equal(weights.slice(name, start, stop), flat[start:stop])


def test_names_of_wrappers_around_an_adapter_are_dropped():
    weight = {"a.q.weight": torch.zeros(4, 3)}
    expected = dict(open_adapter(write(), weight))
    for name in (
        "module.base_model.model.a.q.lora_{}.weight",
        "_orig_mod.base_model.model.a.q.lora_{}.default.weight",
        "base_model.model.a._fsdp_wrapped_module.q._checkpoint_wrapped_module.lora_{}.weight",
    ):
        factors = {name.format("A"): torch.ones(1, 3), name.format("B"): torch.ones(4, 1)}
        save_weights(factors, "adapter_model.safetensors")
        assert torch.equal(open_adapter(".", weight)["a.q.weight"], expected["a.q.weight"])


def test_a_part_of_an_adapted_tensor_is_that_part_of_the_whole_bit_for_bit():
    adapted(Path(), target_modules=["q"])
    weights = open_adapter(".", net().state_dict())
    whole = weights["block.q.weight"].reshape(-1)
    parts = [weights.slice("block.q.weight", start, min(start + 7, 48)) for start in range(0, 48, 7)]
    assert torch.equal(torch.cat(parts), whole)


def test_the_shape_decides_how_a_weight_is_stored():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D

    class Gpt(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_attn = conv1d(9, 4)  # weight [in = 4, out = 9]

    base = Gpt()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    expected = adapted(Path(), base, target_modules=["c_attn"], fan_in_fan_out=True)
    weights = open_adapter(".", before)
    torch.testing.assert_close(weights["c_attn.weight"], expected["c_attn.weight"], rtol=0, atol=1e-6)
    config = json.loads(Path("adapter_config.json").read_text())
    Path("adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": False}))
    again = open_adapter(".", before)  # peft overrides the setting by a module's class
    assert torch.equal(again["c_attn.weight"], weights["c_attn.weight"])


def test_a_small_delta_survives_a_bfloat16_base_in_float32():
    write(scale=1e-4)
    base = {"a.q.weight": torch.ones(4, 3, dtype=torch.bfloat16)}
    assert torch.equal(open_adapter(".", base)["a.q.weight"], base["a.q.weight"])
    wide = open_adapter(".", base, dtype=torch.float32)
    assert wide.spec("a.q.weight").dtype == torch.float32
    assert (wide["a.q.weight"] - 1).allclose(torch.full((4, 3), 2e-4), atol=1e-6)


def write(scale=1.0, tensors=None, folder=".", **settings):
    """Write an adapter by hand: two of rank 1 for a.q, whose delta is 2 * scale everywhere."""
    folder = Path(folder)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "bias": "none", "init_lora_weights": True, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    a, b = torch.full((1, 3), scale), torch.ones(4, 1)
    factors = {"base_model.model.a.q.lora_A.weight": a, "base_model.model.a.q.lora_B.weight": b}
    save_weights(factors | (tensors or {}), folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"use_dora": True}, "use_dora=True, and has none as the magnitude of .*merge_and_unload"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"layer_replication": [[0, 4]]}, "layer_replication="),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices="),
        ({"target_parameters": ["experts"]}, "target_parameters="),
        ({"a_variant_of_tomorrow": {"x": 1}}, "a_variant_of_tomorrow="),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'; only LORA is supported"),
        ({"r": 0}, "must give r and lora_alpha"),
        ({"r": 2}, "'a.q' has rank 2, but its factors are"),
    ],
)
def test_other_variants_are_refused_by_name(setting, message):
    with pytest.raises(ValueError, match=message):
        open_adapter(write(**setting), {"a.q.weight": torch.ones(4, 3)})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("base_model.model.a.q.lora_magnitude_vector", r"use_dora=None, and has one of \[2, 3\] as the magnitude"),
        ("base_model.model.a.q.token_adapter.trainable_tokens_delta", "trainable_token_indices=None, and holds"),
        ("base_model.model.a.q.lora_magnitude_vector_of_tomorrow", "of no supported kind"),
        ("base_model.model.a.k.lora_A.weight", "'a.k' lacks A or B"),
        ("a.stranger", "of no supported kind"),
    ],
)
def test_other_tensors_are_refused_by_name(name, message):
    write(tensors={name: torch.ones(2, 3)})
    with pytest.raises(ValueError, match=message):
        open_adapter(".", {"a.q.weight": torch.ones(4, 3), "a.k.weight": torch.ones(4, 3)})


def test_an_adapter_of_another_base_is_refused():
    write()
    with pytest.raises(MismatchError, match=r"1 of 1 names are not the base's: 'a.q.weight'"):
        open_adapter(".", {"b.k.weight": torch.ones(4, 3)})
    with pytest.raises(MismatchError, match=r"the base's weight is \[5, 3\]"):
        open_adapter(".", {"a.q.weight": torch.ones(5, 3)})
    write(tensors={"base_model.model.head.weight": torch.ones(7, 2)})
    base = {"a.q.weight": torch.ones(4, 3), "head.weight": torch.ones(6, 2)}
    with pytest.raises(MismatchError, match=r"'head.weight' of shape \[7, 2\]; the base's is \[6, 2\]"):
        open_adapter(".", base)


def test_an_adapter_finds_its_base_under_one_prefix_only():
    write()
    base = {"model.a.q.weight": torch.ones(4, 3), "head": torch.ones(1)}
    weights = open_adapter(".", base)
    assert "added 'model.' to 1 of 1 names" in str(weights.info)
    assert torch.equal(weights["model.a.q.weight"], torch.full((4, 3), 3.0))
    twice = base | {"teacher.a.q.weight": torch.ones(4, 3)}
    with pytest.raises(MismatchError, match="in more than one way: add 'model.'; add 'teacher.'"):
        open_adapter(".", twice)
    weights = open_adapter(".", twice, key_map=["^=teacher."])
    assert torch.equal(weights["model.a.q.weight"], torch.ones(4, 3))


def test_an_adapter_is_no_checkpoint_without_its_base(tmp_path):
    write()
    for path in (tmp_path, Path("adapter_model.safetensors")):
        with pytest.raises(ValueError, match="is a PEFT adapter, which is not a model without its base"):
            open_weights(path)
    Path("adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="neither adapter_model.safetensors nor adapter_model.bin"):
        open_adapter(".", {"a.q.weight": torch.ones(4, 3)})
    Path("adapter_config.json").write_text("[")
    with pytest.raises(ValueError, match="is not valid JSON"):
        open_adapter(".", {})
    Path("adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="is not a PEFT adapter"):
        open_adapter(".", {})
