"""Edits of quantized bases are exact, and are written in bfloat16 or in the scheme of the base."""

import json
import re
from pathlib import Path

import pytest
import small_quantized
import torch
from safetensors.torch import load_file

from tva import TaskVector, open_weights, save_weights
from tva.cli.main import main
from tva.compose import compose, verify

REQUANTIZED = ["FP8 blocks", "FP8 rows", "int8", "nf4", "nf4 nested", "MXFP4"]


def make(folder, scheme, seed=0):
    """Write a quantized model; return what its quantized tensor stands for."""
    maker, shape, config = small_quantized.MAKERS[scheme]
    name = small_quantized.tensor_name(scheme).removesuffix(".weight")
    stored, exact = maker(name, small_quantized.values(*shape, seed=seed))
    folder.mkdir()
    save_weights({**stored, "norm.weight": torch.ones(3, dtype=torch.bfloat16)}, folder / "model.safetensors")
    text = {"torch_dtype": "float16", "quantization_config": config, "text_config": {"quantization_config": config}}
    (folder / "config.json").write_text(json.dumps(text))
    (folder / "quantize_config.json").write_text("{}")
    return exact


def make_vector(folder, scheme, exact, size=0.3):
    name, path = small_quantized.tensor_name(scheme), folder / "v.tv.safetensors"
    base = {name: exact.float(), "norm.weight": torch.ones(3)}
    tau = (size * small_quantized.values(*exact.shape, seed=7)).float()
    TaskVector.between(base, {name: base[name] + tau, "norm.weight": torch.full((3,), 1.5)}).save(path)
    return str(path), TaskVector.load(path).deltas[name].double()


@pytest.mark.parametrize("scheme", small_quantized.MAKERS)
def test_an_edit_of_a_quantized_base_is_that_of_its_dequantized_weights_in_float64(scheme):
    exact, name = make(Path("base"), scheme), small_quantized.tensor_name(scheme)
    opened = open_weights("base")
    assert set(opened) == {name, "norm.weight"}
    assert torch.equal(opened[name], exact)
    for start, stop in ((0, 1), (3, 29), (7, exact.numel()), (5, 5)):
        assert torch.equal(opened.slice(name, start, stop), exact.reshape(-1)[start:stop])
    path, tau = make_vector(Path(), scheme, exact)
    out = Path("out")
    report = compose("base", {"a": path}, "a", out, scaling_coef=0.37, allow_other_base=True)
    assert "dequantized 1 tensors of" in report.notes[0]
    written = load_file(out / "model.safetensors")
    assert torch.equal(written[name], (exact + 0.37 * tau).to(torch.bfloat16))
    assert written["norm.weight"].dtype == torch.bfloat16
    assert json.loads((out / "config.json").read_text()) == {"torch_dtype": "bfloat16", "text_config": {}}
    assert not (out / "quantize_config.json").exists()
    assert verify(out).holds


@pytest.mark.parametrize("scheme", REQUANTIZED)
def test_an_edit_is_requantized_as_well_as_the_exact_result(scheme):
    exact, name = make(Path("base"), scheme), small_quantized.tensor_name(scheme)
    path, tau = make_vector(Path(), scheme, exact)
    out, coef = Path("out"), 0.37
    options = {"scaling_coef": coef, "allow_other_base": True, "requantize": True}
    report = compose("base", {"a": path}, "a", out, **options)
    wanted = exact + coef * tau
    _, by_hand = small_quantized.MAKERS[scheme][0]("l", wanted)
    found = open_weights(out)
    assert (found[name] - wanted).norm() <= 1.1 * (by_hand - wanted).norm()
    before, after = load_file("base/model.safetensors"), load_file(out / "model.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    assert (out / "config.json").read_bytes() == Path("base/config.json").read_bytes()
    stated = float(re.search(r"relative error of ([\d.]+)%", report.notes[-1])[1]) / 100
    assert stated == pytest.approx(float((found[name] - wanted).norm() / wanted.norm()), abs=1e-4)
    assert verify(out).holds
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 8]))
    assert not verify(out).holds


def test_a_tensor_that_no_vector_moves_keeps_its_codes():
    stored = {}
    for name in ("a", "b"):
        stored |= small_quantized.fp8(name, small_quantized.values(8, 8, seed=ord(name)))[0]
    save_weights(stored, "base.safetensors")
    base = dict(open_weights("base.safetensors"))
    save_weights({"a.weight": base["a.weight"] + 1, "b.weight": base["b.weight"]}, "tuned.safetensors")
    out = Path("out.safetensors")
    vectors = {"a": Path("tuned.safetensors")}
    report = compose("base.safetensors", vectors, "a", out, requantize=True)
    written = load_file(out)
    assert torch.equal(written["b.weight"].view(torch.uint8), stored["b.weight"].view(torch.uint8))
    assert torch.equal(written["b.weight_scale_inv"], stored["b.weight_scale_inv"])
    assert "requantized 1 of 2 tensors" in report.notes[-1]
    small = compose("base.safetensors", vectors, "a", "s.safetensors", scaling_coef=1e-9, requantize=True)
    assert "1 of them the edit is smaller than a step of the codes" in small.notes[-1]


def test_an_interrupted_requantization_goes_on_to_the_same_bytes(monkeypatch):
    from tva.compose.requantize import Requantized

    stored, vectors = {}, {"v": Path("tuned.safetensors")}
    for name in ("a", "b", "c"):
        stored |= small_quantized.int8(name, small_quantized.values(8, 8, seed=ord(name)))[0]
    save_weights(stored, "base.safetensors")
    tuned = {name: tensor + 1 for name, tensor in open_weights("base.safetensors").items()}
    save_weights(tuned, vectors["v"])
    whole, part = Path("whole.safetensors"), Path("part.safetensors")
    finish, finished = Requantized.finish, []

    def stop_after_two(self, name, record):
        if len(finished) == 2:
            raise KeyboardInterrupt
        finished.append(name)
        finish(self, name, record)

    monkeypatch.setattr(Requantized, "finish", stop_after_two)
    arguments = (Path("base.safetensors"), vectors, "v")
    with pytest.raises(KeyboardInterrupt):
        compose(*arguments, part, requantize=True)
    monkeypatch.setattr(Requantized, "finish", finish)
    report = compose(*arguments, part, requantize=True, resume=True)
    assert report.resumed >= 1
    other = compose(*arguments, whole, requantize=True)
    assert part.read_bytes() == whole.read_bytes()
    assert report.notes[-1] == other.notes[-1]


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("AWQ", {"requantize": True}, "cannot write 'AWQ'.* only read"),
        ("int8", {"requantize": True, "dtype": "float32"}, "dtype='float32' is another"),
        ("int8", {"keep_undo": True}, "keep_undo cannot restore .* quantized"),
    ],
)
def test_what_cannot_be_written_is_refused(scheme, options, message):
    path, _ = make_vector(Path(), scheme, make(Path("base"), scheme))
    with pytest.raises(ValueError, match=message):
        compose("base", {"a": path}, "a", "out", allow_other_base=True, **options)
    assert not list(Path().glob("*out*"))


def test_requantize_needs_a_quantized_base(capsys):
    save_weights({"l.weight": torch.ones(2, 2)}, "base.safetensors")
    save_weights({"l.weight": torch.zeros(2, 2)}, "tuned.safetensors")
    words = ["--base", "base.safetensors", "--vectors.a", "tuned.safetensors", "--recipe", "a", "--output"]
    with pytest.raises(SystemExit):
        main(["compose", *words, "out.safetensors", "--requantize"])
    assert "requantize needs a quantized base" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_transformers_loads_an_edit_of_a_quantized_model_with_an_adapter(tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, dtype="bfloat16")
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained("base")
    stored, exact = {}, dict(model.state_dict())
    for name, tensor in load_file("base/model.safetensors").items():
        if "proj" in name:
            codes, exact[name] = small_quantized.fp8(name.removesuffix(".weight"), tensor.double())
            stored |= codes
        else:
            stored[name] = tensor.bfloat16()
    save_weights(stored, "base/model.safetensors", metadata={"format": "pt"})
    text = json.loads(Path("base/config.json").read_text())
    text["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [4, 4]}
    Path("base/config.json").write_text(json.dumps(text))
    model.load_state_dict({name: tensor.float() for name, tensor in exact.items()})
    adapter = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapter.save_pretrained("adapter")
    merged = adapter.merge_and_unload().state_dict()
    compose("base", {"a": Path("adapter")}, "a", "out")
    loaded = transformers.LlamaForCausalLM.from_pretrained("out")
    assert loaded.dtype == torch.bfloat16
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, merged[name].bfloat16(), rtol=0.008, atol=0)
    # the same base with the adapter on top is the same model
    compose(f"{tmp_path}/base+{tmp_path}/adapter", {"a": Path("adapter")}, "a", "two", scaling_coef=0)
    assert "quantization_config" not in json.loads(Path("two/config.json").read_text())
    two = load_file("two/model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(two[name], merged[name].bfloat16(), rtol=0.008, atol=0)
    with pytest.raises(ValueError, match="has an adapter on top"):
        compose(f"{tmp_path}/base+{tmp_path}/adapter", {"a": Path("adapter")}, "a", "x", requantize=True)
