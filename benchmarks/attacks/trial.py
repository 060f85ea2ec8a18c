"""Run commands on one input in a fork of this process, within limits, and say how each ended."""

import contextlib
import io
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OUT = "out.safetensors"  # what commands write
MARK = "EXECUTED"  # a file that a foreign pickle tries to make
SECONDS, MIB = 10, 500  # of the processor, and of memory above what was held before, that one command may take
WAITING = 60  # seconds that may pass, on however busy a machine
FORBIDDEN = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "pickle.find_class", "socket.connect"}
FORBIDDEN |= {"socket.getaddrinfo", "socket.gethostbyname"}


@dataclass(frozen=True)
class Input:
    """What is tried.

    Attributes:
        kind: For the table.
        name: Of the input in its kind.
        make: Writes it into a folder.
        commands: Each is run in that folder.
        named: Every error must have one of these texts.
    """

    kind: str
    name: str
    make: Callable[[Path, random.Random], Any]
    commands: Sequence[Sequence[str]]
    named: Sequence[str] = ("given",)


@dataclass
class Ending:
    """How a command ended.

    Attributes:
        how: ``done``, ``status 1``, ``refused``, or what must not be: see `BAD`.
        command: Its words.
        seconds: It took.
        mib: Of memory that it took at its peak, above what the process held before.
        text: The end of what it said.
    """

    how: str
    command: Sequence[str]
    seconds: float = 0.0
    mib: int = 0
    text: str = ""
    notes: list[str] = field(default_factory=list)


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """Make a temporary folder for what changes the current one, without warnings."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield Path(folder)
        finally:
            os.chdir(here)


def in_fork(make: Callable[[], object]) -> None:
    """Call something in a fork, so that this process, which is forked for each trial, draws nothing and has no threads.

    Raises:
        RuntimeError: It failed.
    """
    if (child := os.fork()) == 0:
        status = 1
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                make()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("the sound files cannot be made")


def _peak_mib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) // 1024


def _run(command: Sequence[str], named: Sequence[str]) -> Ending:
    """Run one command in this process."""
    from tva.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    Path("/proc/self/clear_refs").write_text("5")
    before, started = _peak_mib(), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # which ends this process
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(command)
        how = "done"
    except SystemExit as ended:
        how = {None: "done", 0: "done", 1: "status 1", 2: "refused", 3: "bug"}.get(ended.code, f"status {ended.code}")
    except BaseException as error:
        frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
        how = "traceback"
        err.write(f"\n{type(error).__name__}: {str(error)[:300]} at {' '.join(frames[-3:])}")
    signal.setitimer(signal.ITIMER_PROF, 0)
    said = err.getvalue()
    ending = Ending(how, command, time.process_time() - started, _peak_mib() - before, said[-700:])
    if how == "refused":
        if "tva: error: " not in said:
            ending.how = "without a message"
        elif not any(name in said for name in named):
            ending.how = "names no file"
    if ending.mib > MIB:
        ending.how = "memory"
    if re.search("[\x00-\x09\x0b-\x1f\x7f]", out.getvalue() + said):
        ending.notes.append("control characters")
    return ending


BAD = ("executed", "crash", "hang", "memory", "traceback", "bug", "names no file", "without a message", "output")


def _in_fork(each: Input, seed: str, folder: Path, pipe: int) -> None:
    def say(**what: Any) -> None:
        os.write(pipe, json.dumps(what, default=str).encode() + b"\n")

    os.chdir(folder)
    each.make(folder, random.Random(seed))
    data = re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())
    most = int(data[1]) * 1024 + 2 * 2**30
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, 2**30))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    events: list[str] = []
    sys.addaudithook(lambda name, args: events.append(f"{name} {str(args)[:100]}") if name in FORBIDDEN else None)
    for command in each.commands:
        if command == ["verify", OUT] and not Path(OUT).exists():
            continue
        say(start=command)
        there = set(os.listdir())
        ending = _run(command, each.named)
        new = set(os.listdir()) - there
        if events or Path(MARK).exists():
            ending.how, ending.text = "executed", f"{events[:3]} {ending.text}"
        if ending.how != "done" and (left := [name for name in new if "evaluations" not in name]):
            ending.how, ending.text = "output", f"left {left} ({ending.how}) {ending.text}"
        if command == ["verify", OUT] and ending.how != "done":
            ending.how = "output"
        if ending.notes:
            ending.how, ending.text = "output", f"{ending.notes} {ending.text}"
        say(**vars(ending))
        if ["verify", OUT] not in each.commands:
            for name in new:
                shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()


def trial(each: Input, seed: str, folder: Path) -> list[Ending]:
    """Make an input in a fork and run its commands there; a command that takes too long is killed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        status = 9
        try:
            os.close(reader)
            _in_fork(each, seed, folder, writer)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    said, end, hung = b"", time.monotonic() + WAITING, False
    while not hung:
        ready, _, _ = select.select([reader], [], [], max(0.01, end - time.monotonic()))
        if ready and not (part := os.read(reader, 2**16)):
            break
        if ready:
            said, end = said + part, time.monotonic() + WAITING
        elif time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
            hung = True
    os.close(reader)
    _, status = os.waitpid(child, 0)
    lines = [json.loads(line) for line in said.split(b"\n") if line]
    endings = [Ending(**line) for line in lines if "how" in line]
    started = [line["start"] for line in lines if "start" in line]
    if len(started) > len(endings):
        hung = hung or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF)
        endings.append(Ending("hang" if hung else "crash", started[-1], SECONDS, text=f"status {status}"))
    elif status or hung:
        endings.append(Ending("crash", ["(making the input)"], text=f"status {status}"))
    return endings
