"""An edit takes the place of an earlier one whole or not at all, and replaces nothing that is not its own."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from small_edit import Net, Task, edit, make_trainer

from tva import open_weights, save_weights
from tva.compose.revert import revert
from tva.compose.verify import verify
from tva.edit import folder as module
from tva.edit.folder import FILES, MADE_BY, check_writable, replacing
from tva.edit.options import EditOptions
from tva.edit.push import push
from tva.edit.run import run_edit
from tva.edit.runs import revisit


class Killed(BaseException):
    """Stands for the end of the process: nothing that comes after it runs."""


def write(folder, number):
    with replacing(folder) as staging:
        for name in FILES:
            (staging / name).write_text(str(number))


def numbers(folder):
    """What the files of an edit hold; there must be all of them."""
    return {(folder / name).read_text() for name in FILES}


def make(folder):
    write(folder, 1)
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("mine")
    (folder / "to notes").symlink_to("notes")


def test_an_edit_replaces_an_earlier_one_and_leaves_other_files():
    make(Path("out"))
    before = Path("out/notes/mine.txt").stat().st_ino
    write(Path("out"), 2)
    assert numbers(Path("out")) == {"2"}
    assert Path("out/notes/mine.txt").stat().st_ino == before
    assert Path("out/to notes/mine.txt").read_text() == "mine"
    assert [path.name for path in Path().iterdir()] == ["out"]


@pytest.mark.parametrize("exchange", [True, False], ids=["one step", "two steps"])
def test_a_kill_at_any_file_operation_leaves_all_of_one_edit(monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(module.ctypes, "CDLL", lambda *args, **options: object())
    # so that nothing here is cleaned up
    monkeypatch.setattr("tva.checkpoints.atomic.socket.gethostname", lambda: "another")
    kept = set()
    for stop in range(100):
        folder = Path(f"{stop}/out")
        make(folder)
        count = [0]

        def counted(function, count=count, stop=stop):
            def call(*args, **options):
                if count[0] == stop:
                    raise Killed
                count[0] += 1
                return function(*args, **options)

            return call

        with monkeypatch.context() as patch:
            for name in ("replace", "link", "symlink", "fsync"):
                patch.setattr(os, name, counted(getattr(os, name)))
            patch.setattr(module, "_exchange", counted(module._exchange))
            patch.setattr(module.shutil, "rmtree", counted(module.shutil.rmtree))
            patch.setattr(Path, "write_text", counted(Path.write_text))
            try:
                write(folder, 2)
            except Killed:
                pass
            else:
                break
        if folder.exists():
            kept |= numbers(folder)
            assert len(numbers(folder)) == 1
            assert (folder / "notes/mine.txt").read_text() == "mine"
        else:  # between two renames of a system that cannot exchange folders
            assert not exchange
            (aside,) = folder.parent.glob(".out.*.old")
            assert numbers(aside) == {"1"}
    assert 15 < stop < 99
    assert kept == {"1", "2"}


def _write_forever(folder, ready):
    ready.set()
    for number in range(2, 10**6):
        check_writable(folder)
        write(folder, number)


def test_processes_that_are_killed_leave_all_of_one_edit_and_the_next_removes_what_they_left():
    make(Path("out"))
    context = multiprocessing.get_context("fork")
    for step in range(20):
        ready = context.Event()
        process = context.Process(target=_write_forever, args=(Path("out"), ready))
        process.start()
        assert ready.wait(300)
        time.sleep(0.002 * step)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert len(numbers(Path("out"))) == 1
        assert Path("out/notes/mine.txt").read_text() == "mine"
    write(Path("out"), 1)
    assert [path.name for path in Path().iterdir()] == ["out"]


def test_the_working_directory_gets_the_new_files(tmp_path, monkeypatch):
    make(tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    with replacing(Path(".")) as staging:
        for name in FILES[:-1]:
            (staging / name).write_text("2")
    assert {path.name for path in Path(".").iterdir()} == {*FILES[:-1], "notes", "to notes"}
    assert {Path(name).read_text() for name in FILES[:-1]} == {"2"}


def test_a_file_system_without_links_gets_copies(monkeypatch):
    make(Path("out"))

    def refused(*args):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refused)
    write(Path("out"), 2)
    assert Path("out/notes/mine.txt").read_text() == "mine"


# --- whole edits


def test_a_page_that_cannot_be_drawn_loses_nothing_else(vectors, monkeypatch, capsys):
    def broken(content):
        raise RuntimeError("the renderer is gone")

    monkeypatch.setattr("tva.edit.write.edit_page", broken)
    report = edit(vectors, scaling_coef=0.5)
    assert "its page cannot be drawn: the renderer is gone. `tva report" in capsys.readouterr().err
    names = {path.name for path in Path("out").iterdir()}
    assert names == {"edit.json", "edited.safetensors", "README.md"}
    assert json.loads(Path("out/edit.json").read_text())["created"] == report.created


def test_a_refused_edit_keeps_the_accepted_one_that_was_in_its_folder(vectors, capsys):
    edit(vectors, scaling_coef=0.5, keep_undo=True)
    weights = Path("out/edited.safetensors").read_bytes()
    for _ in range(2):
        refused = edit(vectors, scaling_coef=0.5, subject_to=["other/accuracy >= 2"])
        assert not refused.holds
        assert not Path("out/edited.safetensors").exists()
        (kept,) = Path("out").glob("accepted-*")
        assert (kept / "edited.safetensors").read_bytes() == weights
    assert capsys.readouterr().err.count(f"is now in {kept.absolute()}") == 1
    revert(kept / "edited.safetensors", output="base.safetensors")
    before = Net().state_dict()
    assert all((tensor == before[name]).all() for name, tensor in open_weights("base.safetensors").items())
    edit(vectors, scaling_coef=0.5)
    assert not list(Path("out").glob("accepted-*"))  # replaced by the new accepted edit, as it would have been


def test_a_folder_that_only_looks_kept_stays(vectors):
    edit(vectors, scaling_coef=0.5)
    mine = Path("out/accepted-mine")
    mine.mkdir()
    for name in ("edited.safetensors", "notes.txt"):
        (mine / name).write_text("mine")
    edit(vectors, scaling_coef=0.5)
    assert (mine / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["config.yaml", "report.html", "README.md", "edit.json", "edited.safetensors"])
def test_a_file_that_tva_did_not_write_is_not_replaced(vectors, name):
    file = Path(f"out/{name}")
    file.parent.mkdir()
    if name == "edited.safetensors":
        save_weights({"w": Task(1).train_dataloader().dataset.tensors[0]}, file)
    else:
        file.write_text("mine: 1")
    before = file.read_bytes()
    with pytest.raises(ValueError, match=rf"out/{name}, .*tva did not write. Move it, or choose"):
        edit(vectors, scaling_coef=0.5)
    assert file.read_bytes() == before


def test_an_input_is_not_replaced(vectors):
    edit(vectors, scaling_coef=0.5)
    first = Path("out/edited.safetensors")
    with pytest.raises(ValueError, match="edited.safetensors is an input of the edit, which would replace it. Choose"):
        edit(vectors, scaling_coef=0.5, base=str(first), allow_other_base=True)


def test_a_configuration_that_an_edit_wrote_is_its_own(vectors):
    edit(vectors, scaling_coef=0.5)
    Path("out/config.yaml").write_text(f"{MADE_BY}\nrecipe: a")
    edit(vectors, scaling_coef=0.5)
    assert not Path("out/config.yaml").exists()  # it was of the edit before


def test_nothing_that_is_written_or_pushed_names_the_home_folder_or_a_secret(vectors, monkeypatch):
    home = Path("home")
    monkeypatch.setenv("HOME", str(home))
    (home / "vectors").mkdir(parents=True)
    for path in vectors.values():
        shutil.copy(path, home / "vectors" / Path(path).name)
    own = {name: str(home / "vectors" / Path(path).name) for name, path in vectors.items()}
    save_weights(Net().state_dict(), home / "base.safetensors")
    trainer = make_trainer()
    secret = "--trainer.logger.init_args.id=hunter2 --hub_token hunter2"
    trainer.command = f"tva edit {secret} --base {home}/base.safetensors"
    options = EditOptions(
        output=str(home / "out"),
        vectors=own,
        recipe="a + b",
        base=str(home / "base.safetensors"),
        scaling_coef=0.5,
        targets={"a": Task(1)},
        keep_undo=True,
    )
    run_edit(trainer, Net(), options)
    for file in (home / "out").iterdir():
        content = file.read_bytes()
        assert str(home).encode() not in content, file
        assert b"hunter2" not in content, file
    assert "~/base.safetensors" in (home / "out/edit.json").read_text()
    assert verify(home / "out/edited.safetensors").holds
    assert push(home / "out", "me/x", dry_run=True).files.keys() >= {"vectors/a.tv.safetensors"}
    assert revisit([home / "out"]).notices == {"out": []}
