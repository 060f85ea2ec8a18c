"""`tva verify` as a user runs it: what was written is what its record says, or else what has changed."""

import json
from pathlib import Path

import numpy
import pytest
import torch
from small_cli import run
from small_models import Blobs, LinearNet, quiet_trainer
from small_states import plain_state as state

from tva import TaskVector, open_weights, save_weights
from tva.checkpoints import HashedWeights, fingerprint, read_metadata
from tva.checkpoints.fingerprint import HEADER, header_digest, sealed
from tva.compose.apply import compose
from tva.compose.record import RECORD, Record
from tva.compose.revert import revert
from tva.compose.verify import verify
from tva.edit.options import EditOptions
from tva.edit.run import run_edit

OUT, BASE = "out.safetensors", "base.safetensors"


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def folder(request, tmp_path):
    """A folder to work in: a base, a fine-tuned checkpoint, a task vector file and a file of statistics."""
    base = state(0, request.param)
    save_weights(base, BASE)
    torch.save({"state_dict": state(1, request.param)}, "a.ckpt")
    TaskVector.between(base, state(2, request.param)).save("b.tv.safetensors")
    names = ("l.0.w", "l.1.w", "scalar", "empty", "bias")
    save_weights({name: torch.rand(base[name].shape) for name in names}, "fisher.safetensors")
    return tmp_path


VECTORS = ["--vectors.a", "a.ckpt", "--vectors.b", "b.tv.safetensors"]


def write(recipe, output=OUT, *options):
    assert run("compose", "--base", BASE, *VECTORS, "--recipe", recipe, "--output", output, *options) == 0


def replace(path, change, **metadata):
    """Write a checkpoint or a vector again, as another program would that changes one thing and its header."""
    weights, header = dict(open_weights(path)), {**read_metadata(path), **metadata}
    change(weights)
    if HEADER in header:
        header = sealed(header, fingerprint(weights).digest)
    elif RECORD in header:
        fields = {key: text for key, text in header.items() if key.removeprefix("tva.") in Record.__dataclass_fields__}
        header[RECORD] = header_digest(fields)
    save_weights(weights, path, header)


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("0.5 * (a - b)", []),
        ("s * a", ["--coefs", '{"s": {"layer": [0.1, 0.7], ".*": 0.3}}', "--dtype", "float16"]),
        ("ties(dare(a, drop=0.5), b, density=0.3)", ["--scaling_coef", "0.3"]),
        ('fisher(b, files=("fisher.safetensors",)) + tsv(a, b)', ["--max_shard_size", "5KB"]),
    ],
)
@pytest.mark.parametrize("output", [OUT, "out"])
def test_what_compose_wrote_is_verified_and_nothing_is_written(folder, capsys, recipe, options, output):
    write(recipe, output, *options)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capsys.readouterr()
    assert run("verify", output) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"verified: {output} is base + ")
    assert "the base, every other input and the stored weights have the recorded fingerprints" in text
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_fingerprints_of_inputs_are_recorded_and_are_those_of_their_files(folder):
    write('fisher(b, files=("fisher.safetensors",)) + a')
    record = Record.read(open_weights(OUT))
    for path, digest in {
        BASE: record.base_fingerprint,
        OUT: record.edited_fingerprint,
        "a.ckpt": record.vector_fingerprints["a"],
        "b.tv.safetensors": record.vector_fingerprints["b"],
        "fisher.safetensors": record.file_fingerprints["fisher.safetensors"],
    }.items():
        assert fingerprint(open_weights(path)).digest == digest, path


def test_elements_are_hashed_once_whatever_is_read_first(folder):
    weights = open_weights(BASE)
    hashed = HashedWeights(weights)
    hashed.slice("l.0.w", 0, 7)
    hashed.slice("l.0.w", 100, 200)  # not in order: read again in the end
    hashed.slice("l.0.w", 3, 20)
    _ = hashed["l.1.w"], hashed["l.1.w"]
    hashed.entry("bias").read_into(numpy.empty(5 * weights.spec("bias").itemsize, numpy.uint8), 0)
    assert hashed.fingerprint() == fingerprint(weights)


def test_weights_changed_after_the_edit_are_distinguished_from_changed_inputs(folder, capsys):
    write("0.5 * (a + b)")
    replace(OUT, lambda weights: weights["bias"][3].add_(0.25))
    assert run("verify", OUT) == 1
    text = capsys.readouterr().out
    assert "NOT verified" in text
    assert "1 of 7 tensors differ: 'bias'; largest difference 0.25, in 'bias'" in text
    assert "stored weights: " in text
    assert "changed after the edit" in text
    assert "another one, or changed since" not in text

    write("0.5 * (a + b)")
    replace("b.tv.safetensors", lambda weights: weights["l.0.w"].mul_(2))
    capsys.readouterr()
    assert run("verify", OUT, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert list(found["different"]) == ["l.0.w"]
    assert list(found["changed"]) == ["vector b"]
    assert found["changed"]["vector b"]["found"] == fingerprint(open_weights("b.tv.safetensors")).digest


@pytest.mark.parametrize("changed", ["base", "fisher", "unused"])
def test_every_input_counts_even_where_the_result_is_the_same(folder, capsys, changed):
    write('0.5 * fisher(b, files=("fisher.safetensors",))')
    if changed == "base":
        replace(BASE, lambda weights: weights["bias"].add_(1))
        message = "base: "
    elif changed == "fisher":
        replace("fisher.safetensors", lambda weights: weights["bias"].add_(1))
        message = "file fisher.safetensors: "
    else:  # statistics of the vector, which the edit leaves out
        replace("b.tv.safetensors", lambda weights: weights["bn.running_mean"].add_(1))
        message = "no tensor differs from what the inputs give\nvector b: "
    capsys.readouterr()
    assert run("verify", OUT) == 1
    text = capsys.readouterr().out
    assert message in text
    assert "another one, or changed since" in text


def test_names_dtypes_and_shapes_count(folder):
    write("a")
    replace(OUT, lambda weights: weights.update(more=torch.ones(2), bias=weights["bias"].double()))
    report = verify(OUT)
    assert sorted(report.different) == ["bias", "more"]
    replace(OUT, lambda weights: weights.pop("scalar"))
    assert "scalar" in verify(OUT).different
    assert "largest difference nan" in str(verify(OUT))


def test_a_program_that_computes_otherwise_is_named(folder, capsys):
    write("0.5 * a")
    replace(OUT, lambda weights: weights["bias"].add_(1))
    other = fingerprint(open_weights(OUT)).digest
    header = {"tva.edited_fingerprint": other, "tva.version": "0.0.1"}  # as an older version might have written it
    replace(OUT, lambda weights: None, **header)
    capsys.readouterr()
    assert run("verify", OUT) == 1
    assert "what computes is another. It was written by tva 0.0.1 with torch" in capsys.readouterr().out


def test_inputs_that_moved_are_given(folder, capsys):
    write("0.5 * (a + b)")
    Path("moved").mkdir()
    for name in (BASE, "a.ckpt"):
        Path(name).rename(f"moved/{name}")
    with pytest.raises(FileNotFoundError, match=r"was made from base.safetensors, and nothing is there.*give --base"):
        verify(OUT)
    with pytest.raises(FileNotFoundError, match=r"was made from a.ckpt, and nothing is there.*give --vectors.a PATH"):
        verify(OUT, base="moved/base.safetensors")
    with pytest.raises(ValueError, match=r"--vectors.c is not an input of out.safetensors; its inputs are --base"):
        verify(OUT, base="moved/base.safetensors", vectors={"c": "moved/a.ckpt"})
    capsys.readouterr()
    assert run("verify", OUT, "--base", "moved/base.safetensors", "--vectors.a", "moved/a.ckpt") == 0


def test_a_file_of_statistics_that_is_gone_is_named(folder):
    write('fisher(b, files=("fisher.safetensors",))')
    Path("fisher.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"fisher.safetensors.*The recipe of out.safetensors reads it"):
        verify(OUT)


def test_a_checkpoint_without_a_record_is_refused(folder):
    with pytest.raises(
        ValueError, match=r"base.safetensors holds no record of an edit: .*lacks tva.base, .*tva compose"
    ):
        verify(BASE)
    with pytest.raises(FileNotFoundError, match="nothing is there"):
        verify("nothing.safetensors")
    write("a")
    header = {key: text for key, text in read_metadata(OUT).items() if "tor" not in key}
    header["tva.vectors"] = '{"a": "a.ckpt"}'
    save_weights(dict(open_weights(OUT)), "lost.safetensors", header)
    with pytest.raises(ValueError, match="lost.safetensors holds a record of an edit that is not as it was written"):
        verify("lost.safetensors")
    del header["tva.record_fingerprint"]  # from before the fingerprints of inputs and of the record were recorded
    save_weights(dict(open_weights(OUT)), "old.safetensors", header)
    report = verify("old.safetensors")
    assert not report.different
    assert not report.changed
    assert not report.holds  # what was not recorded is not verified
    assert report.unrecorded == ["the record", "vector a"]
    assert "no fingerprint was recorded of the record, vector a" in str(report)


@pytest.mark.parametrize("lost", ["tva.vector_fingerprints", "tva.file_fingerprints"])
def test_a_record_that_lost_a_field_or_had_it_changed_is_refused(folder, lost):
    write("a")
    header, weights = read_metadata(OUT), dict(open_weights(OUT))
    for changed in ({**header, lost: "{}"}, {key: text for key, text in header.items() if key != lost}):
        if changed != header:
            save_weights(weights, "changed.safetensors", changed)
            with pytest.raises(ValueError, match="is not as it was written: its fields do not have the recorded"):
                verify("changed.safetensors")


def test_shards_of_different_edits_hold_no_common_record(folder):
    for output, coef in (("out", "1"), ("other", "2")):
        write("a", output, "--max_shard_size", "2KB", "--scaling_coef", coef)
    shards = sorted(path.name for path in Path("out").glob("*.safetensors"))
    Path(f"other/{shards[0]}").replace(f"out/{shards[0]}")
    with pytest.raises(ValueError, match="lacks tva.edited_fingerprint, tva.scaling_coef"):
        verify("out")


def test_raw_and_averaged_weights_are_distinguished():
    save_weights({"w": torch.zeros(4)}, BASE)
    averaged, raw = {"w": torch.ones(4)}, {"w": torch.full((4,), 2.0)}
    state = {"averaging_state": {"n_averaged": torch.tensor(3)}, "current_model_state": raw}
    torch.save({"state_dict": averaged, **state}, "a.ckpt")
    for which in ("raw", "averaged"):
        compose(BASE, {"a": "a.ckpt"}, "a", f"{which}.safetensors", which=which)
        assert verify(f"{which}.safetensors").holds


def test_memory_is_bounded(folder):
    write("a")
    with pytest.raises(ValueError, match="max_memory must be .*MiB or more"):
        verify(OUT, max_memory="1MiB")


# --- what `tva edit` writes


class NormNet(LinearNet):
    """Has BatchNorm statistics."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(2)

    def forward(self, inputs):
        return self.norm(super().forward(inputs))


def edit(**options):
    asked = EditOptions(output="edited", targets={"blobs": Blobs(1)}, scaling_coef=0.5, **options)
    return run_edit(quiet_trainer(), NormNet(), asked)


@pytest.fixture
def trained():
    base = NormNet().state_dict()
    save_weights(base, BASE)
    moved = {name: tensor + 0.1 * torch.randn(tensor.shape).abs() for name, tensor in base.items() if tensor.ndim}
    save_weights({**base, **moved}, "a.safetensors")
    TaskVector.between(base, {**base, **moved}).save("b.tv.safetensors")


@pytest.mark.parametrize("statistics", ["keep", "delta", "reestimate"])
@pytest.mark.parametrize("base", [None, BASE])
def test_what_edit_wrote_is_verified_too(trained, capsys, statistics, base):
    vectors = {"a": "a.safetensors", "b": "b.tv.safetensors", "unused": "b.tv.safetensors"}
    edit(vectors=vectors, recipe="s * (dare(a) + b)", coefs={"s": 0.5}, base=base, statistics=statistics)
    if base is None:
        with pytest.raises(ValueError, match="does not say where its base is, .* --base"):
            verify("edited")
    words = ["verify", "edited", *([] if base else ["--base", BASE])]
    capsys.readouterr()
    assert run(*words) == 0
    text = capsys.readouterr().out
    assert ("not computed again: 3 running statistics" in text) == (statistics != "keep")
    replace("edited/edited.safetensors", lambda weights: weights["norm.running_mean"].add_(1))
    assert run(*words) == 1
    assert "changed after the edit" in capsys.readouterr().out


def test_the_base_beside_a_vector_needs_no_naming(trained, capsys):
    base = open_weights(BASE)
    save_weights(dict(base), f"base-{fingerprint(base).digest}.safetensors")  # as TaskVectorCallback writes it
    edit(vectors={"a": "a.safetensors"}, recipe="a")
    assert run("verify", "edited") == 0
    with pytest.raises(FileNotFoundError, match=r"the base itself is still at base-[0-9a-f]{32}.*: copy it"):
        revert("edited", output="again.safetensors")


def test_an_edit_with_learned_coefficients_says_that_it_cannot_be_computed_again(trained):
    edit(vectors={"a": "a.safetensors"}, recipe="a", base=BASE)
    replace("edited/edited.safetensors", lambda weights: None, **{"tva.recipe": "learned(a), 0123"})
    with pytest.raises(ValueError, match="learned from data, tensor by tensor"):
        verify("edited")


@pytest.mark.parametrize(("options", "status"), [({}, 0), ({"which": ["raw"]}, 2), ({"key_map": 3}, 2)])
def test_options_of_a_record_that_was_sealed_again(folder, capsys, options, status):
    write("a + b")
    replace(OUT, lambda weights: None, **{"tva.options": json.dumps(options)})
    capsys.readouterr()
    assert run("verify", OUT) == status
    shown = capsys.readouterr().err
    assert status == 0 or f"out.safetensors: tva.options: '{next(iter(options))}' must be an object" in shown
