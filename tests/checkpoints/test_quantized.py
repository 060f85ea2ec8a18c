"""Quantized checkpoints of unknown schemes are refused by name wherever arithmetic begins."""

import json
import re
from pathlib import Path

import pytest
import torch

from tva import MismatchError, TaskVector, open_weights, save_weights
from tva.arithmetic import add_scaled
from tva.checkpoints import open_finetuned
from tva.cli.main import main

UP = "model.layers.0.mlp.up_proj"
CODES = torch.ones(8, 8, dtype=torch.uint8)
FP8 = torch.ones(8, 8).to(torch.float8_e4m3fn)
IN_MEMORY = {
    "FP8 or int8 with scales": {f"{UP}.weight": FP8, f"{UP}.weight_scale_inv": torch.ones(1, 1)},
    "FP8 or int8 with scales ": {f"{UP}.weight": FP8, f"{UP}.scale_weight": torch.ones(1)},
    "bitsandbytes int8": {f"{UP}.weight": CODES.to(torch.int8), f"{UP}.SCB": torch.ones(8)},
    "bitsandbytes 4-bit": {f"{UP}.weight": CODES.reshape(-1, 1), f"{UP}.weight.absmax": torch.ones(1)},
    "GPTQ or AWQ": {f"{UP}.qweight": CODES.int(), f"{UP}.scales": torch.ones(8).half(), f"{UP}.qzeros": CODES.int()},
    "compressed-tensors": {f"{UP}.weight_packed": CODES.int(), f"{UP}.weight_scale": torch.ones(8)},
    "MXFP4": {f"{UP}_blocks": CODES, f"{UP}_scales": CODES},
}
REFUSED = r"is quantized \({}\): '{}[\w.]*' holds codes.*Give the checkpoint that it was quantized from, or dequantize"
# In files these are refused: what they stand for is not known, or not stated.
IN_FILES = {
    "bitsandbytes 4-bit": (IN_MEMORY["bitsandbytes 4-bit"], r"is quantized \(bitsandbytes 4-bit\)"),
    "4-bit cut": (
        {f"{UP}.weight": CODES, f"{UP}.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(b"{}")).byte()},
        r"describes a 4-bit tensor, .* is missing",
    ),
    "GPTQ without a configuration": (IN_MEMORY["GPTQ or AWQ"], r"is quantized \(GPTQ or AWQ\)"),
    "compressed-tensors without one": (IN_MEMORY["compressed-tensors"], r"is quantized \(compressed-tensors\)"),
    "MXFP4 cut": (IN_MEMORY["MXFP4"], "MXFP4 has blocks of 16 bytes"),
    "NVFP4": (
        {f"{UP}.weight": CODES, f"{UP}.weight_scale": FP8, f"{UP}.weight_scale_2": torch.ones(1)},
        r"is quantized \(an unknown scheme\)",
    ),
    "a second scale": (
        {f"{UP}.weight": FP8, f"{UP}.weight_scale": torch.ones(1), f"{UP}.weight_scale_2": torch.ones(1)},
        "holds 'model.layers.0.mlp.up_proj.weight_scale_2' too",
    ),
    "zero points": (
        {f"{UP}.weight": CODES.to(torch.int8), f"{UP}.weight_scale": torch.ones(8), f"{UP}.weight_zero_point": CODES},
        "weight_zero_point' too, which that scheme",
    ),
    "an unknown name": ({f"{UP}.weight": FP8, f"{UP}.scale_x": torch.ones(1)}, r"is quantized \(an unknown scheme\)"),
    "scales of another shape": (
        {f"{UP}.weight": FP8, f"{UP}.weight_scale_inv": torch.ones(3, 3)},
        "which scale belongs to which code is not known",
    ),
    "columns of int8": (
        {f"{UP}.weight": CODES.to(torch.int8), f"{UP}.SCB": torch.ones(8), f"{UP}.weight_format": torch.tensor(1)},
        "are not stored row by row",
    ),
}


@pytest.mark.parametrize("kind", IN_MEMORY)
def test_quantized_weights_in_memory_are_refused(kind):
    state = {**IN_MEMORY[kind], "model.norm.weight": torch.ones(8)}
    refused = REFUSED.format(kind.strip(), UP.replace(".", "[.]"))
    with pytest.raises(ValueError, match="the base " + refused):
        TaskVector.between(state, state)
    save_weights({"model.norm.weight": torch.ones(8)}, "plain.safetensors")
    with pytest.raises(ValueError, match="the base " + refused):
        open_finetuned("plain.safetensors", state)


@pytest.mark.parametrize("kind", IN_FILES)
def test_quantized_files_of_an_unknown_scheme_are_refused_where_arithmetic_begins(kind, capsys):
    state, message = IN_FILES[kind]
    paths = {name: f"{name}.safetensors" for name in ("base", "plain", "tuned", "out", "o.tv")}
    for name in ("base", "tuned"):
        save_weights({**state, "model.norm.weight": torch.ones(8)}, paths[name])
    save_weights({"model.norm.weight": torch.ones(8)}, paths["plain"])
    with pytest.raises(ValueError, match="tuned.safetensors.*" + message):
        open_finetuned(paths["tuned"], open_weights(paths["plain"]))
    vector = "v.tv.safetensors"
    TaskVector.between({"model.norm.weight": torch.ones(8)}, {"model.norm.weight": torch.zeros(8)}).save(vector)
    for command in (
        ["compose", "--base", paths["base"], "--vectors.a", paths["tuned"], "--recipe", "a", "--output", paths["out"]],
        ["compose", "--base", paths["base"], "--vectors.a", vector, "--recipe", "a", "--output", paths["out"]],
        ["extract", "--base", paths["base"], "--finetuned", paths["tuned"], "--output", paths["o.tv"]],
        ["compare", paths["tuned"], vector, "--base", paths["base"]],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(command)
        assert stopped.value.code == 2
        assert re.search(message, " ".join(capsys.readouterr().err.split()))
        assert not Path("out.safetensors").exists()


def test_codes_of_a_format_without_known_names_are_found_by_the_configuration():
    Path("b").mkdir()
    save_weights({"l.weight": CODES, "n.weight": torch.ones(2)}, "b/model.safetensors")
    Path("b/config.json").write_text(json.dumps({"quantization_config": {"quant_method": "hqq"}}))
    base = open_weights("b")
    with pytest.raises(ValueError, match=r"is quantized \(hqq\): 'l.weight' holds codes"):
        open_finetuned("b", base)


def test_weights_that_only_resemble_quantized_ones_are_edited():
    base = {
        "l.weight": FP8,  # a plain cast
        "m.weight": torch.ones(2, 2),
        "m.weight_scale": torch.ones(1),  # a parameter of that name
        "codebook": torch.ones(3, 3, dtype=torch.int32),
        "scales": torch.ones(2),
    }
    tuned = {name: tensor + 1 if tensor.dtype == torch.float32 else tensor for name, tensor in base.items()}
    tuned["l.weight"] = (base["l.weight"].float() + 1).to(torch.float8_e4m3fn)
    vector = TaskVector.between(base, tuned)
    assert torch.equal(vector.apply_to(base)["l.weight"].float(), tuned["l.weight"].float())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_that_is_not_finite_stays_as_it_is(dtype):
    base = torch.tensor([1.0, float("nan"), 2.0]).to(dtype)
    moved = add_scaled(base, torch.tensor([1.0, 0.0, 1.0]), 1.0)
    assert (
        moved.view(torch.uint8).tolist() == torch.tensor([2.0, float("nan"), 3.0]).to(dtype).view(torch.uint8).tolist()
    )


def test_experts_that_are_fused_in_memory_are_recognized():
    experts = {f"mlp.experts.{n}.w1.weight": torch.ones(2, 3) for n in range(4)}
    save_weights({**experts, "norm.weight": torch.ones(3)}, "base.safetensors")
    torch.save({"mlp.experts.gate_up_proj": torch.ones(4, 2, 3), "norm.weight": torch.ones(3)}, "t.ckpt")
    base = open_weights("base.safetensors")
    with pytest.raises(MismatchError, match="hold 27 elements, and experts are one tensor each .* save_pretrained"):
        open_finetuned("t.ckpt", base)
    torch.save({"mlp.experts.gate_up_proj": torch.ones(4, 2, 4), "norm.weight": torch.ones(3)}, "t.ckpt")
    with pytest.raises(MismatchError, match="No single prefix") as refused:
        open_finetuned("t.ckpt", base)
    assert "save_pretrained" not in str(refused.value)


@pytest.mark.parametrize("grid", [(2, 3), (1, 1), (8, 1)])
def test_fused_experts_in_fp8_have_blocks_of_their_own(grid):
    block = (-(-8 // grid[0]), -(-12 // grid[1]))
    codes = torch.randn(3, 8, 12).to(torch.float8_e4m3fn)
    scales = torch.rand(3, *grid)
    save_weights({"experts.down_proj": codes, "experts.down_proj_scale_inv": scales}, "b.safetensors")
    weights = open_weights("b.safetensors")
    exact = codes.double() * scales.double().repeat_interleave(block[0], 1).repeat_interleave(block[1], 2)[:, :8, :12]
    assert torch.equal(weights["experts.down_proj"], exact)
    assert torch.equal(weights.slice("experts.down_proj", 50, 230), exact.reshape(-1)[50:230])
    again = weights.entry("experts.down_proj").quantized(exact).read()
    assert (again - exact).norm() <= 0.04 * exact.norm()
