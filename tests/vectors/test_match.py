"""Vectors in folders, checkpoints recognized as base plus k times a vector, and the commands as people type them."""

import json
import math
import re

import pytest
import torch
from small_adapters import adapted, net
from small_states import state

from tva import MismatchError, NoEffectError, Origin, TaskVector, fingerprint, open_weights, save_weights
from tva.checkpoints import read_metadata
from tva.checkpoints.fingerprint import CONTENT, HEADER
from tva.cli.main import main
from tva.compose.apply import compose
from tva.vectors.listing import list_vectors
from tva.vectors.match import match

BASE, VECTOR = "base.safetensors", "v/a/last.tv.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base and three vectors; in folders below, a vector of another base, a damaged one and a checkpoint."""
    folder = tmp_path_factory.mktemp("vectors")
    save_weights(state(0), folder / BASE)
    for seed, name in enumerate("abc", start=1):
        origin = Origin(task=name, step=seed)
        TaskVector.between(state(0), state(seed), origin=origin).save(folder / f"v/{name}/last.tv.safetensors")
    TaskVector.between(state(5), state(1)).save(folder / "v/other/last.tv.safetensors")
    whole = (folder / VECTOR).read_bytes()
    (folder / "v/cut.tv.safetensors").write_bytes(whole[:-8])
    save_weights(state(9), folder / "v/other/model.safetensors")
    (folder / "v/.hidden.tv.safetensors").write_bytes(b"partial")
    return folder


@pytest.fixture
def here(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


# --- ls


def test_vectors_are_listed_by_base_and_damaged_files_with_the_reason(here):
    found = list_vectors("v")
    base = fingerprint(open_weights(BASE)).digest
    assert [vector.task for vector in found.bases[base]] == ["a", "b", "c"]
    assert [vector.path for vector in found.bases[fingerprint(state(5)).digest]] == ["v/other/last.tv.safetensors"]
    first = found.bases[base][0]
    assert first.norm == pytest.approx(TaskVector.load(first.path).norm(), rel=1e-5)
    assert (first.step, first.encoding, first.num_bytes) == (1, "dense", (here / first.path).stat().st_size)
    assert first.created == read_metadata(first.path)["tva.created"]
    assert list(found.damaged) == ["v/cut.tv.safetensors"]
    assert "damaged or cut off" in found.damaged["v/cut.tv.safetensors"]
    assert found.others == 1


def test_a_norm_that_no_header_tells_is_computed_and_later_formats_are_listed_as_unreadable(tmp_path):
    vector = TaskVector.between(state(0), state(1))
    vector.save(tmp_path / "v.safetensors")
    left_out = ("tva.norm", CONTENT, HEADER)  # as earlier versions did
    header = {key: text for key, text in read_metadata(tmp_path / "v.safetensors").items() if key not in left_out}
    tensors = {**vector.deltas, **vector.buffers}
    save_weights(tensors, tmp_path / "old.tv.safetensors", header)
    save_weights(tensors, tmp_path / "later.tv.safetensors", {**header, "tva.format": "task_vector/9"})
    found = list_vectors(str(tmp_path))
    (listed,) = (v for vectors in found.bases.values() for v in vectors if "old" in v.path)
    assert listed.norm == pytest.approx(vector.norm(), rel=1e-12)
    assert "Update tva" in found.damaged[str(tmp_path / "later.tv.safetensors")]


def test_adapters_written_by_the_callback_are_listed_others_are_not(tmp_path):
    save_weights({"x": torch.ones(2)}, tmp_path / "plain/adapter_model.safetensors")
    facts = {"tva.base_fingerprint": "f" * 32, "tva.task": "mine", "tva.step": "4"}
    save_weights({"x": torch.ones(2)}, tmp_path / "last.adapter/adapter_model.safetensors", facts)
    found = list_vectors(str(tmp_path))
    (listed,) = found.bases["f" * 32]
    assert (listed.path, listed.task, listed.step, listed.norm) == (str(tmp_path / "last.adapter"), "mine", 4, None)
    assert found.others == 1


def test_a_folder_without_vectors_is_an_error(here, tmp_path):
    with pytest.raises(FileNotFoundError, match="A folder was expected at nowhere"):
        list_vectors("nowhere")
    save_weights({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds no task vector: of the \.safetensors files in it \(1\) none"):
        list_vectors(str(tmp_path))


# --- base + k · vector


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("coef", [0.4, -1.5])
def test_the_coefficient_of_an_edit_is_recovered(here, tmp_path, coef, dtype):
    edited = str(tmp_path / "edited.safetensors")
    compose(BASE, {"a": VECTOR}, "a", edited, scaling_coef=coef, dtype=dtype)
    found = match(edited, ["v"], BASE)
    assert found.fits[0].path == VECTOR
    assert found.fits[0].coef == pytest.approx(coef, rel=1e-2 if dtype == "bfloat16" else 1e-6)
    assert [fit.exact for fit in found.fits] == [True, False, False]
    assert found.fits[1].residual > 0.5
    assert list(found.left_out) == ["v/other/last.tv.safetensors"]
    x, b = open_weights(edited), state(0)
    vector = TaskVector.load(VECTOR)
    square = left = 0.0
    for name in (name for name in b if name not in ("steps", "bn.running_mean")):
        moved = x[name].double() - b[name].double()
        square += float(moved.square().sum())
        delta = vector.deltas[name].double() if name in vector.deltas else 0.0
        left += float((moved - found.fits[0].coef * delta).square().sum())
    assert found.fits[0].residual == pytest.approx(math.sqrt(left / square), abs=3e-7)
    assert 0.3 * found.rounding < found.fits[0].residual or dtype != "bfloat16"  # the bound is no loose one
    assert found.distance == pytest.approx(math.sqrt(square), rel=1e-6)


def test_the_sum_of_several_is_fitted_jointly(here, tmp_path):
    edited = str(tmp_path / "edited.safetensors")
    paths = {name: f"v/{name}/last.tv.safetensors" for name in "ab"}
    compose(BASE, paths, "0.3 * a - 0.7 * b", edited)
    found = match(edited, ["v", *paths.values()], BASE)
    assert not any(fit.exact for fit in found.fits)
    assert found.joint == pytest.approx({paths["a"]: 0.3, paths["b"]: -0.7, "v/c/last.tv.safetensors": 0.0}, abs=1e-6)
    assert found.joint_exact
    assert found.joint_residual <= found.rounding
    assert found.independent == 3


def test_vectors_that_depend_on_each_other_are_said_to(here, tmp_path):
    vector = TaskVector.load(VECTOR)
    (vector * 2.0).save(tmp_path / "twice.tv.safetensors")
    given = [VECTOR, str(tmp_path / "twice.tv.safetensors")]
    save_weights(state(1), tmp_path / "x.safetensors")
    found = match(str(tmp_path / "x.safetensors"), given, BASE)
    assert found.independent == 1
    assert found.joint[given[0]] + 2 * found.joint[given[1]] == pytest.approx(1.0)
    assert found.joint_exact


def test_a_checkpoint_that_is_no_sum_of_the_vectors_is_said_to_be_none(here, tmp_path):
    save_weights(state(7), tmp_path / "x.safetensors")
    found = match(str(tmp_path / "x.safetensors"), ["v"], BASE)
    assert not found.joint_exact
    assert found.joint_residual > 0.3


def test_an_adapter_counts_as_a_vector(tmp_path):
    merged = adapted(tmp_path / "lora", target_modules=["q"])
    save_weights(net().state_dict(), tmp_path / BASE)
    save_weights(merged, tmp_path / "merged.safetensors")
    found = match(str(tmp_path / "merged.safetensors"), [str(tmp_path / "lora")], str(tmp_path / BASE))
    assert found.fits[0].coef == pytest.approx(1.0)
    assert found.fits[0].exact


def test_what_cannot_be_matched_is_refused(here, tmp_path):
    save_weights({**state(0), "bn.running_mean": torch.ones(3)}, tmp_path / "same.safetensors")
    with pytest.raises(NoEffectError, match="has the parameters of base.safetensors, every one"):
        match(str(tmp_path / "same.safetensors"), ["v"], BASE)
    save_weights({"w": torch.ones(2)}, tmp_path / "small.safetensors")
    with pytest.raises(MismatchError, match="No single prefix makes the names match"):
        match(str(tmp_path / "small.safetensors"), ["v"], BASE)
    save_weights(state(1), tmp_path / "x.safetensors")
    with pytest.raises(MismatchError, match="None of 1 vectors is of this base. The first: .* was taken from the base"):
        match(str(tmp_path / "x.safetensors"), ["v/other"], BASE)
    with pytest.raises(ValueError, match="is a task vector file; give the checkpoint"):
        match(VECTOR, ["v"], BASE)
    save_weights({**state(1), "one": torch.tensor([math.inf])}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="A fit needs finite numbers, but .*bad.safetensors' hold NaN or infinity"):
        match(str(tmp_path / "bad.safetensors"), ["v"], BASE)


# --- the commands


def run(capsys, *words):
    main([str(word) for word in words])
    return capsys.readouterr().out


def test_the_commands_print_tables(here, tmp_path, capsys):
    edited = str(tmp_path / "edited.safetensors")
    save_weights(state(1), edited)
    out = tmp_path / "a.tv.safetensors"
    assert f"wrote {out}: task a, 7 tensors moved, 2 frozen, 1 integer" in run(
        capsys, "extract", "--base", BASE, "--finetuned", edited, "--output", out
    )
    text = run(capsys, "inspect", VECTOR, "--by", "layer")
    assert "l.0" in text
    assert "running statistics, apart" in text
    assert "2 tensors: 'empty', 'still'" in text
    text = run(capsys, "compare", VECTOR, "--by", "layer", "v/b/last.tv.safetensors")
    assert "sign conflicts by layer" in text
    text = run(capsys, "vectors", "ls", "v")
    assert "damaged: v/cut.tv.safetensors" in text
    assert "4 task vectors of 2 bases in v; 1 damaged file; 1 other .safetensors file not listed" in text
    text = run(capsys, "vectors", "match", edited, "v", "--base", BASE)
    assert "x = b + 1 · a: what is left, 0.0e+00, is no more than rounding explains (rounding to float32 and" in text
    save_weights(state(7), edited)
    text = run(capsys, "vectors", "match", edited, "v/a", "--base", BASE)
    assert "x is not a sum of these vectors" in text


def test_the_commands_print_json_that_any_reader_takes(here, tmp_path, capsys):
    zero = TaskVector.load(VECTOR) * 0.0
    zero.save(tmp_path / "zero.tv.safetensors")
    vectors = [VECTOR, "v/b/last.tv.safetensors", tmp_path / "zero.tv.safetensors"]

    def read(*words):
        return json.loads(run(capsys, *words, "--json"), parse_constant=lambda text: pytest.fail(text))

    found = read("compare", *vectors)
    assert found["whole"]["cosines"][0][2] is None
    assert found["whole"]["cosines"][0][0] == 1.0
    assert read("inspect", vectors[0])["groups"]["l.0"]["tensors"] == 1
    assert len(read("vectors", "ls", "v")["bases"]) == 2
    matched = read("vectors", "match", "v/other/model.safetensors", "v", "--base", BASE)
    assert len(matched["fits"]) == 3


def test_more_pairs_than_fit_are_summed_up(here, capsys, tmp_path):
    paths = []
    for seed in range(1, 6):
        paths.append(tmp_path / f"t{seed}.tv.safetensors")
        TaskVector.between(state(0), state(seed)).save(paths[-1])
    text = run(capsys, "compare", *paths, "--by", "tensor")
    (line,) = (line for line in text.splitlines() if line.startswith("cosine by tensor"))
    assert line.split() == ["cosine", "by", "tensor", "smallest", "largest"]


def test_compare_draws_a_png_and_nothing_else(here, tmp_path, capsys):
    vectors = [VECTOR, "v/b/last.tv.safetensors"]
    run(capsys, "compare", *vectors, "--by", "layer", "--plot", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="2"):
        run(capsys, "compare", *vectors, "--plot", tmp_path / "a.jpg")
    assert "plot must end in .png; found" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vectors"], "tva vectors is followed by ls or match"),
        (["inspect", "a", "b"], "'b' is unexpected; usage: tva inspect PATH"),
        (["inspect", VECTOR, "--by", "module"], "by"),
        (["compare"], "must be given; usage: tva compare VECTORS … "),
        (["vectors", "ls"], "must be given; usage: tva vectors ls FOLDER "),
        (["vectors", "ls", "nowhere"], "A folder was expected at nowhere"),
    ],
)
def test_mistakes_in_a_command_are_answered(here, capsys, words, message):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert re.search(message, capsys.readouterr().err, re.DOTALL)


def test_options_can_stand_in_a_yaml_file(here, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(
        "vectors: [v/a/last.tv.safetensors, v/b/last.tv.safetensors]\nby: layer\njson: true\n"
    )
    found = json.loads(run(capsys, "compare", "--config", tmp_path / "c.yaml"))
    assert (found["by"], list(found["names"])) == ("layer", ["a", "b"])


def test_without_vectors_there_is_nothing_to_match(tmp_path):
    save_weights({"w": torch.ones(2)}, tmp_path / BASE)
    save_weights({"w": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="Give at least one vector"):
        match(tmp_path / "x.safetensors", [], base=tmp_path / BASE)
