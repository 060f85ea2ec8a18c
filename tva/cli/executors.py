"""Engines that run one function on many items side by side: processes of this machine, or a Ray cluster."""

from __future__ import annotations

import os
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tva.sizes import parse_bytes
from tva.version import __version__

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Worker:
    """Where a function runs.

    Attributes:
        name: For the screen.
        environment: Variables for its processes, which bind them to their devices.
        stopped: Return whether the run was interrupted, so that its processes must end.
    """

    name: str
    environment: Mapping[str, str] = field(default_factory=dict)
    stopped: Callable[[], bool] = lambda: False


class Executor(ABC):
    """Runs one function on many items; a call that raises stops no other.

    Attributes:
        num_workers: Calls at a time; None where a cluster decides.
    """

    num_workers: int | None

    @abstractmethod
    def run(self, function: Callable[[T, Worker], R], items: Sequence[T]) -> Iterator[tuple[T, R | Exception]]:
        """Yield each item with what the function returned or raised, in the order in which they end.

        Closing the iterator, or an exception in the caller, ends all calls.
        """


class LocalExecutor(Executor):
    """Runs calls in threads of this process, whose own processes do the work.

    Args:
        jobs: Calls at a time; by default one a device, or one without devices.
        devices: ``0,1``; ``0+1,2+3`` for two each; ``cpu``; by default all that there are.

    Raises:
        ValueError: ``jobs`` or ``devices`` cannot be understood.

    Example:
        >>> [worker.environment["CUDA_VISIBLE_DEVICES"] for worker in LocalExecutor(3, "0,2+3").workers]
        ['0', '2,3', '0']
    """

    def __init__(self, jobs: int | None = None, devices: str | int | None = None) -> None:
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
        self._stop = threading.Event()
        self.num_workers = jobs
        self.workers = []
        for number in range(jobs):
            group = groups[number % len(groups)] if groups else ""
            bound = {"CUDA_VISIBLE_DEVICES": group} if groups or devices == "cpu" else {}
            name = f"device {group}" if groups else f"cpu {number}"
            self.workers.append(Worker(name, {**threads, **bound}, self._stop.is_set))

    def run(self, function: Callable[[T, Worker], R], items: Sequence[T]) -> Iterator[tuple[T, R | Exception]]:
        self._stop.clear()
        free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self.workers:
            free.put(worker)

        def call(item: T) -> R:
            worker = free.get()
            try:
                return function(item, worker)
            finally:
                free.put(worker)

        with ThreadPoolExecutor(len(self.workers)) as pool:
            futures = {pool.submit(call, item): item for item in items}
            try:
                for future in as_completed(futures):
                    error = future.exception()
                    if error is not None and not isinstance(error, Exception):
                        raise error
                    yield futures[future], future.result() if error is None else error
            finally:
                self._stop.set()
                pool.shutdown(cancel_futures=True)  # waits for the functions, which see that they must end


class RayExecutor(Executor):
    """Runs calls as tasks of a Ray cluster; a task whose node fails is run again on another one.

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

    num_workers = None

    def __init__(self, address: str | None = None, cpus: float = 1, gpus: float = 0, memory: str | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise ValueError(
                "The engine 'ray' needs Ray, which is not installed: pip install 'tva[cluster]'."
            ) from error
        self._ray = ray
        if not ray.is_initialized():
            try:
                ray.init(address=address, logging_level="error", log_to_driver=False)
            except (ConnectionError, ValueError, RuntimeError) as error:
                reason = f"No Ray cluster answers at {address!r}: {error} Start one with 'ray start --head'."
                raise ValueError(reason) from error
        wanted = {"CPU": cpus, "GPU": gpus, "memory": parse_bytes(memory, "memory") if memory else 0}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(node.get(key, 0) >= value for key, value in wanted.items()) for node in nodes):
            most = {key: max((node.get(key, 0) for node in nodes), default=0) for key in wanted}
            raise ValueError(f"Each fit was to have {wanted}, and the nodes of the cluster have at most {most}.")
        self._options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": 3}
        self._options |= {"memory": wanted["memory"]} if memory else {}

    def run(self, function: Callable[[T, Worker], R], items: Sequence[T]) -> Iterator[tuple[T, R | Exception]]:
        ray = self._ray
        remote = ray.remote(_call_there).options(**self._options)
        tasks = {remote.remote(function, item, __version__): item for item in items}
        try:
            while tasks:
                ended, _ = ray.wait(list(tasks))
                for task in ended:
                    item = tasks.pop(task)
                    try:
                        found: R | Exception = ray.get(task)
                    except ray.exceptions.RayError as error:
                        found = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
                    yield item, found
        finally:
            for task in tasks:
                ray.cancel(task, force=False)  # raises KeyboardInterrupt in the call, which ends its processes


def _call_there(function: Callable[[Any, Worker], Any], item: Any, version: str) -> Any:
    """Call the function on a node of the cluster, if the node has the driver's version of tva."""
    if version != __version__:
        raise ValueError(f"This node has tva {__version__}, and the command runs {version}. Install the same on all.")
    import ray

    return function(item, Worker(f"node {ray.util.get_node_ip_address()}"))


def make_executor(engine: str, jobs: int | None, devices: str | int | None, per_call: Mapping[str, Any]) -> Executor:
    """Make the engine that a command names.

    Args:
        engine: ``local``, ``ray`` (on this machine), or ``ray:ADDRESS``.
        jobs: As for `LocalExecutor`.
        devices: As for `LocalExecutor`.
        per_call: ``cpus``, ``gpus`` and ``memory``, as for `RayExecutor`.

    Raises:
        ValueError: The engine is another one, or was given the other one's options.
    """
    name, _, address = engine.partition(":")
    if name == "local" and not address:
        if per_call:
            raise ValueError(
                f"The engine 'local' takes jobs and devices; {sorted(per_call)} belong to the engine 'ray'."
            )
        return LocalExecutor(jobs, devices)
    if name != "ray":
        raise ValueError(f"engine must be 'local', 'ray' or 'ray:ADDRESS'; found {engine!r}.")
    if jobs is not None or devices is not None:
        raise ValueError("The engine 'ray' decides itself what runs where: leave jobs and devices out.")
    odd = sorted(per_call.keys() - {"cpus", "gpus", "memory"})
    if odd:
        raise ValueError(f"What a fit needs is given as cpus, gpus and memory; found {odd}.")
    return RayExecutor(address or None, **per_call)


def _all_devices() -> list[str]:
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]
