"""No command replaces an input, or changes what an input folder means: by path, link, hard link or inside."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint
from small_cli import run
from small_states import save_distributed

from tva import TaskVector, fingerprint, open_weights, save_weights
from tva.checkpoints import protect, write_export
from tva.compose.apply import compose
from tva.evaluation.log import EvaluationLog

BASE = "base.safetensors"

KINDS = ["file", "folder", "shards", "torch_distributed", "adapter"]
WAYS = ["same", "hard link", "link", "inside"]


def state(seed):
    generator = torch.Generator().manual_seed(seed)
    return {"q.weight": torch.randn(6, 4, generator=generator), "q.bias": torch.randn(6, generator=generator)}


def make(kind, path, weights):
    """Write a checkpoint of some kind, and return its path, a file with its weights, and a place inside of it."""
    if kind == "file":
        save_weights(weights, path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors"), path.with_suffix(".safetensors"), None
    path.mkdir()
    if kind == "folder":
        save_weights(weights, path / "model.safetensors")
        save_weights(weights, path / "other.safetensors")  # not by tva
        return path, path / "model.safetensors", path / "other.safetensors"
    if kind == "shards":
        names = [f"model-{i}-of-2.safetensors" for i in (1, 2)]
        for file, (name, tensor) in zip(names, weights.items(), strict=True):
            save_weights({name: tensor}, path / file)
        index = {"weight_map": dict(zip(weights, names, strict=True))}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        return path, path / names[0], path / "model.safetensors"  # which is taken before the index
    if kind == "torch_distributed":
        save_distributed(dict(weights), path)
        return path, next(path.glob("*.distcp")), path / "added.safetensors"
    factors = {"lora_A": torch.randn(2, 4), "lora_B": torch.randn(6, 2)}
    named = {f"base_model.model.q.{key}.weight": factor for key, factor in factors.items()}
    save_weights(named, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path, path / "adapter_model.safetensors", path / "added.safetensors"


def place(way, path, file, inside, folder):
    """Return an output that is an input in some way, or None."""
    if way == "inside":
        return inside
    if way == "same":
        return file if file.suffix == ".safetensors" else path
    output = folder / "output.safetensors"
    os.link(file, output) if way == "hard link" else output.symlink_to(file)
    return output


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("role", ["base", "vector"])
@pytest.mark.parametrize("command", ["compose", "extract"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_outputs_are_never_inputs(capsys, command, role, kind, way):
    if (kind, role) == ("adapter", "base") or (kind, way) == ("file", "inside"):
        return
    base, vector = make("file", Path("base"), state(0)), make("file", Path("tuned"), state(1))
    given = make(kind, Path("given"), state(2))
    base, vector = (given, vector) if role == "base" else (base, given)
    output = place(way, *given, Path())
    before = contents(Path())
    if command == "compose":
        words = ["--base", base[0], "--vectors.v", vector[0], "--recipe", "v", "--output", output]
    else:
        words = ["--base", base[0], "--finetuned", vector[0], "--output", output]
    assert run(command, *words) == 2
    assert re.search("output|file's name must end in", capsys.readouterr().err)
    assert contents(Path()) == before


@pytest.mark.parametrize("way", ["same", "hard link", "link"])
def test_compress_and_revert_never_replace_what_they_read(way):
    save_weights(state(0), BASE)
    TaskVector.between(state(0), state(1)).save("v.tv.safetensors")
    compose(BASE, {"v": "v.tv.safetensors"}, "v", "edited.safetensors", keep_undo="with_vectors")
    for name in ("v.tv", "edited", "edited.undo"):
        file = Path(f"{name}.safetensors")
        output = place(way, file, file, None, Path())
        before = contents(Path())
        if name == "v.tv":
            assert run("compress", file, "--output", output, "--encoding", "int8") == 2
        assert run("revert", "edited.safetensors", "--output", output) == 2
        assert contents(Path()) == before
        Path("output.safetensors").unlink(missing_ok=True)


def test_an_undo_file_never_takes_the_place_of_an_input(capsys):
    save_weights(state(0), BASE)
    TaskVector.between(state(0), state(1)).save("w.undo.safetensors")
    before = contents(Path())
    words = ["--vectors.v", "w.undo.safetensors", "--recipe", "v", "--output", "w.safetensors", "--keep_undo"]
    assert run("compose", "--base", BASE, *words) == 2
    assert "output w.undo.safetensors is what is given as vectors.v" in capsys.readouterr().err
    assert contents(Path()) == before


def test_an_edited_model_is_a_base_like_any_other():
    """It was written by tva, and so are edits that are made once more; but it is an input here."""
    save_weights(state(0), BASE)
    save_weights(state(1), "tuned.safetensors")
    compose(BASE, {"v": "tuned.safetensors"}, "v", "first", max_shard_size="100")
    known = fingerprint(open_weights("first"))
    for name in ["model.safetensors", *(path.name for path in Path("first").glob("model-*"))]:
        with pytest.raises(ValueError, match="Give an"):
            compose("first", {"v": "tuned.safetensors"}, "v", f"first/{name}")
    for _ in range(2):  # an edit beside it may be made once more
        compose("first", {"v": "tuned.safetensors"}, "-v", "first/edited.safetensors")
    assert fingerprint(open_weights("first")) == known


def test_a_folder_of_one_file_takes_no_other():
    Path("model").mkdir()
    save_weights(state(0), "model/weights.safetensors")
    with pytest.raises(ValueError, match="a file more would change which weights are read"):
        protect([Path("model/edited.safetensors")], {"base": Path("model")})
    shutil.copytree("model", "same")
    protect([Path("same/edited.safetensors")], {"base": Path("model")})


OTHERS = {
    "compose --as lora": ["compose", "--base", BASE, "--vectors.v", "given", "--recipe", "v",
                          "--as", "lora"],
    "extract --rank": ["extract", "--base", "given", "--finetuned", "tuned.safetensors", "--rank", "1"],
    "compose to GGUF": ["compose", "--base", "given", "--vectors.v", "tuned.safetensors", "--recipe", "v",
                        "--requantize"],
    "report": ["report", "given"],
    "init": ["init", "merge"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_no_other_command_writes_over_a_file_that_it_did_not_make(capsys, name, kind, way):
    save_weights(state(0), BASE)
    save_weights(state(1), "tuned.safetensors")
    path, file, inside = make(kind, Path("given"), state(2))
    if kind == "file":
        Path("given").symlink_to(file)  # by the name that the commands have
    inside = inside if inside is None or inside.exists() else file
    if way == "inside" and inside is None:
        return
    output = place(way, path, file, inside, Path())
    before = contents(Path())
    assert run(*OTHERS[name], "--output", output) == 2
    assert "tva: error: " in capsys.readouterr().err
    assert contents(Path()) == before


@pytest.fixture
def inputs(tmp_path):
    save_weights(state(0), BASE)
    save_weights(state(1), "tuned.safetensors")
    TaskVector.between(state(0), state(1)).save("v.tv.safetensors")
    compose(BASE, {"v": "v.tv.safetensors"}, "v", "edited.safetensors", keep_undo=True)
    return tmp_path


COMPOSE = ["compose", "--base", BASE, "--vectors.v", "v.tv.safetensors", "--recipe", "v"]
WRITING = {
    "compose": COMPOSE,
    "extract": ["extract", "--base", BASE, "--finetuned", "tuned.safetensors"],
    "compress": ["compress", "v.tv.safetensors", "--encoding", "int8"],
    "revert": ["revert", "edited.safetensors"],
}


@pytest.mark.parametrize("name", WRITING)
def test_a_file_of_ones_own_under_the_outputs_name_is_never_replaced(inputs, capsys, name):
    save_weights(state(2), "model.safetensors")  # as others write
    Path("notes.safetensors").write_text("not even weights")
    TaskVector.between(state(0), state(3)).save("costly.tv.safetensors")
    compose(BASE, {"v": "v.tv.safetensors"}, "-v", "other.safetensors")
    others = {"model", "notes", "other" if name in ("extract", "compress") else "costly.tv"}
    before = contents(inputs)
    for file in sorted(others):
        assert run(*WRITING[name], "--output", f"{file}.safetensors") == 2
        assert f"output {file}.safetensors is there already" in capsys.readouterr().err
    assert contents(inputs) == before


@pytest.mark.parametrize("name", WRITING)
def test_an_output_without_a_name_is_refused_in_words(inputs, capsys, name):
    before = contents(inputs)
    assert run("inspect", "a\0b.safetensors") == 2
    assert "has a NUL character" in capsys.readouterr().err
    for output in ("a\0b.safetensors", "", ".", "./", "/"):
        assert run(*WRITING[name], "--output", output) == 2
        assert re.search(
            "output must (be the name of a file|end in .safetensors)|name must end in", capsys.readouterr().err
        )
    assert contents(inputs) == before


@pytest.mark.parametrize("name", ["compose", "extract", "compress"])
def test_an_earlier_output_of_the_same_command_is_replaced(inputs, name):
    for scaling in ("1", "0.5"):
        words = ["--scaling_coef", scaling, "--keep_undo"] if name == "compose" else []
        assert run(*WRITING[name], *words, "--output", "out.safetensors") == 0


def test_an_undo_file_replaces_undo_files_only(inputs, capsys):
    save_weights(state(2), "out.undo.safetensors")
    before = contents(inputs)
    assert run(*COMPOSE, "--keep_undo", "--output", "out.safetensors") == 2
    assert "output out.undo.safetensors is there already" in capsys.readouterr().err
    assert contents(inputs) == before


EXPORTS = {  # what tva writes under a name, and what somebody else has there
    "a.html": ("<!doctype html>\n<title>tva</title>", "<!doctype html>\n<title>mine</title>"),
    "a.csv": ("run,task,value\nx,y,1\n", "name,address\n"),
    "a.json": ('[\n {\n  "target": "x"\n }\n]\n', '[\n {\n  "name": "x"\n }\n]\n'),
    "a.tex": ("\\begin{tabular}{lll}\n1\n", "\\documentclass{article}\n"),
    "a.svg": ("<svg></svg>", "<svg><g></g></svg>"),
    "a.pdf": ("%PDF-1.4\n%%EOF", "%PDF-1.7\n%%EOF"),
    "a.png": (b"\x89PNG" + b"IEND" * 4, b"\x89PNG" + b"IEND" * 9),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_pages_tables_and_charts_replace_only_earlier_ones(name):
    ours, theirs = EXPORTS[name]
    for _ in range(2):
        write_export(Path(name), ours)
    Path(name).write_bytes(theirs if isinstance(theirs, bytes) else theirs.encode())
    with pytest.raises(FileExistsError, match=f"{name} is there already"):
        write_export(Path(name), ours)
    Path(name).unlink()
    Path(name).mkdir()
    with pytest.raises(FileExistsError, match=f"{name} is there already"):
        write_export(Path(name), ours)


def test_a_png_with_its_mark_is_still_a_png():
    images = pytest.importorskip("PIL.Image")
    images.new("RGB", (3, 2)).save("plain.png")
    write_export(Path("a.png"), Path("plain.png").read_bytes())
    with images.open("a.png") as opened:
        assert opened.size == (3, 2)
        opened.load()
        assert opened.text == {"Software": "tva"}


def test_a_log_of_evaluations_is_never_another_file(tmp_path):
    Path("train.jsonl").write_text('{"text": "a"}\n')
    for path in (Path("train.jsonl"), tmp_path):
        with pytest.raises(ValueError, match="which is not one. Give another log"):
            EvaluationLog(path)
    log = EvaluationLog(Path("log.jsonl"))
    log.decide({"task": "part"}, {"edit": 1})
    assert EvaluationLog(Path("log.jsonl")).decide({"task": "part"}, {"edit": 2}) == {"task": 2}
