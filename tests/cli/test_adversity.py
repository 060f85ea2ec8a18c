"""What the system refuses is one clear error with the path: status 2, no signal, nothing left under a final name."""

import contextlib
import errno
import importlib
import io
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from tva import TaskVector, save_weights
from tva.checkpoints import lazy
from tva.cli.main import main
from tva.compose import compose

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="limits are set in a fork")
OUT = "out.safetensors"
COMPOSE = ["compose", "--base", "base.safetensors", "--vectors.a", "a.tv.safetensors", "--recipe"]
COMMANDS = {
    "compose": [*COMPOSE, "0.5*a", "--output", OUT],
    "compose to a folder": [*COMPOSE, "0.5*a", "--output", "out"],
    "tsv": [*COMPOSE, "tsv(a)", "--output", OUT],
    "extract": ["extract", "--base", "base.safetensors", "--finetuned", "tuned.safetensors", "--output", OUT],
    "extract --rank": ["extract", "--base", "base.safetensors", "--finetuned", "tuned.safetensors", "--output", "out",
                       "--rank", "2"],
    "compress": ["compress", "a.tv.safetensors", "--encoding", "int8", "--output", OUT],
    "inspect": ["inspect", "a.tv.safetensors"],
    "inspect a model": ["inspect", "base.safetensors"],
    "compare": ["compare", "a.tv.safetensors", "b.tv.safetensors"],
    "verify": ["verify", "edited.safetensors"],
    "verify a vector": ["verify", "a.tv.safetensors"],
    "revert": ["revert", "edited.safetensors", "--output", OUT],
}  # fmt: skip
WRITING = [name for name, words in COMMANDS.items() if "--output" in words]


@pytest.fixture(scope="module")
def made():
    """Make inputs of several pages a tensor, in a folder that every user may read."""
    folder, here = Path(tempfile.mkdtemp(prefix="tva-test-")), Path.cwd()
    folder.chmod(0o777)
    os.chdir(folder)
    base = {f"layers.{at}.weight": torch.randn(96, 96, generator=torch.Generator().manual_seed(at)) for at in range(6)}
    save_weights(base, "base.safetensors")
    for name in ("a", "b"):
        tuned = {key: tensor + 0.1 * torch.randn(96, 96) for key, tensor in base.items()}
        save_weights(tuned, "tuned.safetensors")
        TaskVector.between(base, tuned).save(f"{name}.tv.safetensors")
    compose("base.safetensors", {"a": "a.tv.safetensors"}, "a", "edited.safetensors", keep_undo=True)
    shutil.copytree(folder, folder / "copy")
    os.chdir(folder / "copy")
    with contextlib.redirect_stdout(io.StringIO()):  # imports, which another user may not read
        for words in COMMANDS.values():
            main(words)
            for made in (OUT, "out"):
                shutil.rmtree(made, ignore_errors=True) if Path(made).is_dir() else Path(made).unlink(missing_ok=True)
    os.chdir(folder)
    shutil.rmtree("copy")
    yield folder
    os.chdir(here)
    shutil.rmtree(folder)


@pytest.fixture
def files(made, tmp_path, monkeypatch):
    """A copy of the inputs for one test."""
    shutil.copytree(made, tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    return tmp_path / "files"


def in_fork(words, prepare=lambda: None, check=lambda status: None):
    """Run a command in a fork; return how it ended, and what it said on standard error."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        status, said = 0, io.StringIO()
        try:
            torch.set_num_threads(1)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
                prepare()
                main(list(words))
        except SystemExit as ended:
            status = ended.code
        except BaseException as error:
            status = 99
            said.write(repr(error))
        if found := check(status):
            said.write(f"opened {found}")
        os.write(writer, said.getvalue()[-3000:].encode())
        os._exit(status)
    os.close(writer)
    said = b""
    while part := os.read(reader, 4096):
        said += part
    os.close(reader)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.decode()


def left(before):
    return {name for name in set(os.listdir()) - before if not name.startswith(".")}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_input_that_is_cut_while_it_is_read_is_an_error(files, name, monkeypatch):
    """No mapped page may be missing: that would be a signal, SIGBUS, in place of a message."""
    words, before = COMMANDS[name], set(os.listdir())
    cut = next(word for word in words if word.endswith(".safetensors") and word != OUT)
    monkeypatch.setattr(lazy, "MAPPED_BYTES", 1)
    read, mapped = lazy.OpenFile.read_into, lazy.OpenFile.map

    def reading(self, buffer, offset):
        if self.path.name == cut and offset > 8000:
            os.truncate(cut, 8192)
        return read(self, buffer, offset)

    def mapping(self, offset, length):
        found = mapped(self, offset, length)
        os.truncate(cut, 8192)
        return found

    monkeypatch.setattr(lazy.OpenFile, "read_into", reading)
    monkeypatch.setattr(lazy.OpenFile, "map", mapping)
    status, said = in_fork(words)
    assert status == 2, said
    assert f"{cut} ended at byte" in said
    assert left(before) == set()


@pytest.mark.parametrize(
    ("name", "code"),
    [
        *((name, errno.ENOSPC) for name in WRITING),
        *(("compose", code) for code in (errno.EDQUOT, errno.EROFS, errno.EIO)),
    ],
)
def test_a_disk_that_takes_no_more_is_an_error_with_the_path(files, name, code, monkeypatch):
    def refuse(*given, **options):
        raise OSError(code, os.strerror(code))

    before = set(os.listdir())

    def prepare():
        for call in ("pwrite", "posix_fallocate", "ftruncate", "fsync"):
            monkeypatch.setattr(os, call, refuse)

    status, said = in_fork(COMMANDS[name], prepare)
    assert status == 2, said
    assert "out" in said
    assert os.strerror(code) in said
    assert left(before) == set()


@pytest.mark.parametrize(("name", "home"), [*((name, None) for name in WRITING), ("compose", "/nonexistent")])
def test_a_folder_that_another_user_owns_is_an_error_with_the_path(made, name, home, monkeypatch):
    """Such a user, as of a container, may have neither a home folder nor a name; elsewhere the command works."""
    if os.geteuid() != 0:
        pytest.skip("becomes another user")
    monkeypatch.chdir(made)
    before = set(os.listdir())

    def prepare():
        os.environ.pop("TVA_CACHE", None)
        os.environ.pop("HOME", None)
        if home:
            os.environ["HOME"] = home
        os.setgroups([])
        os.setgid(45678)
        os.setuid(45678)

    made.chmod(0o755)
    try:
        status, said = in_fork(COMMANDS[name], prepare)
        assert status == 2, said
        assert "out" in said
        assert "ermission denied" in said
    finally:
        made.chmod(0o777)
    assert left(before) == set()
    status, said = in_fork(COMMANDS[name], prepare)
    assert status == 0, said
    (new,) = {name for name in left(before) if "undo" not in name}
    shutil.rmtree(new) if Path(new).is_dir() else Path(new).unlink()


@pytest.mark.parametrize("name", COMMANDS)
def test_too_few_open_files_is_an_error_with_the_path(files, name, monkeypatch):
    cli = importlib.import_module("tva.cli.main")
    load = cli._load

    def limit(*given):
        module = load(*given)
        os.close(free := os.dup(0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, 4096))
        return module

    def prepare():  # what is to be imported is there
        monkeypatch.setattr(cli, "_load", limit)

    before = set(os.listdir())
    status, said = in_fork(COMMANDS[name], prepare)
    assert status == 2, said
    assert "Too many open files" in said
    assert ".safetensors" in said
    assert left(before) == set()


@pytest.mark.parametrize("name", ["compose", "compress"])
def test_too_little_memory_is_an_error_that_says_so(files, name):
    large = {"w": torch.zeros(2**22)}
    save_weights(large, "base.safetensors")
    save_weights({"w": large["w"] + 1}, "tuned.safetensors")
    TaskVector.between(large, {"w": large["w"] + 1}).save("a.tv.safetensors")

    def prepare():
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + 2**16, resource.RLIM_INFINITY))

    before = set(os.listdir())
    status, said = in_fork(COMMANDS[name], prepare)
    assert (status == 2 and "memory" in said) or status == 0, said
    assert status == 0 or left(before) == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_an_input_that_has_vanished_is_an_error_with_the_path(files, name):
    words, before = COMMANDS[name], set(os.listdir())
    gone = next(word for word in words if word.endswith(".safetensors") and word != OUT)
    Path(gone).unlink()
    status, said = in_fork(words)
    assert status == 2, said
    assert gone in said
    assert left(before) == set()


OTHERS = {
    "match": ["vectors", "match", "edited.safetensors", "a.tv.safetensors", "--base", "base.safetensors"],
    "ls": ["vectors", "ls", "."],
    "init": ["init", "merge"],
    "paper": ["paper", "list"],
    "plan": [*COMPOSE, "ties(a)", "--output", OUT, "--plan"],
}  # fmt: skip


@pytest.mark.parametrize("name", [*COMMANDS, *OTHERS])
def test_a_command_that_names_no_hub_opens_no_socket(files, name):
    """Also where the hub may be asked: HF_HUB_OFFLINE is not set."""
    seen = []

    def prepare():
        os.environ.pop("HF_HUB_OFFLINE", None)
        sys.addaudithook(lambda event, given: seen.append(event) if event.startswith(("socket.", "urllib.")) else None)

    def check(status):
        return [event for event in seen if event != "socket.gethostname"]  # which names temporary files

    status, said = in_fork({**COMMANDS, **OTHERS}[name], prepare, check)
    assert status == 0, said
    assert "opened" not in said


@pytest.mark.parametrize("name", WRITING)
def test_a_clock_that_goes_backwards_changes_nothing(files, name, monkeypatch):
    clock = iter(range(10**9, 0, -(10**5)))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    assert in_fork(COMMANDS[name])[0] == 0
