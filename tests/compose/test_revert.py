"""`tva revert` as a user runs it: the base comes back bit for bit, or nothing is written and the reason said."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_cli import run
from small_memory import assert_within
from small_models import LinearNet

from tva import TaskVector, fingerprint, open_weights, save_weights
from tva.checkpoints import read_metadata
from tva.compose.apply import compose
from tva.compose.revert import revert
from tva.compose.undo import decode, encode
from tva.compose.verify import verify

OUT, BASE, UNDO = "out.safetensors", "base.safetensors", "out.undo.safetensors"

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def state(seed, dtype=torch.float32, spread=1.0):
    generator = torch.Generator().manual_seed(0)
    moves = torch.Generator().manual_seed(seed)
    shapes = {"l.0.w": (40, 30), "l.1.w": (25, 40), "scalar": (), "empty": (0, 3), "bias": (25,)}
    tensors = {
        name: (torch.randn(shape, generator=generator) + spread * seed * torch.randn(shape, generator=moves)).to(dtype)
        for name, shape in shapes.items()
    }
    tensors |= {"bn.running_mean": torch.randn(3, generator=generator), "steps": torch.tensor(seed)}
    return {**tensors, "mask": torch.tensor([True, False]), "still": torch.tensor([0.0, -0.0, 1e-45]).to(dtype)}


def make(dtype=torch.float32, spread=0.01):
    base = state(0, dtype)
    save_weights(base, BASE, {"format": "pt", "note": "the base's own header"})
    save_weights(state(1, dtype, spread), "a.safetensors")
    for seed, name in ((2, "b"), (3, "c")):
        TaskVector.between(base, state(seed, dtype, spread)).save(f"{name}.tv.safetensors")


@pytest.fixture
def folder(tmp_path):
    make()
    return tmp_path


VECTORS = ["--vectors.a", "a.safetensors", "--vectors.b", "b.tv.safetensors", "--vectors.c", "c.tv.safetensors"]


def write(recipe="-0.7 * b", *options, output=OUT, keep="true"):
    words = ["compose", "--base", BASE, *VECTORS, "--recipe", recipe, "--output", output]
    assert run(*words, f"--keep_undo={keep}", *options) == 0


def files(folder="."):
    return sorted(os.listdir(folder))


def undo(edited=OUT, output="again.safetensors", **options):
    return revert(edited, output=output, **options)


def assert_base_is_back(path="again.safetensors", base=BASE):
    assert fingerprint(open_weights(path)) == fingerprint(open_weights(base))
    assert list(open_weights(path)) == list(open_weights(base))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64, torch.complex128, torch.int8, torch.bool])
def test_any_tensor_comes_back_from_any_prediction(dtype):
    generator = torch.Generator().manual_seed(0)
    bits = [torch.randint(0, 256, (1000 * dtype.itemsize,), dtype=torch.uint8, generator=generator) for _ in range(2)]
    for length in (0, 1, 7, 1000):
        if dtype == torch.bool:
            original, predicted = (part[:length] > 100 for part in bits)
        else:
            original, predicted = (part[: length * dtype.itemsize].view(dtype) for part in bits)
        data = encode(original, predicted)
        back = decode(data, predicted) if data else predicted
        assert torch.equal(back.view(torch.uint8), original.view(torch.uint8))
    assert encode(original, original) == b""


def test_small_edits_take_little():
    base = torch.randn(2**16, generator=torch.Generator().manual_seed(0)).bfloat16()
    sizes = [len(encode(base, (base.float() * (1 + change)).bfloat16())) / base.nbytes for change in (0.001, 0.01, 0.1)]
    assert sizes == sorted(sizes)
    assert sizes[0] < 0.15
    assert sizes[2] < 0.45  # 16 random bits would be all of it


@pytest.mark.parametrize("keep", ["true", "with_vectors"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("output", [OUT, "out"])
def test_the_base_comes_back_bit_for_bit(capsys, keep, dtype, output):
    make(dtype)
    recipe = "0.8 * ties(b, c, density=0.3) - dare(b, drop=0.5)"
    write(recipe if keep == "with_vectors" else f"{recipe} + a", "--max_shard_size", "5KB", output=output, keep=keep)
    undo = "out/undo.safetensors" if output == "out" else UNDO
    assert f"wrote {undo}: {os.path.getsize(undo):,} bytes" in capsys.readouterr().out
    assert fingerprint(open_weights(output)) != fingerprint(open_weights(BASE))
    if keep == "true":
        for name in ("base", "a", "b.tv", "c.tv"):
            os.rename(f"{name}.safetensors", f"{name}.gone")
    back = "again.safetensors" if output == "out" else "again"
    assert run("revert", output, "--output", back, "--max_shard_size", "6KB") == 0
    assert "which is the fingerprint recorded of the base" in capsys.readouterr().out
    if keep == "true":
        os.rename("base.gone", BASE)
    assert_base_is_back(back)
    assert read_metadata(back)["note"] == "the base's own header"
    assert not [name for name in files() if name.startswith(".")]


@pytest.mark.parametrize("keep", ["true", "with_vectors"])
@pytest.mark.parametrize(("before", "after"), [(a, b) for a in DTYPES for b in DTYPES if a != b])
def test_the_base_comes_back_from_another_dtype(keep, before, after):
    make(before)
    write("b - 0.5 * c", "--dtype", str(after)[6:], keep=keep)
    undo()
    assert_base_is_back()


def test_coefficient_zero_takes_no_more_than_a_header(folder):
    write("b", "--scaling_coef", "0")
    assert not open_weights(UNDO)
    undo()
    assert_base_is_back()


def test_with_vectors_it_is_small_and_needs_them(folder, capsys):
    write("-0.7 * b + 0.1 * c")
    alone = os.path.getsize(UNDO) - header_length(UNDO)
    write("-0.7 * b + 0.1 * c", keep="with_vectors")
    assert os.path.getsize(UNDO) - header_length(UNDO) < alone / 5
    os.mkdir("moved")
    os.rename("b.tv.safetensors", "moved/b.tv.safetensors")
    with pytest.raises(
        FileNotFoundError, match=r"was made from b.tv.safetensors, and nothing is .* give --vectors.b PA"
    ):
        undo()
    with pytest.raises(ValueError, match=r"cannot be restored with other vectors: b is .*, and .* was recorded"):
        undo(vectors={"b": "c.tv.safetensors"})
    undo(vectors={"b": "moved/b.tv.safetensors"})
    assert_base_is_back()
    with pytest.raises(ValueError, match=r"needs task vector files, and 'a' are fine-tuned checkpoints"):
        compose(BASE, {"a": "a.safetensors"}, "a", "no.safetensors", keep_undo="with_vectors")
    assert "no.safetensors" not in files()


def header_length(path):
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


@pytest.mark.parametrize("keep", [True, "with_vectors"])
@pytest.mark.parametrize("untied", [False, True])
def test_tied_weights_come_back_tied(keep, untied):
    base = {"emb.weight": torch.randn(30, 8), "w": torch.randn(5)}
    tuned = {name: tensor + 0.5 for name, tensor in base.items()}
    torch.save({**base, "head.weight": base["emb.weight"]}, "base.bin")
    head = tuned["emb.weight"] + (1.0 if untied else 0.0)
    TaskVector.between({**base, "head.weight": base["emb.weight"]}, {**tuned, "head.weight": head}).save(
        "a.tv.safetensors"
    )
    compose("base.bin", {"a": "a.tv.safetensors"}, "0.3 * a", OUT, keep_undo=keep)
    undo()
    assert_base_is_back(base="base.bin")
    assert open_weights("again.safetensors").ties() == {"head.weight": "emb.weight"}


def test_a_strided_base_comes_back_in_blocks(monkeypatch):
    monkeypatch.setattr("tva.compose.engine.CHUNK", 64)
    base = {"w": torch.randn(40, 30).T, "v": torch.randn(7)}
    torch.save(base, "base.pt")
    save_weights({name: tensor + 0.01 for name, tensor in base.items()}, "a.safetensors")
    compose("base.pt", {"a": "a.safetensors"}, "a", OUT, keep_undo=True)
    assert "w@1152" in open_weights(UNDO)
    undo()
    assert_base_is_back(base="base.pt")


def test_a_folder_gets_back_the_configuration_of_its_base(folder):
    os.mkdir("base")
    os.rename(BASE, "base/model.safetensors")
    config = '{"model_type": "x",\n  "torch_dtype": "float32"}'
    with open("base/config.json", "w") as file:
        file.write(config)
    compose("base", {"b": "b.tv.safetensors"}, "b", "out", dtype="bfloat16", max_shard_size="2KB", keep_undo=True)
    with open("out/config.json") as file:
        assert json.load(file)["torch_dtype"] == "bfloat16"
    assert verify("out").holds
    revert("out", output="again")
    assert files("again") == ["config.json", "model.safetensors"]
    with open("again/config.json") as file:
        assert file.read() == config
    assert_base_is_back("again", "base")


def test_an_edit_of_an_edit_is_undone_step_by_step(folder):
    write("b", output="one.safetensors")
    compose("one.safetensors", {"a": "a.safetensors"}, "a", "two.safetensors", keep_undo=True)
    os.rename("one.safetensors", "one.gone")
    revert("two.safetensors", output="one.safetensors")
    assert verify("one.safetensors").holds  # its record came back with it
    revert("one.safetensors", output="zero.safetensors")
    assert_base_is_back("zero.safetensors")


# --- what cannot be undone, and why


def test_another_edits_undo_file_is_refused(folder):
    write("b")
    os.rename(UNDO, "other.undo.safetensors")
    write("0.5 * b")
    with pytest.raises(ValueError, match=r"other.undo.safetensors undoes another edit: .* Give the undo file of this"):
        undo(undo="other.undo.safetensors")
    with pytest.raises(ValueError, match="base.safetensors is not an undo file"):
        undo(undo=BASE)
    save_weights({"w": torch.ones(2)}, "plain.safetensors")
    with pytest.raises(ValueError, match=r"is for a checkpoint of other names than .*plain.safetensors: 'bias'"):
        undo("plain.safetensors", undo=UNDO)
    assert "again.safetensors" not in files()


def test_an_edited_file_that_changed_since_is_refused(folder):
    write("b")
    weights, header = dict(open_weights(OUT)), read_metadata(OUT)
    save_weights(weights, OUT)  # written again without its header: nothing is lost
    undo()
    assert_base_is_back()
    weights["bias"][3] += 0.5
    save_weights(weights, OUT, header)
    before = files()
    with pytest.raises(ValueError, match=r"out.safetensors was changed after the edit: .* nothing was written"):
        undo(output="third.safetensors")
    assert files() == before


def test_a_field_of_another_form_in_an_undo_file_is_refused(folder):
    write("b")
    with safe_open(UNDO, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    for value in ("[" * 100_000, "1", "null"):
        save_file(tensors, UNDO, {**metadata, "tva.undo_with_vectors": value})
        with pytest.raises(ValueError, match=r"out.undo.safetensors.*tva.undo_with_vectors"):
            undo()


def test_a_damaged_undo_file_is_refused(folder):
    write("b")
    path, length = UNDO, os.path.getsize(UNDO)
    before, start = files(), header_length(UNDO)
    with open(path, "rb") as file:
        whole = file.read()
    for position in (start, start + 30, (start + length) // 2, length - 1):
        broken = bytearray(whole)
        broken[position] ^= 0x10
        with open(path, "wb") as file:
            file.write(broken)
        with pytest.raises(ValueError, match=r"out.undo.safetensors is damaged: what it stores of '.*' cannot be read"):
            undo()
        assert files() == before
    with open(path, "wb") as file:
        file.write(whole[: length // 2])
    with pytest.raises(ValueError, match=r"out.undo.safetensors is not a safetensors file, or is damaged or cut off"):
        undo()


def test_a_block_that_is_missing_is_noticed_by_the_fingerprint(folder):
    write("b")
    blocks = dict(open_weights(UNDO))
    del blocks["l.0.w@0"]
    save_weights(blocks, UNDO, read_metadata(UNDO))
    with pytest.raises(ValueError, match=r"What was restored is .*, and the base was .*: nothing was written"):
        undo()
    assert "again.safetensors" not in files()


def test_without_an_undo_file_it_is_said_where_the_base_is(folder, capsys):
    write("b", keep="false")
    assert files().count(UNDO) == 0
    assert run("revert", OUT, "--output", "again.safetensors") == 2  # nobody's but the user's now
    text = capsys.readouterr().err
    assert "the base itself is still at base.safetensors, with the recorded fingerprint" in text
    assert "copy it" in text
    save_weights(dict(open_weights("a.safetensors")), BASE)
    with pytest.raises(FileNotFoundError, match=r"at base.safetensors, where it was, is another one, .* --keep_undo"):
        undo()
    os.remove(BASE)
    with pytest.raises(FileNotFoundError, match=r"Give it by --undo if .* base.safetensors, where it was, is nothing"):
        undo()
    with pytest.raises(ValueError, match="a.safetensors holds no record of an edit"):
        undo("a.safetensors")
    with pytest.raises(FileNotFoundError, match="nothing is there"):
        undo("nothing.safetensors")


# --- whole or not at all


@pytest.mark.parametrize("stop", [1, 2])
def test_an_edit_and_its_undo_file_take_the_place_of_older_ones_together(folder, monkeypatch, stop):
    compose(BASE, {"c": "c.tv.safetensors"}, "c", OUT, keep_undo=True)
    older = Path(OUT).read_bytes()
    replaced = []

    def stopped(source, target, replace=os.replace):
        replaced.append(os.fspath(target))
        if len(replaced) == stop:
            raise OSError(errno.EIO, "the power went")
        replace(source, target)

    monkeypatch.setattr(os, "replace", stopped)
    words = (BASE, {"b": "b.tv.safetensors"}, "b", OUT)
    with pytest.raises(OSError, match="the power went"):
        compose(*words, keep_undo=True)
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert replaced == [OUT, UNDO][:stop]
    assert (Path(OUT).read_bytes() == older) == (stop == 1)
    undo(output="between.safetensors")  # of whichever edit is there
    assert_base_is_back("between.safetensors")
    assert compose(*words, keep_undo=True, resume=True).resumed == (9 if stop == 1 else 0)
    undo()
    assert_base_is_back()
    assert not [name for name in files() if name.startswith(".")]


@pytest.mark.parametrize("output", [OUT, "out"])
def test_a_full_disk_leaves_neither(folder, monkeypatch, output):
    def full(self, data, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    words = (BASE, {"b": "b.tv.safetensors"}, "b", output)
    monkeypatch.setattr("tva.compose.undo.UndoFile._write_all", full)
    with pytest.raises(OSError, match="No space left on device; the completed part is kept"):
        compose(*words, keep_undo=True)
    assert not {"out", OUT, UNDO, ".out.undo.safetensors.partial"} & set(files())
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert compose(*words, keep_undo=True, resume=True).resumed == 9
    revert(output, output="again.safetensors")
    assert_base_is_back()


def test_revert_goes_on_where_it_stopped(folder, monkeypatch):
    write("b - c", keep="with_vectors")
    writes = []

    def full(file, data, offset, write=os.pwrite):
        writes.append(len(data))
        if len(writes) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="run again with resume to continue"):
        undo()
    assert "again.safetensors" not in files()
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    for _ in range(2):  # the second time it was whole
        assert run("revert", OUT, "--output", "again.safetensors", "--resume") == 0
        assert not [name for name in files() if name.startswith(".")]
        Path(".again.safetensors.journal").touch()  # as if the run was killed before it removed that
        assert_base_is_back()
    assert run("revert", OUT, "--output", "again.safetensors") == 2  # nobody's but the user's now
    Path("again.safetensors").write_bytes(Path("a.safetensors").read_bytes())
    assert run("revert", OUT, "--output", "again.safetensors", "--resume") == 2


def test_too_little_memory_is_refused(folder):
    write("b")
    with pytest.raises(ValueError, match="max_memory must be .*MiB or more"):
        undo(max_memory="1MiB")
    with pytest.raises(ValueError, match="max_memory must be .*MiB or more"):
        compose(BASE, {"b": "b.tv.safetensors"}, "b", "o.safetensors", max_memory="1MiB", keep_undo=True)


@pytest.mark.slow
def test_the_memory_measured_stays_within_the_memory_stated():
    generator = torch.Generator().manual_seed(0)
    base = {f"h.{i}.w": torch.randn(2000, 5000, generator=generator) for i in range(2)}
    save_weights(base, BASE)
    moved = {key: tensor + 0.01 * torch.randn(2000, 5000, generator=generator) for key, tensor in base.items()}
    TaskVector.between(base, moved).save("a.tv.safetensors")
    calls = """
compose("base.safetensors", {"a": "a.tv.safetensors"}, "-0.5 * a", "%s.safetensors", keep_undo=%s, max_memory=memory)
assert verify("%s.safetensors", max_memory=memory).holds
revert("%s.safetensors", output="%s-again.safetensors", max_memory=memory)
"""
    for name, keep in (("alone", True), ("with_vectors", "with_vectors")):
        assert_within(Path(), 70, *(calls % (name, repr(keep), *[name] * 3)).strip().splitlines(), first="import torch")


# --- what `tva edit` writes


def test_an_edit_by_data_is_undone_too():
    base = LinearNet().state_dict()
    save_weights(base, BASE)
    save_weights({name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in base.items()}, "a.safetensors")
    trainer = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    config = {
        "trainer": trainer,
        "model": {"class_path": "small_models.LinearNet"},
        "vectors": {"a": "a.safetensors"},
        "recipe": "a",
        "output": "edited",
        "scaling_coef": 0.5,
        "targets": {"blobs": {"class_path": "small_models.Blobs", "init_args": {"seed": 1}}},
    }
    with open("edit.yaml", "w") as file:
        json.dump(config, file)
    assert run("edit", "--config", "edit.yaml", "--keep_undo", "true") == 0
    assert "edited.undo.safetensors" in files("edited")
    assert run("verify", "edited", "--base", BASE) == 0
    os.remove(BASE)
    assert run("revert", "edited", "--output", "again.safetensors") == 0
    assert fingerprint(open_weights("again.safetensors")) == fingerprint(base)
    assert run("edit", "--config", "edit.yaml") == 0
    assert "edited.undo.safetensors" not in files("edited")
