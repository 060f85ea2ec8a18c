"""GGUF files: dequantized as the gguf package does, edited exactly, and written as GGUF again."""

import struct
from pathlib import Path

import numpy
import pytest
import torch

from tva import MismatchError, open_weights, save_weights
from tva.checkpoints import open_finetuned
from tva.compose import compose, verify

gguf = pytest.importorskip("gguf")
KINDS = {"blk.0.attn_q.weight": "Q4_0", "blk.0.ffn_up.weight": "Q8_0", "token_embd.weight": "Q5_1"}
Q = gguf.GGMLQuantizationType


def values(seed):
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(6, 64, generator=generator) for name in KINDS}
    return found | {"output_norm.weight": torch.rand(64, generator=generator)}


def write(path, tensors, kinds=KINDS):
    """Write a file; return what it stands for in float64."""
    writer, exact = gguf.GGUFWriter(path, "llama"), {}
    writer.add_block_count(1)
    for name, tensor in tensors.items():
        if name in kinds:
            data = gguf.quants.quantize(tensor.numpy(), Q[kinds[name]])
            writer.add_tensor(name, data, raw_dtype=Q[kinds[name]])
            exact[name] = torch.from_numpy(gguf.quants.dequantize(data, Q[kinds[name]])).double()
        else:
            writer.add_tensor(name, tensor.numpy())
            exact[name] = tensor.double()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return exact


@pytest.fixture
def files():
    base, tuned = values(0), values(1)
    paths = ["base.gguf", "tuned.gguf"]
    return *paths, write(paths[0], base), write(paths[1], {n: base[n] + 0.1 * tuned[n] for n in base})


def test_a_file_is_what_its_package_makes_of_it(files):
    path, _, exact, _ = files
    opened = open_weights(path)
    assert list(opened) == list(exact)
    for name, tensor in exact.items():
        assert torch.equal(opened[name].double(), tensor)
        assert torch.equal(opened.slice(name, 3, 50).double(), tensor.reshape(-1)[3:50])


def test_an_edit_is_exact_and_written_in_bfloat16(files):
    base, tuned, exact, moved = files
    compose(base, {"a": tuned}, "a", "out.safetensors", scaling_coef=0.4)
    out = open_weights("out.safetensors")
    for name in KINDS:
        wanted = exact[name] + 0.4 * (moved[name] - exact[name])
        assert torch.equal(out[name], wanted.to(torch.bfloat16))
    assert out["output_norm.weight"].dtype == torch.float32


def test_an_edit_is_written_as_gguf_again(files):
    base, tuned, exact, moved = files
    report = compose(base, {"a": tuned}, "a", "out.gguf", scaling_coef=0.4, requantize=True)
    reader, before = gguf.GGUFReader(Path("out.gguf")), gguf.GGUFReader(base)
    assert reader.fields.keys() == before.fields.keys()
    for tensor in reader.tensors:
        name = tensor.name
        found = torch.from_numpy(numpy.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type))).double()
        wanted = exact[name] + 0.4 * (moved[name] - exact[name])
        if name in KINDS:
            hand = gguf.quants.quantize(wanted.float().numpy(), Q[KINDS[name]])
            hand = torch.from_numpy(gguf.quants.dequantize(hand, Q[KINDS[name]])).double()
            assert (found - wanted).norm() <= 1.1 * (hand - wanted).norm()
        else:
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert "requantized 3 of 3 tensors" in report.notes[-1]
    assert sorted(path.name for path in Path().iterdir()) == ["base.gguf", "out.gguf", "tuned.gguf"]


def test_a_gguf_file_holds_no_record(files):
    with pytest.raises(ValueError, match="is a GGUF file, in which tva records no inputs"):
        verify(files[0])


def test_types_that_can_only_be_read_are_named_and_may_be_left_out():
    block, size = gguf.GGML_QUANT_SIZES[Q.Q6_K]
    data = {name: torch.randint(0, 60, (2, size), dtype=torch.uint8).numpy() for name in ("base", "tuned")}
    for name, rows in data.items():
        rows[:, -2:] = numpy.array([[0, 40], [0, 40]], numpy.uint8)  # the scale of a block, float16
        writer = gguf.GGUFWriter(Path(f"{name}.gguf"), "llama")
        writer.add_tensor("output.weight", rows, raw_dtype=Q.Q6_K)
        up = torch.full((1, 64), 1.0 + (name == "tuned")).numpy()
        writer.add_tensor("up.weight", gguf.quants.quantize(up, Q.Q8_0), raw_dtype=Q.Q8_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    arguments = (Path("base.gguf"), {"a": Path("tuned.gguf")}, "a", Path("out.gguf"))
    opened = open_weights(arguments[0])["output.weight"]
    assert opened.shape == (2, block)
    assert torch.equal(opened.float(), torch.from_numpy(gguf.quants.dequantize(data["base"], Q.Q6_K)))
    with pytest.raises(ValueError, match="cannot write 'GGUF Q6_K'.*'output.weight'.* by exclude"):
        compose(*arguments, requantize=True)
    compose(*arguments, requantize=True, exclude="^output")
    assert torch.equal(open_weights("out.gguf")["output.weight"], opened)
    assert open_weights("out.gguf")["up.weight"].unique().tolist() == pytest.approx([2.0], rel=1e-3)


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("out.gguf", {}, "requantize is off"),
        ("out.safetensors", {"requantize": True}, "an output that ends in .gguf go together"),
        ("out.gguf", {"requantize": True, "resume": True}, "Leave resume out"),
        ("out.gguf", {"requantize": True, "dtype": "float32"}, "dtype='float32' is another"),
    ],
)
def test_what_does_not_go_together_is_refused(files, output, options, message):
    base, tuned, *_ = files
    with pytest.raises(ValueError, match=message):
        compose(base, {"a": tuned}, "a", output, **options)
    assert not Path(output).exists()


def test_other_checkpoints_are_not_mixed_with_gguf(files):
    base, *_ = files
    save_weights({"model.layers.0.self_attn.q_proj.weight": torch.ones(6, 64)}, "hf.safetensors")
    with pytest.raises(MismatchError, match="Give both as GGUF files, or both as the checkpoints"):
        open_finetuned("hf.safetensors", open_weights(base))
    with pytest.raises(MismatchError, match="key_map is not enough"):
        open_finetuned(base, open_weights("hf.safetensors"), key_map={"blk.0.attn_q": "x"})


@pytest.mark.parametrize("size", [4, 20, 200, 500])
def test_a_damaged_file_is_an_error_that_names_it(files, size):
    with open(files[0], "rb") as file:
        Path("cut.gguf").write_bytes(file.read(size))
    with pytest.raises(ValueError, match="cut.gguf is not a GGUF file, or is damaged"):
        open_weights("cut.gguf")


def test_the_package_is_named_where_it_is_missing(files, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ValueError, match="base.gguf is read by the package gguf, .* pip install 'tva.gguf.'"):
        open_weights(files[0])


def _text(text):
    return struct.pack("<Q", len(text)) + text


TENSOR = _text(b"w") + struct.pack("<IQIQ", 1, 4, 0, 0)  # four float32 at the start of the data
HEADERS = {  # values and tensors, their counts, and what is wrong
    "no file holds that many bytes": (
        _text(b"k") + struct.pack("<IIQ", 9, 0, 2**60),
        1,
        b"",
        0,
        "bytes are said to follow",
    ),
    "as many texts": (_text(b"k") + struct.pack("<IIQ", 9, 8, 2**60), 1, b"", 0, "an array of .* texts"),
    "arrays in arrays": (_text(b"k") + struct.pack("<IIQ", 9, 9, 1), 1, b"", 0, "an array of 1 arrays"),
    "as many values": (b"", 2**60, b"", 0, "1,152,921,504,606,846,976 values"),
    "as many tensors": (b"", 0, b"", 2**60, "1,152,921,504,606,846,976 tensors"),
    "a long name": (struct.pack("<Q", 2**62), 1, b"", 0, "a name of .* bytes"),
    "an unknown value": (_text(b"k") + struct.pack("<I", 99), 1, b"", 0, "unknown type 99"),
    "an alignment of 0": (_text(b"general.alignment") + struct.pack("<II", 4, 0), 1, TENSOR, 1, "alignment"),
    "a name twice": (b"", 0, 2 * TENSOR, 2, "'w' is there twice"),
    "data elsewhere": (b"", 0, TENSOR[:-8] + struct.pack("<Q", 2**40), 1, "ends behind the file's"),
    "a part of a block": (b"", 0, _text(b"w") + struct.pack("<IQIQ", 1, 7, 8, 0), 1, "not of whole blocks of 32"),
    "an unknown kind of tensor": (b"", 0, _text(b"w") + struct.pack("<IQIQ", 1, 4, 999, 0), 1, "999"),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_that_promises_what_the_file_does_not_hold_is_refused_at_once(what):
    values, num_values, tensors, num_tensors, message = HEADERS[what]
    header = b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_values) + values + tensors
    Path("m.gguf").write_bytes(header + bytes(-len(header) % 32 + 16))
    with pytest.raises(ValueError, match=f"m.gguf is not a GGUF file, or is damaged .*{message}"):
        open_weights("m.gguf")
