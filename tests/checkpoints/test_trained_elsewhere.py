"""Weights as trainers leave them: fused experts under adapters of single ones, wrappers' names, parts of ranks."""

import json
from pathlib import Path

import pytest
import torch

from tva import MismatchError, open_weights, save_weights
from tva.checkpoints import open_adapter
from tva.compose import compose

MOE = "model.layers.0.mlp.experts"


def write(folder, factors, rank=2):
    folder.mkdir()
    tensors = {}
    for module, (a, b) in factors.items():
        tensors |= {f"base_model.model.{module}.lora_{side}.weight": each for side, each in (("A", a), ("B", b))}
    save_weights(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 3, "bias": "none", "init_lora_weights": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def experts(dtype=torch.float64, up=(4, 10, 3), down=(4, 3, 5)):
    torch.manual_seed(0)
    return {f"{MOE}.gate_up_proj": torch.randn(up, dtype=dtype), f"{MOE}.down_proj": torch.randn(down, dtype=dtype)}


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_an_adapter_on_single_experts_changes_their_parts_of_fused_tensors(names):
    base, (gate, up, down) = experts(), names
    factors = {
        f"{MOE}.1.{gate}": (torch.randn(2, 3), torch.randn(5, 2)),
        f"{MOE}.3.{up}": (torch.randn(2, 3), torch.randn(5, 2)),
        f"{MOE}.0.{down}": (torch.randn(2, 5), torch.randn(3, 2)),
    }
    write(Path("adapter"), factors)
    products = {name: 1.5 * b.double() @ a.double() for name, (a, b) in factors.items()}
    expected = {name: tensor.clone() for name, tensor in base.items()}
    expected[f"{MOE}.gate_up_proj"][1, :5] += products[f"{MOE}.1.{gate}"]
    expected[f"{MOE}.gate_up_proj"][3, 5:] += products[f"{MOE}.3.{up}"]
    expected[f"{MOE}.down_proj"][0] += products[f"{MOE}.0.{down}"]
    found = open_adapter(Path("adapter"), base)
    assert list(found) == list(base)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-12)
        assert torch.equal(found.slice(name, 7, 44), found[name].reshape(-1)[7:44])
    save_weights({name: tensor.bfloat16() for name, tensor in base.items()}, "base.safetensors")
    compose("base.safetensors", {"a": Path("adapter")}, "a", "out.safetensors")
    out = open_weights("out.safetensors")
    for name, tensor in expected.items():
        wanted = (base[name].bfloat16().double() + tensor - base[name]).bfloat16()
        assert (out[name] != wanted).float().mean() < 0.02  # sums in float32 may round the other way
        torch.testing.assert_close(out[name], wanted, rtol=0.008, atol=0)


def test_experts_that_are_fused_in_another_order_are_refused():
    write(Path("adapter"), {f"{MOE}.1.gate_proj": (torch.ones(2, 3), torch.ones(5, 2))})
    Path("base").mkdir()
    save_weights(experts(up=(4, 3, 10), down=(4, 5, 3)), "base/model.safetensors")
    with pytest.raises(MismatchError, match=r"gives 'model.*1.gate_proj' a delta of shape \[5, 3\], but .* \[1, 10\]"):
        open_adapter(Path("adapter"), open_weights("base"))
    Path("base/config.json").write_text(json.dumps({"model_type": "gpt_oss"}))
    with pytest.raises(MismatchError, match=r"those of the base \(gpt_oss\) are fused in another order"):
        open_adapter(Path("adapter"), open_weights("base"))


@pytest.mark.parametrize(
    "name",
    [
        "module.model.l.weight",
        "_orig_mod.model.l.weight",
        "module._orig_mod.model.l.weight",
        "_fsdp_wrapped_module.model._fsdp_wrapped_module.l.weight",
        "model._checkpoint_wrapped_module.l._orig_mod.weight",
    ],
)
def test_names_that_wrappers_change_are_those_of_the_base(name):
    save_weights({"model.l.weight": torch.ones(2, 2)}, "base.safetensors")
    torch.save({name: torch.full((2, 2), 3.0)}, "tuned.pt")
    compose("base.safetensors", {"a": Path("tuned.pt")}, "a / 2", "out.safetensors")
    assert torch.equal(open_weights("out.safetensors")["model.l.weight"], torch.full((2, 2), 2.0))


def test_parts_of_ranks_without_a_metadata_file_are_refused_by_name():
    for names in (
        ["model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt", "extra_state_world_size_2_rank_0.pt"],
        ["rank0.pt", "rank1.pt"],
        ["pytorch_model_rank_0.bin", "pytorch_model_rank_1.bin"],
    ):
        folder = Path(names[0])
        folder.mkdir()
        for name in names:
            torch.save({"w": torch.ones(2)}, folder / name)
        with pytest.raises(ValueError, match=r"what each process of a sharded run saved .*verl.model_merger merge"):
            open_weights(folder)
    with pytest.raises(ValueError, match="what each process of a sharded run saved"):
        open_weights("model_world_size_2_rank_0.pt/model_world_size_2_rank_1.pt")
    torch.save({"w": torch.ones(2)}, "model_world_size_1_rank_0.pt")
    assert list(open_weights("model_world_size_1_rank_0.pt")) == ["w"]
