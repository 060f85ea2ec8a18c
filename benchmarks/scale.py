"""Predict composes and searches on many workers by discrete events, from constants that are measured here.

A worker takes one call after the other, a shard to read, compute and write or some batches to evaluate; the first
process hands calls out one at a time; readers of one disk share its bandwidth. The prediction for a search is compared
with the clock at one worker and at two, and the status is 1 if one is off by more than 15 %.

    python benchmarks/scale.py                        # two minutes on two idle cores
    python benchmarks/scale.py --disk 40e9 --nic 3e9  # bytes a second of the shared disk, and of one node
"""

import argparse
import collections
import functools
import heapq
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker has one core

import lightning as L
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

import tva.edit.workers
from tva import TaskVector
from tva.compose.apply import compose
from tva.edit.trainer import edit_model
from tva.executors import LocalExecutor
from tva.search import Search

TOLERANCE = 0.15
SLOTS = 16  # calls at a time on a node: its cores
NUM_BATCHES, BATCH, WIDTH = 24, 64, 1024
TIMES: dict[str, dict[str, float]] = {}
LONGEST: list[float] = []


def simulate(calls, nodes, slots=1, message=0.0, nic=float("inf"), disk=float("inf")):
    """Return the seconds from the first call handed out to the last result.

    Args:
        calls: Of each call the bytes that it reads, and its other seconds.
        nodes: How many machines there are.
        slots: Calls at a time on each.
        message: Seconds of the first process for each call.
        nic: Bytes a second of all readers of one node together.
        disk: Bytes a second of all readers together.
    """
    free, clock, handed, waiting = [slots] * nodes, 0.0, 0.0, list(reversed(calls))
    reading: list[list] = []  # of each reader bytes left, node, and seconds afterwards
    computing: list[tuple[float, int]] = []  # when calls end, and where
    while waiting or reading or computing:
        if waiting and any(free) and handed <= clock:
            num_bytes, seconds = waiting.pop()
            node = free.index(max(free))
            free[node] -= 1
            handed = clock + message
            if num_bytes:
                reading.append([float(num_bytes), node, seconds])
            else:
                heapq.heappush(computing, (clock + seconds, node))
            continue
        readers = collections.Counter(node for _, node, _ in reading)
        speeds = [min(nic / readers[node], disk / len(reading)) for _, node, _ in reading]
        ends = [clock + left / speed for (left, _, _), speed in zip(reading, speeds, strict=True)]
        hand = [handed] if waiting and any(free) else []
        then = min([*ends, *(end for end, _ in computing[:1]), *hand])
        for reader, speed in zip(reading, speeds, strict=True):
            reader[0] -= speed * (then - clock)
        clock = then
        for (_, node, seconds), end in zip(reading, ends, strict=True):
            if end <= clock:
                heapq.heappush(computing, (clock + seconds, node))
        reading = [reader for reader, end in zip(reading, ends, strict=True) if end > clock]
        while computing and computing[0][0] <= clock:
            free[heapq.heappop(computing)[1]] += 1
    return clock


class Measured(LocalExecutor):
    """Notes the processor seconds of the longest call of each run, which other work on the machine does not change."""

    def run(self, function, items):
        longest = 0.0
        for item, found in super().run(functools.partial(_with_seconds, function), items):
            seconds, found = (0.0, found) if isinstance(found, Exception) else found
            longest = max(longest, seconds)
            yield item, found
        LONGEST.append(longest)


def _with_seconds(function, item, worker):
    started = time.process_time()
    found = function(item, worker)
    return time.process_time() - started, found


class Images(Dataset):
    """Examples that take a while to decode."""

    def __len__(self):
        return NUM_BATCHES * BATCH

    def __getitem__(self, index):
        values = torch.rand(64, 64, generator=torch.Generator().manual_seed(index))
        return torch.linalg.matrix_power(values / 32, 3).flatten()[:WIDTH], index % 10


class Data(L.LightningDataModule):
    """One task."""

    def val_dataloader(self):
        return DataLoader(Images(), BATCH)

    test_dataloader = val_dataloader


class Net(L.LightningModule):
    """Three wide layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        wide = [layer for _ in range(3) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
        self.net = nn.Sequential(*wide, nn.Linear(WIDTH, 10))

    def forward(self, images):
        return self.net(images)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        correct = self(images).argmax(-1) == labels
        self.log("accuracy", correct.float().mean())
        return {"correct": correct}

    test_step = validation_step


class Timed(Search):
    """Passes with several numbers of candidates, each with the clock: the first one opens the workers."""

    def run(self, problem):
        points = self.axes(40)[1:]
        for name, first, count in (("opening", 0, 1), ("one", 1, 1), ("two", 2, 1), ("many", 3, 20)):
            LONGEST.clear()
            started, spent = time.perf_counter(), time.process_time()
            problem.score(points[first : first + count])
            own = time.process_time() - spent
            TIMES[name] = {"wall": time.perf_counter() - started, "cpu": own + sum(LONGEST)}
        return problem.choose()


def time_search(folder, engine):
    """Return the seconds of passes with one candidate and with twenty."""
    number = int(engine.partition(":")[2] or 1)
    tva.edit.workers.make_executor = lambda *_, **__: Measured(number, "cpu", processes=True)
    model = Net()
    vector = TaskVector.between(model.state_dict(), {k: v + 1e-3 for k, v in model.state_dict().items()})
    edit_model(
        model, vectors={"a": vector}, output=folder / engine.replace(":", "-"), targets={"task": Data()},
        allow_shared_examples=True, search=Timed(), maximize="task/accuracy", random_seed=None, engine=engine,
    )  # fmt: skip
    return dict(TIMES)


def time_compose(folder, width=2048):
    """Return the bytes of output that one core reads for, computes and writes a second, from files in memory."""
    base = {f"layers.{layer}.w": torch.ones(width, width) for layer in range(8)}
    save_file(base, folder / "base.safetensors")
    save_file({name: tensor + 0.5 for name, tensor in base.items()}, folder / "a.safetensors")
    options = {"base": folder / "base.safetensors", "vectors": {"a": folder / "a.safetensors"}, "recipe": "0.3 * a"}
    compose(**options, output=folder / "first")
    started = time.process_time()
    report = compose(**options, output=folder / "second")
    return report.num_bytes / (time.process_time() - started)


def time_decoding():
    """Return the seconds to read and decode one batch."""
    loader = iter(Data().val_dataloader())
    next(loader)
    started = time.process_time()
    for _ in range(4):
        next(loader)
    return (time.process_time() - started) / 4


def predict_search(workers, constants, num_batches, num_candidates):
    """Return the seconds of a pass whose batches have been decoded."""
    each = [len(range(place, num_batches, workers)) for place in range(workers)]
    seconds = [constants["call_s"] + count * num_candidates * constants["forward_s"] for count in each]
    return simulate([(0, one) for one in seconds], workers, message=constants["message_s"])


def main():
    """Measure, compare, predict, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disk", type=float, default=40e9, help="bytes a second of the shared disk")
    parser.add_argument("--nic", type=float, default=3e9, help="bytes a second that one node reads")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        core = time_compose(Path(name))
        before = time_search(Path(name) / "before", "local")
        times = {engine: time_search(Path(name), engine) for engine in ("local:1", "local:2")}
        after = time_search(Path(name) / "after", "local")
    local = {name: (before[name]["cpu"] + after[name]["cpu"]) / 2 for name in before}
    forward = (local["many"] - local["two"]) / 19 / NUM_BATCHES
    constants = {"decode_s": time_decoding(), "forward_s": forward, "call_s": local["two"] - NUM_BATCHES * forward}
    constants |= {"message_s": max(0.0, times["local:1"]["two"]["cpu"] - local["two"]), "core_bytes_per_s": core}
    checked = []
    for workers in (1, 2):
        took, guess = times[f"local:{workers}"]["many"], predict_search(workers, constants, NUM_BATCHES, 20)
        checked.append({"workers": workers, **took, "predicted": guess, "error": guess / took["cpu"] - 1})
    search, num_batches, decode = {}, 4000, constants["decode_s"]
    base = num_batches * (decode + forward)  # which the first process evaluates
    for workers in (1, 2, 4, 8, 64, 1000):
        first_time = num_batches / workers * decode if workers > 1 else 0.0  # one process has kept its batches
        seconds = base + first_time + predict_search(workers, constants, num_batches, 21)
        search[workers] = {"seconds": seconds, "of_linear": 1.0}
        search[workers]["of_linear"] = search[1]["seconds"] / seconds / workers
    composed, total, shard = {}, 671e9 * 2, 1e9  # bytes of 671 B parameters in bfloat16, and of a shard
    for nodes in (8, 16, 64, 128):
        calls = [(2 * shard, shard / core)] * -(-int(total) // int(shard))
        seconds = simulate(calls, nodes, SLOTS, constants["message_s"], options.nic, options.disk)
        bound = 2 * total / min(options.disk, options.nic * nodes)
        composed[nodes] = {"seconds": seconds, "of_read_bandwidth": bound / seconds}
    one, two = (times[engine]["many"] for engine in ("local:1", "local:2"))
    speedup = {clock: one[clock] / two[clock] for clock in one}
    found = {"constants": constants, "speedup_of_2": speedup, "checked": checked, "search": search, "compose": composed}
    print(json.dumps(found, indent=1))
    return 0 if all(abs(one["error"]) <= TOLERANCE for one in checked) else 1


if __name__ == "__main__":
    sys.exit(main())
