"""Time every merge method, its memory, and mergekit's where it has the method, on synthetic tensors in memory.

    python benchmarks/merge.py [--elements 8000000] [--vectors 4] [--methods ties tsv …] [--mergekit PYTHON]

Each method runs in a process of its own, ``--repeats`` times, tools in turn, over matrices of 1024 x 1024: all its
passes and the merge, from float32 deltas in memory to a float32 delta; the second such run is timed if the first is
short. mergekit gets the same tensors as models and a base of zeros, and makes a merged model. ``--mergekit`` names the
Python of an environment in which mergekit 0.1.5 is installed. Times are the median of the repeats (lowest–highest), in
nanoseconds for each parameter of each vector; memory is the largest resident size beyond that of the inputs, in bytes
for each parameter.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

SIDE = 1024
MERGEKIT = {  # method to mergekit's name and its parameters, the same for every vector
    "breadcrumbs": ("breadcrumbs", {"density": 0.143, "gamma": 0.007}),
    "dare": ("dare_linear", {"density": 0.1}),
    "magnitude": ("ties", {"density": 0.2}),  # of one vector
    "mean": ("linear", {}),
    "sign_consensus": ("ties", {"density": 1.0}),
    "slerp": ("nuslerp", {}),
    "ties": ("ties", {"density": 0.2}),
}
OPTIONS = {  # of our methods that have no defaults, or whose default is another method than mergekit's
    "lines": "first=0.2, last=1.0",
    "magnitude": "density=0.2",
    "tall": "task=1",
    "ties": 'trim="tensor"',
    "emr": "task=1",
    "fisher": "files={files}",
    "regmean": "files={files}",
}


def make(elements: int, vectors: int) -> list[list[torch.Tensor]]:
    """Return the deltas of every vector, in matrices; the last one may have fewer rows."""
    generator = torch.Generator().manual_seed(0)
    rows = [SIDE] * (elements // SIDE**2)
    rows += [rest] if (rest := elements % SIDE**2 // SIDE) else []
    return [[torch.randn(n, SIDE, generator=generator).mul_(1e-3) for n in rows] for _ in range(vectors)]


def run_ours(name: str, elements: int, vectors: int, chunk: int) -> Callable[[], None]:
    """Make the function that merges once."""
    from tva import save_weights
    from tva.compose.recipe import Recipe
    from tva.merge import METHODS, Chunk

    count = METHODS[name].num_vectors or vectors
    deltas = make(elements, count)
    names = [f"v{i}" for i in range(count)]
    keys = [f"layers.{i}.weight" for i in range(len(deltas[0]))]
    options = OPTIONS.get(name, "")
    if "files" in options:
        path = Path(tempfile.mkdtemp()) / "statistics.safetensors"
        gram = torch.eye(SIDE) + 0.1
        save_weights({k: gram if name == "regmean" else d.abs() for k, d in zip(keys, deltas[0], strict=True)}, path)
        options = options.format(files=[str(path)] * count)
    recipe = Recipe(f"{name}({', '.join(names)}{', ' + options if options else ''})", names)
    size = 2**62 if recipe.needs_whole_tensors else chunk
    flat = [{v: own[i].reshape(-1) for v, own in zip(names, deltas, strict=True)} for i in range(len(keys))]

    def chunks_of(i: int):
        shape = tuple(deltas[0][i].shape)
        for start in range(0, deltas[0][i].numel(), size):
            yield Chunk(keys[i], start, shape=shape), {v: d[start : start + size] for v, d in flat[i].items()}

    sources = dict.fromkeys(names, "")
    recipe.bind(keys)
    out = [torch.zeros_like(delta).reshape(-1) for delta in deltas[0]]

    def merge() -> None:
        chunks = [partial(chunks_of, i) for i in range(len(keys))]
        states = recipe.observe_model(
            lambda observe: [observe(*each) for each in zip(keys, chunks, strict=True)], sources
        )
        for i, key in enumerate(keys):
            own = recipe.observe_tensor(key, chunks[i], sources, states)
            for chunk, values in chunks_of(i):
                merged = recipe.merge(chunk, values, {**states, **own}, sources)
                out[i][chunk.start : chunk.start + len(merged)] = merged

    return merge


def run_mergekit(name: str, elements: int, vectors: int, chunk: int) -> Callable[[], None]:
    """Make the function that merges once with mergekit, matrix by matrix, as it does."""
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import TensorGroup

    theirs, options = MERGEKIT[name]
    count = {"slerp": 2, "magnitude": 1, "dare": 1, "breadcrumbs": 1}.get(name, vectors)
    models = make(elements, count)
    base = [torch.zeros_like(delta) for delta in models[0]]
    method = registry.get(theirs)
    out: list[torch.Tensor] = [torch.zeros(0)] * len(base)

    def merge() -> None:
        for i, zeros in enumerate(base):
            tensors = [own[i] for own in models]
            if theirs == "linear":
                group = TensorGroup.from_tensors(tensors)
            else:
                group = TensorGroup.from_tensors([zeros, *tensors], base_index=0)
            with torch.no_grad():
                (out[i],) = method([group], parameters={"weight": 1.0, **options})

    return merge


def run_one(options: argparse.Namespace) -> None:
    """Run one method in this process and print its numbers as JSON."""
    torch.set_num_threads(options.threads)
    tool = run_ours if options.tool == "tva" else run_mergekit
    merge = tool(options.one, options.elements, options.vectors, options.chunk)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    while len(seconds) < 2 and sum(seconds) < 10:  # the first run of a fast method pays for first pages and caches
        started = time.perf_counter()
        merge()
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"seconds": seconds[-1], "bytes": peak * 1024}))


def main() -> None:
    """Run every method in processes of their own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=8_000_000, help="parameters of the model")
    parser.add_argument("--vectors", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chunk", type=int, default=2**16, help="elements of a chunk, where a method takes chunks")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--mergekit", help="Python of an environment with mergekit 0.1.5")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--tool", default="tva", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run_one(options)
        return
    from tva.merge import METHODS

    shared = [f"--{key}={getattr(options, key)}" for key in ("elements", "vectors", "threads", "chunk")]
    print(
        f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}, {options.elements:,} parameters"
    )
    print(f"{options.elements:,} parameters, {options.vectors} vectors where a method takes any number")
    print(f"{'method':16} {'tool':9} {'vectors':7} {'ns / parameter / vector':>26} {'bytes / parameter':>18}")
    for name in options.methods or METHODS:
        count = METHODS[name].num_vectors or options.vectors
        tools = {"tva": sys.executable}
        if options.mergekit and name in MERGEKIT:
            tools["mergekit"] = options.mergekit
        runs: dict[str, list[dict[str, float]]] = {tool: [] for tool in tools}
        for _ in range(options.repeats):
            for tool, python in tools.items():
                command = [python, __file__, "--one", name, "--tool", tool, *shared]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
                runs[tool].append(json.loads(done.stdout.splitlines()[-1]))
        medians = {tool: statistics.median(run["seconds"] for run in of_tool) for tool, of_tool in runs.items()}
        for tool, of_tool in runs.items():
            low, middle, high = (
                1e9 * f([run["seconds"] for run in of_tool]) / options.elements / count
                for f in (min, statistics.median, max)
            )
            ratio = f"  {medians[tool] / medians['tva']:.1f} × tva" if tool != "tva" else ""
            extra = max(run["bytes"] for run in of_tool) / options.elements
            print(f"{name:16} {tool:9} {count:7} {middle:9.1f} ({low:.1f}–{high:.1f}) {extra:18.1f}{ratio}", flush=True)


if __name__ == "__main__":
    main()
