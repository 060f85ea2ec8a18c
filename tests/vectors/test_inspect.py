"""Task vectors on disk: extracted bit for bit as in memory, inspected and compared against formulas in float64."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_adapters import adapted, net
from small_states import state

import tva.vectors.geometry
import tva.vectors.write
from tva import MismatchError, NoEffectError, TaskVector, fingerprint, open_weights, save_weights
from tva.checkpoints import open_finetuned, read_metadata
from tva.checkpoints.fingerprint import CONTENT, HEADER
from tva.checkpoints.stream_writer import LateHeaderFile
from tva.vectors.compare import compare
from tva.vectors.extract import extract
from tva.vectors.geometry import cosine_matrix, measure, norms_by_block, readers_of, sign_conflicts, total
from tva.vectors.inspect import inspect
from tva.vectors.lazy import short_paths

BASE, VECTOR = "base.safetensors", "a.tv.safetensors"


@pytest.fixture
def files(tmp_path):
    """A base, and fine-tuned checkpoints and vectors of three tasks, in the current folder."""
    save_weights(state(0), BASE)
    for seed, name in enumerate("abc", start=1):
        torch.save({"state_dict": {f"model.{key}": value for key, value in state(seed).items()}}, f"{name}.ckpt")
        TaskVector.between(state(0), state(seed)).save(f"{name}.tv.safetensors")
    return tmp_path


def assert_same_file(path, expected):
    """Tensors bit for bit, and the header but for what is measured by the clock or summed in another order."""
    found, wanted = open_weights(path), open_weights(expected)
    assert fingerprint(found) == fingerprint(wanted)
    headers = []
    for weights in (found, wanted):
        measured = ("tva.created", "tva.norm", "tva.header_fingerprint")  # which covers the two before
        header = {key: value for key, value in weights.metadata.items() if key not in measured}
        for key in ("tva.base_tensors", "tva.untouched", "tva.buffers"):
            header[key] = json.loads(header[key])
        headers.append(header)
    assert headers[0] == headers[1]
    assert float(found.metadata["tva.norm"]) == pytest.approx(float(wanted.metadata["tva.norm"]), rel=1e-5)


# --- extract


@pytest.mark.parametrize("piece", [7, 2**18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_extract_writes_bit_for_bit_what_between_and_save_write(monkeypatch, dtype, piece):
    monkeypatch.setattr(tva.vectors.write, "CHUNK", piece)
    save_weights(state(0, dtype), BASE)
    torch.save({"state_dict": {f"model.{name}": value for name, value in state(1, dtype).items()}}, "a.ckpt")
    base, output = BASE, VECTOR
    done = extract(base, "a.ckpt", output)
    expected = TaskVector.between(
        open_weights(base), state(1, dtype), origin=tva.Origin(task="a", weights="checkpoint")
    )
    expected.save("expected.safetensors")
    assert_same_file(output, Path("expected.safetensors"))
    assert (done.task, done.moved) == ("a", 7)
    assert done.untouched == {"frozen": 2, "integer": 1}
    assert (done.base, done.finetuned) == (expected.origin.base.digest, expected.origin.finetuned)
    assert "model." in done.notes[0]


def test_extract_takes_an_adapter_as_fine_tuned_model():
    adapted(Path("lora"), target_modules=["q", "k"])
    save_weights({name: value.bfloat16() for name, value in net().state_dict().items()}, BASE)
    base, output = BASE, "lora.tv.safetensors"
    extract(base, "lora", output, task="mine")
    weights = open_weights(base)
    expected = TaskVector.between(weights, open_finetuned("lora", weights))
    found = TaskVector.load(output)
    assert found.origin.task == "mine"
    assert set(found.deltas) == set(expected.deltas) == {"block.q.weight", "block.k.weight"}
    assert all(torch.equal(found.deltas[name], expected.deltas[name]) for name in expected.deltas)


def test_extract_refuses_what_makes_no_vector(files):
    with pytest.raises(NoEffectError, match="The two checkpoints are equal: none of their 10 tensors moved"):
        extract(BASE, BASE, "x.tv.safetensors")
    with pytest.raises(ValueError, match=r"must end in \.safetensors, best in \.tv\.safetensors; found 'x\.pt'"):
        extract(BASE, "a.ckpt", "x.pt")
    with pytest.raises(ValueError, match="finetuned must be a checkpoint, and b.tv.safetensors is a task vector file"):
        extract(BASE, "b.tv.safetensors", "x.tv.safetensors")
    with pytest.raises(ValueError, match="is what is given as base, .*, and would replace it"):
        extract(BASE, "a.ckpt", "./base.safetensors")
    with pytest.raises(ValueError, match="which='raw': a.ckpt does not hold both raw and averaged weights"):
        extract(BASE, "a.ckpt", "x.tv.safetensors", which="raw")
    with pytest.raises(FileNotFoundError, match="nothing is there"):
        extract(BASE, "missing.ckpt", "x.tv.safetensors")
    save_weights({"other": torch.ones(2)}, "other.safetensors")
    with pytest.raises(MismatchError, match="No single prefix makes the names match.*'other'"):
        extract(BASE, "other.safetensors", "x.tv.safetensors")
    save_weights({**state(1), "one": torch.tensor([math.nan])}, "bad.safetensors")
    with pytest.raises(ValueError, match="the deltas of 'one' hold NaN or infinity"):
        extract(BASE, "bad.safetensors", "x.tv.safetensors")
    assert not [path for path in files.iterdir() if path.name.startswith((".", "x"))]


# --- the sums behind everything


def reference(vectors):
    """Norms, cosines and conflicts by their formulas, of whole vectors in float64."""
    names = sorted({name for vector in vectors for name in vector.deltas})
    rows = []
    for vector in vectors:
        like = {name: next(v.deltas[name] for v in vectors if name in v.deltas) for name in names}
        parts = [vector.deltas.get(name, torch.zeros_like(like[name])) for name in names]
        rows.append(torch.cat([part.double().reshape(-1) for part in parts]))
    cosines = [[float(x @ y / (x.norm() * y.norm())) for y in rows] for x in rows]
    conflicts = [[float((x * y < 0).sum()) / float((x * y != 0).sum()) for y in rows] for x in rows]
    return [float(x.norm()) for x in rows], cosines, conflicts


def flat(matrix):
    return [value for row in matrix for value in row]


@pytest.mark.parametrize("piece", [5, 2**18])
def test_norms_cosines_and_conflicts_are_those_of_the_formulas(monkeypatch, piece):
    monkeypatch.setattr(tva.vectors.geometry, "CHUNK", piece)
    monkeypatch.setattr(tva.vectors.geometry, "LEAST_CHUNK", 1)
    vectors = [TaskVector.between(state(0), state(seed)) for seed in (1, 2, 3)]
    vectors[2].deltas.pop("l.0.w")  # frozen in one of them
    vectors[1].deltas["bias"][:10] = 0
    sums = total(measure([readers_of(vector) for vector in vectors], lambda name: name).values(), 3)
    norms, cosines, conflicts = reference(vectors)
    assert sums.norms() == pytest.approx(norms, rel=1e-12)
    assert flat(sums.cosines()) == pytest.approx(flat(cosines), abs=1e-12)
    assert flat(sums.conflicts()) == pytest.approx(flat(conflicts), abs=1e-12)
    assert sums.elements == sum(delta.numel() for delta in vectors[0].deltas.values())


def test_the_sums_are_those_of_the_values_in_memory():
    a, b = (TaskVector.between(state(0), state(seed)) for seed in (1, 2))
    assert cosine_matrix({"a": a, "b": b})["a"]["b"] == pytest.approx(a.cosine(b), rel=1e-12)
    assert sign_conflicts({"a": a, "b": a * -1.0})["a"]["b"] == 1.0
    blocks = norms_by_block(a)
    assert math.sqrt(sum(norm**2 for norm in blocks.values())) == pytest.approx(a.norm(), rel=1e-12)
    assert math.isnan(cosine_matrix({"a": a, "zero": a * 0.0})["a"]["zero"])


# --- inspect


def test_inspect_tells_header_norms_and_zeros(files):
    vector = TaskVector.between(state(0), state(1), origin=tva.Origin(task="a", step=7, metrics={"acc": 0.5}))
    vector.deltas["bias"][:5] = 0
    vector.save("v.tv.safetensors")
    found = inspect("v.tv.safetensors", by="tensor")
    assert found.kind == "task vector"
    assert (found.facts["task"], found.facts["step"], found.facts["metrics"]) == ("a", 7, {"acc": 0.5})
    assert found.facts["base"] == fingerprint(open_weights(BASE)).digest
    assert found.facts["encoding"] == "dense"
    assert found.whole.norm == pytest.approx(vector.norm(), rel=1e-12)
    assert found.groups["bias"].norm == pytest.approx(float(vector.deltas["bias"].norm()))
    assert found.groups["bias"].zeros == 0.2
    assert found.groups["l.0.w"].largest == float(vector.deltas["l.0.w"].abs().max())
    assert found.buffers.norm == pytest.approx(float(vector.buffers["bn.running_mean"].norm()))
    assert found.untouched == {"frozen": ["empty", "still"], "integer": ["steps"]}
    assert list(inspect("v.tv.safetensors").groups) == ["l.0", "l.1", "scalar", "one", "bias", "wide"]
    assert "l.0" in inspect("v.tv.safetensors", by="layer").groups


def test_inspect_reads_any_checkpoint_and_counts_what_is_not_finite(files):
    found = inspect("a.ckpt", by="tensor")
    assert found.facts["fingerprint"] == fingerprint(open_weights("a.ckpt")).digest
    assert found.groups["model.l.0.w"].norm == pytest.approx(float(state(1)["l.0.w"].norm()))
    assert found.untouched == {"integer": ["model.steps"]}
    save_weights({"w": torch.tensor([1.0, math.nan, -math.inf, 0.0])}, "bad.safetensors")
    row = inspect("bad.safetensors").whole
    assert (row.not_finite, row.zeros) == (2, 0.25)


def test_inspect_refuses_what_is_no_vector_and_no_checkpoint(files):
    Path("notes.txt").write_text("nothing")
    with pytest.raises(ValueError, match="notes.txt is not a checkpoint that tva reads"):
        inspect("notes.txt")
    Path("cut.tv.safetensors").write_bytes(Path(VECTOR).read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged or cut off"):
        inspect("cut.tv.safetensors")
    with pytest.raises(ValueError, match="by must be one of group, layer, tensor; found 'module'"):
        inspect(VECTOR, by="module")


# --- compare


def test_compare_gives_the_in_memory_numbers_from_files_and_checkpoints_alike(files):
    vectors = [TaskVector.load(f"{name}.tv.safetensors") for name in "abc"]
    norms, cosines, conflicts = reference(vectors)
    for given, base in (([f"{n}.tv.safetensors" for n in "abc"], None), (["a.ckpt", "b.tv.safetensors", "c.ckpt"], 1)):
        found = compare(given, BASE if base else None, by="layer")
        assert list(found.names.values()) == given
        assert found.base == vectors[0].origin.base.digest
        assert found.whole.norms == pytest.approx(norms, rel=1e-12)
        assert flat(found.whole.cosines) == pytest.approx(flat(cosines), abs=1e-12)
        assert flat(found.whole.conflicts) == pytest.approx(flat(conflicts), abs=1e-12)
        a, b = (vector.deltas["l.0.w"].double().reshape(-1) for vector in vectors[:2])
        assert found.groups["l.0"].cosines[0][1] == pytest.approx(float(a @ b / (a.norm() * b.norm())))


def test_compare_names_vectors_by_task_or_by_what_differs_in_their_paths(files):
    assert list(compare([VECTOR, "b.tv.safetensors"]).names) == ["a", "b"]
    for name in "ab":
        extract(BASE, f"{name}.ckpt", f"{name}.tv.safetensors", task=f"task {name}")
    assert list(compare([VECTOR, "b.tv.safetensors"]).names) == ["task a", "task b"]
    assert short_paths(["x/seed=0/last.tv.safetensors", "x/seed=1/last.tv.safetensors"]) == ["seed=0", "seed=1"]
    assert short_paths(["a.ckpt", "a/b.ckpt"]) == ["a.ckpt", "a/b.ckpt"]


def test_compare_refuses_other_bases_architectures_and_single_vectors(files):
    TaskVector.between(state(5), state(1)).save("other.tv.safetensors")
    with pytest.raises(
        MismatchError, match="comes from base .* and other.tv.safetensors from base .*: 8 of 10 tensors"
    ):
        compare([VECTOR, "other.tv.safetensors"])
    assert compare([VECTOR, "other.tv.safetensors"], allow_other_base=True).base is None
    few = {"x": torch.zeros(2)}
    TaskVector.between(few, {"x": torch.ones(2)}).save("few.tv.safetensors")
    with pytest.raises(MismatchError, match="11 of 11 tensors differ"):
        compare([VECTOR, "few.tv.safetensors"])
    with pytest.raises(MismatchError, match="other.tv.safetensors was taken from the base .* --allow_other_base"):
        compare(["a.ckpt", "other.tv.safetensors"], base=BASE)
    TaskVector({"w": torch.ones(2)}).save("small.tv.safetensors")
    with pytest.raises(
        MismatchError, match="must be of one architecture to be compared, but small.tv.safetensors lacks"
    ):
        compare([VECTOR, "small.tv.safetensors"])
    with pytest.raises(ValueError, match=r"a.ckpt is a checkpoint \(.*\), not a task vector file. Give its base"):
        compare(["a.ckpt", "b.tv.safetensors"])
    with pytest.raises(ValueError, match="Give at least two vectors to compare; got 1"):
        compare([VECTOR])


def test_a_vector_of_another_shape_is_refused():
    parts = [readers_of(TaskVector({"w": torch.ones(n)})) for n in (2, 3)]
    with pytest.raises(MismatchError, match="same shapes to be compared, but 'w' has 2, 3 elements"):
        measure(parts)


def test_not_a_number_is_said_and_not_averaged_away(files):
    bad = TaskVector.load(VECTOR)
    bad.deltas["one"][0] = math.nan
    header = {key: text for key, text in read_metadata(VECTOR).items() if key not in (CONTENT, HEADER)}
    save_weights({**bad.deltas, **bad.buffers}, "bad.tv.safetensors", header)
    found = compare(["bad.tv.safetensors", "b.tv.safetensors"])
    assert found.not_finite == ["bad"]
    assert math.isnan(found.whole.cosines[0][1])


def test_a_slow_disk_gets_every_chunk_as_it_was_computed(monkeypatch):
    store = LateHeaderFile._store

    def slowly(self, data, offset):
        time.sleep(0.02)
        store(self, data, offset)

    monkeypatch.setattr(LateHeaderFile, "_store", slowly)
    monkeypatch.setattr(tva.vectors.write, "CHUNK", 100)
    torch.manual_seed(0)
    base = {"w": torch.randn(805), "d": torch.randn(301, dtype=torch.float64)}
    tuned = {name: tensor + torch.randn_like(tensor) for name, tensor in base.items()}
    tuned["w"][200:400] = base["w"][200:400]  # two pieces are skipped
    for name, weights in (("base", base), ("tuned", tuned)):
        save_weights(weights, f"{name}.safetensors")
    extract(*(f"{name}.safetensors" for name in ("base", "tuned", "x.tv")))
    deltas = TaskVector.load("x.tv.safetensors").deltas
    for name in base:
        assert torch.equal(deltas[name], tuned[name] - base[name])


MEMORY = """
import re, sys, threading
from pathlib import Path
import torch
from tva.vectors import {function} as function
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
torch.ones(4, 4) @ torch.ones(4, 4)
before, most, done = anonymous(), 0, threading.Event()
def sample():
    global most
    while not done.wait(0.002):
        most = max(most, anonymous())
thread = threading.Thread(target=sample)
thread.start()
{call}
done.set()
thread.join()
print(most - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("extract", 'function("base.safetensors", "a.safetensors", "x.tv.safetensors")'),
        ("compare", 'function(["a.safetensors", "b.safetensors"], "base.safetensors", by="layer")'),
        ("inspect", 'function("a.safetensors")'),
    ],
)
def test_memory_is_bounded_whatever_the_size(tmp_path, function, call):
    for seed, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        save_weights(
            {f"l.{i}.w": torch.randn(2**23, generator=generator) for i in range(3)}, tmp_path / f"{name}.safetensors"
        )
    code = MEMORY.format(function=function, call=call)
    # By itself glibc keeps freed pieces to use them again, by chance up to 33 MiB of them; with a fixed threshold it
    # gives each back, and what is measured is what the function holds.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 16, "MiB; one of the nine tensors takes 32"


def test_the_cosine_of_a_vector_with_itself_is_one_whatever_its_norm():
    for value in torch.rand(200, generator=torch.Generator().manual_seed(0)).tolist():
        vector = TaskVector({"w": torch.tensor([value, 2 * value, 3 * value])})
        assert cosine_matrix({"a": vector})["a"]["a"] == 1.0


def test_a_buffer_that_only_the_header_has_is_damage():
    base = {"w": torch.zeros(2), "running_mean": torch.zeros(2)}
    TaskVector.between(base, {name: tensor + 1 for name, tensor in base.items()}).save("v.tv.safetensors")
    data = Path("v.tv.safetensors").read_bytes()
    Path("v.tv.safetensors").write_bytes(data.replace(b'"running_mean":{', b'"running_meao":{', 1))
    with pytest.raises(ValueError, match="v.tv.safetensors is damaged: its header lists the buffers 'running_mean'"):
        inspect("v.tv.safetensors")
