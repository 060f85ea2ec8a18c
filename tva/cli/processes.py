"""Run commands that end with the command that started them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tva.executors import Worker

GRACE_S = 15.0  # from asking a process to end to ending it


def run_process(command: Sequence[str], log: Path, worker: Worker) -> int:
    """Run a command with its output added to a file, and return its exit status.

    Raises:
        KeyboardInterrupt: The run was interrupted; the process and all that it started have ended.
    """
    environment = {**os.environ, **worker.environment}
    environment.pop("PL_GLOBAL_SEED", None)
    with open(log, "ab") as output:
        output.write(f"$ {' '.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        while process.poll() is None:
            if worker.stopped():
                raise KeyboardInterrupt
            time.sleep(0.05)
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL) if process.poll() is None else ():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
    return process.returncode


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM, which schedulers send, do what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def only_one(folder: Path, what: str) -> Iterator[None]:
    """Refuse to go on where another process is at work in a folder; the mark ends with the process.

    Raises:
        ValueError: There is one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".{what}", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            who = file.read() or "another process"
            raise ValueError(f"{who} runs tva {what} in {folder}. Wait for it, or use another output.") from error
        file.truncate(0)
        file.write(f"Process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
