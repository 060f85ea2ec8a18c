"""Files are written whole or not at all, through no link, and what killed processes left is removed."""

import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tva import save_weights
from tva.checkpoints import atomic_path
from tva.checkpoints.fingerprint import header_digest
from tva.cli.main import main
from tva.compose import compose
from tva.compose.record import RECORD, Record
from tva.compose.verify import verify


@pytest.fixture
def files(tmp_path):
    save_weights({"w": torch.zeros(4)}, "base.safetensors")
    save_weights({"w": torch.ones(4)}, "tuned.safetensors")
    return tmp_path


def run(output="out.safetensors", **options):
    return compose("base.safetensors", {"a": "tuned.safetensors"}, "a", output=output, **options)


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_temporary_files_of_dead_processes_are_removed_by_the_next_run():
    left = Path(f".a.txt.{socket.gethostname()}.{dead_process()}.tmp")
    alive = Path(f".a.txt.{socket.gethostname()}.{os.getppid()}.tmp")
    other = Path(f".a.txt.elsewhere.{dead_process()}.tmp")
    for file in (left, alive, other):
        file.write_text("half")
    with atomic_path(Path("a.txt")) as temporary:
        temporary.write_text("whole")
    assert sorted(file.name for file in Path().iterdir()) == sorted(["a.txt", alive.name, other.name])


def test_a_link_in_the_place_of_a_hidden_file_is_not_followed(files):
    mine = Path("mine.txt")
    mine.write_text("mine")
    temporary = Path(f".a.txt.{socket.gethostname()}.{os.getpid()}.tmp")
    temporary.symlink_to(mine)
    with atomic_path(Path("a.txt")) as written:
        written.write_text("new")
    for name in (".out.safetensors.partial", ".out.undo.safetensors.partial"):
        Path(name).symlink_to(mine)
    run(keep_undo=True)
    for make in (os.symlink, os.link):
        make(mine, Path(".out.safetensors.journal"))
        with pytest.raises(ValueError, match=".out.safetensors.journal is (a link|not a file of yours only)"):
            run()
        os.unlink(".out.safetensors.journal")
    os.mkfifo(".out.safetensors.journal")
    with pytest.raises(ValueError, match="is not a file of yours only"):
        run()
    assert mine.read_text() == "mine"


def test_a_garbled_journal_is_named(files):
    Path(".out.safetensors.journal").write_bytes(b"\xff\xfe garbage\n")
    Path(".out.safetensors.partial").write_bytes(bytes(200))
    with pytest.raises(ValueError, match=".out.safetensors.journal: line 1 is not valid JSON"):
        run(resume=True)


@pytest.mark.parametrize("command", ["compose", "extract", "compress"])
def test_a_file_that_may_not_grow_is_an_error_with_the_path(files, command, capsys):
    save_weights({"w": torch.zeros(2**20)}, "base.safetensors")
    save_weights({"w": torch.rand(2**20)}, "tuned.safetensors")
    words = {
        "compose": ["--base", "base.safetensors", "--vectors.a", "tuned.safetensors", "--recipe", "a"],
        "extract": ["--base", "base.safetensors", "--finetuned", "tuned.safetensors"],
        "compress": ["v.tv.safetensors", "--encoding", "bf16"],
    }[command]
    main(
        ["extract", *["--base", "base.safetensors", "--finetuned", "tuned.safetensors", "--output", "v.tv.safetensors"]]
    )
    before, there = resource.getrlimit(resource.RLIMIT_FSIZE), set(os.listdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(SystemExit, match="2"):
            main([command, *words, "--output", "out.tv.safetensors"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "out.tv.safetensors" in capsys.readouterr().err
    assert {name for name in set(os.listdir()) - there if not name.startswith(".out.tv.safetensors.")} == set()


@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_an_ended_command_says_how_to_go_on(number, status, word):
    code = (
        "import os, signal, sys, time; from importlib import import_module; cli = import_module('tva.cli.main'); "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # ignored in the background of a shell
        "cli._run = lambda *given: (os.kill(os.getpid(), int(sys.argv.pop())), time.sleep(30)); cli.run()"
    )
    done = subprocess.run([sys.executable, "-c", code, "compose", str(int(number))], capture_output=True, text=True)
    assert done.returncode == status
    assert done.stderr == f"tva: {word}. Completed work is kept: the same command with --resume continues.\n"


def test_a_record_cannot_send_tva_to_a_hub(files, monkeypatch):
    def refuse(*given):
        raise AssertionError("a socket was opened")

    run(keep_undo=True)
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)

    def changed(**fields):
        from safetensors import safe_open

        with safe_open("out.safetensors", "pt") as opened:
            metadata = {**opened.metadata(), **{f"tva.{name}": text for name, text in fields.items()}}
        own = {f"tva.{name}" for name in Record.__dataclass_fields__}
        metadata[RECORD] = header_digest({key: value for key, value in metadata.items() if key in own})
        save_file(load_file("out.safetensors"), "other.safetensors", metadata)
        return Path("other.safetensors")

    with pytest.raises(ValueError, match="made from hf://nobody/x, and tva goes to a hub only where you name it"):
        verify(changed(base="hf://nobody/x"))
    with pytest.raises(ValueError, match="made from hf://nobody/x, and tva goes to a hub only where you name it"):
        verify(changed(vectors='{"a": "hf://nobody/x"}'))
    with pytest.raises(ValueError, match="reads files of a hub"):
        verify(changed(recipe="fisher(a, files=('hf://nobody/x',))"))
    verify(changed(base="hf://nobody/x"), base="base.safetensors")
