"""Damage to a task vector file: every flipped bit is refused, or changes nothing that anybody reads."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tva import TaskVector, open_weights, save_weights
from tva.checkpoints import Fingerprint, read_metadata
from tva.checkpoints.fingerprint import CONTENT, HEADER
from tva.cli.main import main
from tva.compose.apply import compose
from tva.compose.verify import verify
from tva.vectors import compare, compress, extract, inspect, match
from tva.vectors.content import verify_vector
from tva.vectors.header import Origin
from tva.vectors.write import TensorSource, VectorPlan, emit


@pytest.fixture
def files(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = {
        "a.w": torch.zeros(24, 20),
        "a.b": torch.zeros(24),
        "still": torch.ones(3),
        "bn.running_mean": torch.zeros(4),
    }
    tuned = {name: tensor + torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
    tuned["still"], tuned["a.b"][:20] = base["still"], 0
    for name, weights in (("base", base), ("tuned", tuned)):
        save_weights(weights, f"{name}.safetensors")
    return tmp_path


def written(files, how):
    """Write the vector of these files in one of the ways there are."""
    path = str(files / "v.tv.safetensors")
    vector = TaskVector.between(open_weights(files / "base.safetensors"), open_weights(files / "tuned.safetensors"))
    if how == "extract":
        extract(files / "base.safetensors", files / "tuned.safetensors", path)
    elif how in ("save", "int8 by save"):
        vector.save(path, encoding=how.split()[0] if "by" in how else None)
    else:
        vector.save(files / "dense.tv.safetensors")
        compress(files / "dense.tv.safetensors", path, encoding=how)
    return path


def contents(path):
    """Return all that anybody reads of a vector file."""
    vector = TaskVector.load(path)
    tensors = {name: tensor.numpy().tobytes() for name, tensor in (*vector.deltas.items(), *vector.buffers.items())}
    metadata = {key: text for key, text in read_metadata(path).items() if key.startswith("tva.")}
    return tensors, list(vector.buffers), vector.untouched, vector.origin, metadata


def is_refused(path):
    """Return whether a file is found to be damaged: when it is opened, or when it is read through."""
    try:
        return not verify_vector(path).holds
    except ValueError as error:
        return "v.tv.safetensors" in str(error)


def test_a_tensor_called_like_a_value_of_the_header_is_no_alias():
    vector = TaskVector({"dense": torch.ones(2), "pt": torch.ones(3)}, origin=Origin(task="pt"))
    vector.save("v.tv.safetensors")
    assert TaskVector.load("v.tv.safetensors").deltas.keys() == {"dense", "pt"}


@pytest.mark.parametrize(
    "how", ["extract", "save", "int8 by save", "int8", "sign", "top_k(density=0.2)", "low_rank(rank=2)"]
)
def test_every_flipped_bit_is_refused_or_means_nothing(files, how):
    path = written(files, how)
    whole, data = contents(path), np.fromfile(path, np.uint8)
    assert verify_vector(path).holds
    meaningless = []
    for bit in random.Random(0).sample(range(8 * len(data)), 150):
        flipped = data.copy()
        flipped[bit // 8] ^= 1 << bit % 8
        flipped.tofile(path)
        if is_refused(path):
            continue
        meaningless.append(bit)
        assert contents(path) == whole, bit
    assert len(meaningless) <= 3  # such as those of "format": "pt", which is torch's name for itself


COMMANDS = {
    "compose": lambda f, v: compose(f / "base.safetensors", {"v": v}, "v", f / "o.safetensors"),
    "inspect": lambda f, v: inspect(v),
    "compare": lambda f, v: compare([v, f / "other.tv.safetensors"]),
    "match": lambda f, v: match(f / "tuned.safetensors", [v], f / "base.safetensors"),
    "compress": lambda f, v: compress(v, f / "c.tv.safetensors", encoding="int8"),
    "load": lambda f, v: TaskVector.load(v),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_flipped_bit_of_a_delta_stops_every_command(files, command):
    path = written(files, "extract")
    TaskVector.load(path).save("other.tv.safetensors")
    COMMANDS[command](files, path)
    for output in ("o.safetensors", "c.tv.safetensors"):
        Path(output).unlink(missing_ok=True)
    data = np.fromfile(path, np.uint8)
    data[-40] ^= 64
    data.tofile(path)
    with pytest.raises(ValueError, match=r"v.tv.safetensors is damaged: its tensors have the fingerprint"):
        COMMANDS[command](files, path)
    assert not Path("o.safetensors").exists()
    assert not Path("c.tv.safetensors").exists()


def test_a_flipped_bit_of_what_is_left_out_is_found_too(files):
    path = written(files, "save")
    weights = dict(open_weights(path))
    weights["a.b"][-1] += 1
    save_file(weights, path, read_metadata(path))
    with pytest.raises(ValueError, match="is damaged"):
        compose("base.safetensors", {"v": path}, "v", "o.safetensors", exclude=["a[.]b"])


def test_a_compressed_vector_that_was_damaged_stops_compose(files):
    path = written(files, "int8")
    data = np.fromfile(path, np.uint8)
    data[-40] ^= 64
    data.tofile(path)
    with pytest.raises(ValueError, match="v.tv.safetensors is damaged"):
        compose("base.safetensors", {"v": path}, "v", "o.safetensors")


def test_verify_says_of_a_vector_whether_it_is_as_it_was_written(files, capsys):
    path = written(files, "extract")
    main(["verify", path])
    assert f"verified: the task vector {path} has the fingerprint" in capsys.readouterr().out
    unsealed = {key: text for key, text in read_metadata(path).items() if key not in (CONTENT, HEADER)}
    save_weights(dict(open_weights(path)), "old.tv.safetensors", unsealed)
    with pytest.raises(SystemExit, match="^1$"):
        main(["verify", "old.tv.safetensors"])
    assert "NOT verified" in capsys.readouterr().out
    assert TaskVector.load("old.tv.safetensors").norm() == TaskVector.load(path).norm()  # still of use
    data = np.fromfile(path, np.uint8)
    data[-40] ^= 64
    data.tofile(path)
    assert not verify(path).holds
    for lost in (CONTENT, HEADER, "tva.format", "tva.base_fingerprint"):
        header = {key: text for key, text in read_metadata(written(files, "save")).items() if key != lost}
        save_weights(dict(open_weights(path)), "lost.tv.safetensors", header)
        with pytest.raises(ValueError, match="lost.tv.safetensors is damaged: its header does not have"):
            open_weights("lost.tv.safetensors")


def test_a_vector_that_moves_nothing_is_a_small_file_that_opens(files):
    base = open_weights("base.safetensors")
    plan = VectorPlan(base, None, {name: TensorSource.stored(base.entry(name)) for name in base})
    done = emit(plan, Path("none.tv.safetensors"), Origin(task="none"))
    assert done.norm == 0
    assert Path("none.tv.safetensors").stat().st_size < 100_000
    TaskVector({}, {}, dict.fromkeys(base, "frozen"), Origin(task="none")).save("saved.tv.safetensors")
    for path in (Path("none.tv.safetensors"), Path("saved.tv.safetensors")):
        vector = TaskVector.load(path)
        assert (vector.deltas, vector.buffers) == ({}, {})
        assert vector.untouched == dict.fromkeys(base, "frozen")
        found = inspect(path)
        assert (found.whole.tensors, found.whole.norm) == (0, 0)
        assert found.untouched == {"frozen": list(base)}
        assert verify_vector(path).holds
    assert Fingerprint.from_tensors({}).digest == read_metadata("none.tv.safetensors")[CONTENT]


def test_equal_infinities_have_no_delta_and_others_are_named(files):
    mask = torch.full((3, 3), -torch.inf).triu(1)
    nan = torch.tensor([torch.nan, 1.0])
    base = dict(open_weights("base.safetensors")) | {"mask": mask, "nan": nan}
    tuned = dict(open_weights("tuned.safetensors")) | {"mask": mask.clone(), "nan": nan.clone()}
    save_weights(base, "b.safetensors")
    save_weights(tuned, "t.safetensors")
    extract("b.safetensors", "t.safetensors", "x.tv.safetensors")
    between = TaskVector.between(base, tuned)
    between.save("y.tv.safetensors")
    for vector in (between, *(TaskVector.load(f"{name}.tv.safetensors") for name in "xy")):
        assert vector.untouched["mask"] == vector.untouched["nan"] == "frozen"
    edited = between.apply_to(base)
    assert torch.equal(edited["mask"], mask)
    tuned["mask"] = mask.clone()
    tuned["mask"][2, 0] = -torch.inf
    save_weights(tuned, "t.safetensors")
    for command in (
        lambda: TaskVector.between(base, tuned),
        lambda: extract("b.safetensors", "t.safetensors", "z.tv.safetensors"),
    ):
        with pytest.raises(ValueError, match="the deltas of 'mask' hold NaN or infinity"):
            command()
