"""Processes that run side by side on the devices there are; Ctrl-C ends them all."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tva.cli.locks import Lock

HEARTBEAT_S = 10.0
GRACE_S = 15.0  # from asking a process to end to ending it


@dataclass(frozen=True)
class Place:
    """Where one process at a time runs.

    Attributes:
        name: For the screen.
        environment: Variables that bind a process to it.
    """

    name: str
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One process to run.

    Attributes:
        name: For the screen.
        folder: Its output goes to ``fit.log`` there; ``FOLDER.lock`` is held while it runs.
        item: What ``prepare`` and ``finish`` are given.
        prepare: Called once the lock is held; gives the command, or None if there is nothing left to do.
        finish: Called with the exit status and the seconds it took.
    """

    name: str
    folder: Path
    item: Any
    prepare: Callable[[Any], list[str] | None]
    finish: Callable[[Any, int, float], Any]


@dataclass(frozen=True)
class Told:
    """Why a job did not end by itself."""

    state: Literal["elsewhere", "interrupted"]
    message: str


@dataclass
class _Running:
    job: Job
    place: Place
    lock: Lock
    process: subprocess.Popen[bytes]
    started: float


def make_places(jobs: int | None, devices: str | int | None) -> list[Place]:
    """Share devices, or the processor's cores, out.

    Args:
        jobs: Processes at a time; by default one a device, or one without devices.
        devices: ``0,1``; ``0+1,2+3`` for two each; ``cpu``; by default all that there are.

    Raises:
        ValueError: A device or the number of jobs is none.

    Example:
        >>> [place.environment["CUDA_VISIBLE_DEVICES"] for place in make_places(3, "0,2+3")]
        ['0', '2,3', '0']
    """
    named = _all_devices() if devices is None else [] if devices == "cpu" else str(devices).split(",")
    groups = [group.replace("+", ",") for group in named]
    if any(not part.strip() for group in groups for part in group.split(",")):
        raise ValueError(f"devices must read like '0,1', '0+1,2+3' or 'cpu'; found {devices!r}.")
    jobs = jobs if jobs is not None else max(1, len(groups))
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1; found {jobs}.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = {}
    if jobs > 1 and "OMP_NUM_THREADS" not in os.environ:  # processes that each take all cores slow each other down
        threads = {"OMP_NUM_THREADS": str(max(1, cores // jobs))}
    if not groups:
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if devices == "cpu" else {}
        return [Place(f"cpu {number}", {**threads, **hidden}) for number in range(jobs)]
    chosen = [groups[number % len(groups)] for number in range(jobs)]
    return [Place(f"device {group}", {**threads, "CUDA_VISIBLE_DEVICES": group}) for group in chosen]


def _all_devices() -> list[str]:
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]


def run_jobs(jobs: Sequence[Job], places: Sequence[Place]) -> dict[Path, Told]:
    """Run jobs in order, one a place at a time; a job that fails stops no other.

    A job whose lock another process holds is left to it. On Ctrl-C or SIGTERM every process is asked to end, then
    ended; the rest is not begun.

    Returns:
        By folder, why a job did not end by itself.
    """
    waiting, running, free = list(jobs), [], list(places)
    told: dict[Path, Told] = {}
    beat = time.monotonic()
    with _terminate_as_interrupt():
        try:
            while waiting or running:
                moved = False
                while waiting and free:
                    moved, job = True, waiting.pop(0)
                    lock = Lock(job.folder.with_name(job.folder.name + ".lock"))
                    if not lock.acquire():
                        who = lock.holder()
                        told[job.folder] = Told("elsewhere", f"process {who.get('pid')} on {who.get('host')} has it")
                        continue
                    started = _start(job, free[0], lock)
                    if started is not None:
                        running.append(started)
                        free.pop(0)
                for entry in [entry for entry in running if entry.process.poll() is not None]:
                    moved = True
                    running.remove(entry)
                    free.append(entry.place)
                    _finish(entry)
                if time.monotonic() - beat > HEARTBEAT_S:
                    beat = time.monotonic()
                    for entry in [entry for entry in running if not entry.lock.refresh()]:
                        _end([entry])
                        running.remove(entry)
                        free.append(entry.place)
                        told[entry.job.folder] = Told("elsewhere", "taken over by another process while this one slept")
                if not moved:
                    time.sleep(0.05)
        except KeyboardInterrupt:
            print(f"interrupted; ending {len(running)}, {len(waiting)} not begun", flush=True)
            told |= {entry.job.folder: Told("interrupted", "the same command goes on with it") for entry in running}
        finally:
            _end(running)
            for entry in running:
                entry.lock.release()
    return told


def _start(job: Job, place: Place, lock: Lock) -> _Running | None:
    command = None
    try:
        command = job.prepare(job.item)
    finally:
        if command is None:
            lock.release()
    if command is None:
        return None
    environment = {**os.environ, **place.environment}
    environment.pop("PL_GLOBAL_SEED", None)
    with open(job.folder / "fit.log", "ab") as log:
        log.write(f"$ {' '.join(command)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    how = "goes on" if "--ckpt_path" in command else "begins"
    print(f"{time.strftime('%H:%M:%S')} {job.name} {how} on {place.name}", flush=True)
    return _Running(job, place, lock, process, time.monotonic())


def _finish(entry: _Running) -> None:
    seconds = time.monotonic() - entry.started
    result = entry.job.finish(entry.job.item, entry.process.returncode, seconds)
    entry.lock.release()
    print(f"{time.strftime('%H:%M:%S')} {entry.job.name} {result.state} after {seconds:.0f} s", flush=True)


def _end(running: Sequence[_Running]) -> None:
    """Ask processes and all that they started to end, then end them."""
    for number, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        for entry in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(entry.process.pid, number)
        until = time.monotonic() + patience
        with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C waits no longer
            while time.monotonic() < until and any(entry.process.poll() is None for entry in running):
                time.sleep(0.05)


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
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
