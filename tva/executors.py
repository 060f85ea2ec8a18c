"""Engines that run one function on many items side by side: threads or processes of this machine, or a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import socket
import sys
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures import Executor as Pool
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

from tva.sizes import parse_bytes
from tva.version import __version__

T = TypeVar("T")
R = TypeVar("R")
CANCELS, CANCEL_S = 20, 2.0  # how often a call of a cluster is interrupted, and how far apart


@dataclass(frozen=True)
class Worker:
    """Where a function runs: its name, variables that bind its processes to devices, and whether it is to end them."""

    name: str
    environment: Mapping[str, str] = field(default_factory=dict)
    stopped: Callable[[], bool] = bool


class Executor(ABC):
    """Runs one function on many items; a call that raises stops no other.

    Attributes:
        num_workers: Calls at a time.
        num_nodes: Machines that they run on.
    """

    num_workers: int
    num_nodes = 1

    @abstractmethod
    def run(self, function: Callable[[T, Worker], R], items: Sequence[T]) -> Iterator[tuple[T, R | Exception]]:
        """Yield each item with what the function returned or raised, in the order in which they end.

        Closing the iterator, or an exception in the caller, ends all calls.
        """

    def check(self, folder: Path) -> None:  # noqa: B027 (threads and processes of this machine see all)
        """Raise a ValueError unless every worker has this version of tva and sees a folder, made if need be."""

    def close(self) -> None:  # noqa: B027 (Ray keeps its own)
        """End the workers."""


class LocalExecutor(Executor):
    """Runs calls in threads of this process, whose own processes do the work, or in processes that stay between runs.

    Args:
        jobs: Calls at a time; by default one a device, or one without devices.
        devices: ``0,1``; ``0+1,2+3`` for two each; ``cpu``; by default all that there are.
        processes: Call in processes; what they keep in memory serves later calls.

    Raises:
        ValueError: ``jobs`` or ``devices`` cannot be understood.

    Example:
        >>> [worker.environment["CUDA_VISIBLE_DEVICES"] for worker in LocalExecutor(3, "0,2+3").workers]
        ['0', '2,3', '0']
    """

    def __init__(self, jobs: int | None = None, devices: str | int | None = None, processes: bool = False) -> None:
        named = _all_devices() if devices is None else [] if devices == "cpu" else str(devices).split(",")
        groups = [group.replace("+", ",") for group in named]
        if any(not part.strip() for group in groups for part in group.split(",")):
            raise ValueError(f"devices must read like '0,1', '0+1,2+3' or 'cpu'; found {devices!r}.")
        self.num_workers = jobs = jobs if jobs is not None else max(1, len(groups))
        if jobs < 1:
            raise ValueError(f"jobs must be at least 1; found {jobs}.")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = {}
        if jobs > 1 and "OMP_NUM_THREADS" not in os.environ:  # processes that each take all cores slow each other down
            threads = {"OMP_NUM_THREADS": str(max(1, cores // jobs))}
        self._stop = threading.Event()
        self.workers = []
        for number in range(jobs):
            group = groups[number % len(groups)] if groups else ""
            bound = {"CUDA_VISIBLE_DEVICES": group} if groups or devices == "cpu" else {}
            name = f"device {group}" if groups else f"cpu {number}"
            stopped = bool if processes else self._stop.is_set  # processes are ended
            self.workers.append(Worker(name, {**threads, **bound}, stopped))
        self._pool: ProcessPoolExecutor | None = None
        self._processes = processes

    def run(self, function: Callable[[T, Worker], R], items: Sequence[T]) -> Iterator[tuple[T, R | Exception]]:
        self._stop.clear()
        pool = self._pool or self._open()
        try:
            futures = {pool.submit(_call_here, function, item): item for item in items}
            for future in as_completed(list(futures)):
                error = future.exception()
                if isinstance(error, BrokenExecutor):  # and so are all that are left
                    self.close()
                    error = OSError("a process of tva was ended from outside, most likely for lack of memory")
                if error is not None and not isinstance(error, Exception):
                    raise error
                yield futures.pop(future), future.result() if error is None else error
        except BaseException:
            self.close()
            raise
        finally:
            self._stop.set()
            if self._pool is None:
                pool.shutdown(cancel_futures=True)  # waits for the functions, which see that they must end

    def _open(self) -> Pool:
        context = multiprocessing.get_context("spawn") if self._processes else None
        free: Any = context.SimpleQueue() if context else queue.SimpleQueue()
        for worker in self.workers:
            free.put(worker)
        if context is None:
            return ThreadPoolExecutor(self.num_workers, initializer=_become, initargs=(free, False))
        self._pool = ProcessPoolExecutor(self.num_workers, context, _become, (free, True))
        return self._pool

    def close(self) -> None:
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


class RayExecutor(Executor):
    """Runs calls as tasks of a Ray cluster; a task whose node fails is run again on another one, three times at most.

    All nodes must see the same folders under the same paths, and have this version of tva.

    Args:
        address: Of a running cluster, as ``ray.init`` takes it, such as ``auto``; None starts Ray on this machine.
        cpus: Cores for each call.
        gpus: Devices for each call.
        memory: Of the node, for each call, such as ``8GiB``.

    Raises:
        ValueError: Ray is not installed, there is no cluster at the address, or no node has what one call needs.

    Source: https://docs.ray.io/en/latest/ray-core/tasks.html
    """

    def __init__(self, address: str | None = None, cpus: float = 1, gpus: float = 0, memory: str | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise ValueError(
                "The engine 'ray' needs Ray, which is not installed: pip install 'tva[cluster]'."
            ) from error
        self._ray = ray
        if not ray.is_initialized():
            host, _, port = (address or "").removeprefix("ray://").rpartition(":")
            try:
                if host and port.isdecimal():  # Ray itself would try for minutes
                    socket.create_connection((host, int(port)), timeout=10).close()
                ray.init(address=address, logging_level="error", log_to_driver=False)
            except (OSError, ValueError, RuntimeError) as error:
                reason = f"No Ray cluster answers at {address!r} ({error}). Start one with 'ray start --head'."
                raise ValueError(reason) from error
        wanted = {"CPU": cpus, "GPU": gpus, "memory": parse_bytes(memory, "memory") if memory else 0}
        nodes = [node["Resources"] for node in self._nodes()]
        fitting = [min(int(node.get(key, 0) // value) for key, value in wanted.items() if value) for node in nodes]
        if not any(fitting):
            most = {key: max((node.get(key, 0) for node in nodes), default=0) for key in wanted}
            raise ValueError(f"Each call was to have {wanted}, and the nodes of the cluster have at most {most}.")
        self.num_workers, self.num_nodes = sum(fitting), sum(map(bool, fitting))
        self._options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": 3}
        self._options |= {"memory": wanted["memory"]} if memory else {}

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def check(self, folder: Path) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        folder.mkdir(parents=True, exist_ok=True)
        mark = folder.absolute() / f".seen-{uuid.uuid4().hex}"
        mark.touch()
        probe, dumps = self._ray.remote(_call_there), self._ray.cloudpickle.dumps
        try:
            for node in self._nodes():
                there = probe.options(num_cpus=0, scheduling_strategy=On(node["NodeID"], soft=False))
                try:
                    seen = there.remote(dumps(_see), dumps(str(mark)), __version__, os.getcwd(), sys.path)
                    self._ray.get(seen, timeout=120)
                except (self._ray.exceptions.RayTaskError, TimeoutError) as error:
                    reason = getattr(error, "cause", None) or error
                    raise ValueError(f"The node {node['NodeManagerAddress']} cannot take part: {reason}") from error
                except self._ray.exceptions.RayError:  # it has gone meanwhile
                    continue
        finally:
            mark.unlink()

    def run(self, function: Callable[[T, Worker], R], items: Sequence[T]) -> Iterator[tuple[T, R | Exception]]:
        ray = self._ray
        remote, dumps = ray.remote(_call_there).options(**self._options), ray.cloudpickle.dumps
        called, here = ray.put(dumps(function)), (__version__, os.getcwd(), sys.path)
        tasks = {remote.remote(called, dumps(item), *here): item for item in items}
        try:
            while tasks:
                ended, _ = ray.wait(list(tasks))
                for task in ended:
                    item = tasks.pop(task)
                    try:
                        found: R | Exception = ray.get(task)
                    except ray.exceptions.RayTaskError as error:
                        found = error.cause or error
                    except ray.exceptions.RayError as error:
                        found = OSError(f"Ray lost a call, also when it was tried again: {error}")
                    yield item, found
        finally:
            self._cancel(list(tasks))

    def _cancel(self, tasks: list[Any]) -> None:
        """Interrupt calls, which end their processes; and again, as Ray loses some that come as one begins."""
        for _ in range(CANCELS if tasks else 0):
            for task in tasks:
                self._ray.cancel(task, force=False)
            _, tasks = self._ray.wait(tasks, num_returns=len(tasks), timeout=CANCEL_S)
            if not tasks:
                break


_here = threading.local()  # the worker that a thread, or a process's main thread, is


def _become(free: Any, is_process: bool) -> None:
    _here.worker = free.get()
    if is_process:
        os.environ.update(_here.worker.environment)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command, which gets it too, ends its processes
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _call_here(function: Callable[[T, Worker], R], item: T) -> R:
    return function(item, _here.worker)


def _call_there(function: bytes, item: bytes, version: str, folder: str, path: Sequence[str]) -> Any:
    """Call a pickled function on a node as in the driver: of one version, in its folder, with its modules."""
    if version != __version__:
        raise ValueError(f"it has tva {__version__}, and the command runs {version}. Install the same on all.")
    import ray

    if not os.path.isdir(folder):
        raise ValueError(f"it does not see {folder}, where the command runs. Run it in a folder that all nodes share.")
    os.chdir(folder)
    sys.path += [place for place in path if place not in sys.path]  # before unpickling, which may import from there
    call, one = ray.cloudpickle.loads(function), ray.cloudpickle.loads(item)
    before = signal.signal(signal.SIGINT, _interrupt_once)
    try:
        return call(one, Worker(f"node {ray.util.get_node_ip_address()}"))
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt_once(number: int, frame: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would cut short what ends the processes
    raise KeyboardInterrupt


def _see(mark: str, worker: Worker) -> None:
    if not os.path.exists(mark):
        folder = os.path.dirname(mark)
        raise ValueError(f"it does not see {folder}. Give an output in a folder that all nodes share.")


def make_executor(
    engine: str,
    jobs: int | None = None,
    devices: str | int | None = None,
    per_call: Mapping[str, Any] | None = None,
    processes: bool = False,
) -> Executor:
    """Make the engine that a command names.

    Args:
        engine: ``local``, ``local:N`` (N calls at a time), ``ray`` (on this machine), or ``ray:ADDRESS``.
        jobs: As for `LocalExecutor`.
        devices: Likewise.
        per_call: ``cpus``, ``gpus`` and ``memory``, as for `RayExecutor`.
        processes: As for `LocalExecutor`; Ray's calls are in processes.

    Raises:
        ValueError: The engine is another one, or was given the other one's options.
    """
    name, _, address = engine.partition(":")
    if name == "local" and (not address or address.isdecimal()):
        if address and jobs is not None:
            raise ValueError(f"{engine} says how many run at a time, and jobs={jobs} too. Leave one out.")
        if per_call:
            options = sorted(per_call)
            raise ValueError(f"The engine 'local' takes jobs and devices; {options} belong to the engine 'ray'.")
        return LocalExecutor(int(address) if address else jobs, devices, processes)
    if name != "ray":
        raise ValueError(f"engine must be 'local', 'local:N', 'ray' or 'ray:ADDRESS'; found {engine!r}.")
    if jobs is not None or devices is not None:
        raise ValueError("The engine 'ray' decides itself what runs where: leave jobs and devices out.")
    odd = sorted((per_call or {}).keys() - {"cpus", "gpus", "memory"})
    if odd:
        raise ValueError(f"What a call needs is given as cpus, gpus and memory; found {odd}.")
    return RayExecutor(address or None, **(per_call or {}))


def _all_devices() -> list[str]:
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]
