"""Run tva on thousands of hostile inputs, and count how its commands end.

    python -m benchmarks run hostile --seeds 0 1 2 3 4 5 6 7 [--only pickle] [--scale 0.2] [--log FILE]

Each input is made from a seed and tried in a fork of its own: at most 10 s and 500 MiB a command, status 0, 1 or 2, an
error that names its file, no control characters, nothing executed and nothing left of what failed. A seed tries every
eighth input, so that eight in a row try all; the next eight try others. Every input that ends otherwise is printed.
"""

import collections
import gc
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.attacks.good import make_good
from benchmarks.attacks.inputs import Inputs
from benchmarks.attacks.trial import BAD, Ending, Input, in_fork, trial, workplace
from benchmarks.ledger import markdown

OPTIONS = {
    "parts": 8,  # that the inputs are divided into; a seed tries one
    "scale": 1.0,  # times the number of random inputs
    "only": "",  # the start of KIND: NAME
    "log": "",  # a file for a JSON line of each input
}
DEPENDS = ("benchmarks/hostile.py", "benchmarks/attacks", "tva/checkpoints", "tva/compose", "tva/vectors", "tva/cli")
COLUMNS = ("done", "status 1", "refused", *BAD)


def warm() -> None:
    """Import what commands import, so that forks do not."""
    import tva.cli.lightning
    import tva.edit.play.model  # noqa: F401
    from tva.merge import kernels

    kernels.load()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def chosen(good: Path, seed: int, parts: int, scale: float, only: str) -> Iterator[tuple[int, Input]]:
    """Yield the inputs of a seed, with their numbers."""
    for number, each in enumerate(Inputs(good, scale)):
        if number % parts == seed % parts and f"{each.kind}: {each.name}".startswith(only):
            yield number, each


def measure(seed: int, parts: int, scale: float, only: str, log: str) -> dict[str, Any]:
    """Try the inputs of a seed; return how their commands ended, by kind."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    with workplace() as folder, open(os.path.abspath(log) if log else os.devnull, "a") as lines:
        in_fork(lambda: make_good(folder / "good"))
        warm()
        for number, each in chosen(folder / "good", seed, parts, scale, only):
            endings: list[Ending] = trial(each, f"{seed}/{number}", folder / "work")
            counts[each.kind]["inputs"] += 1
            for ending in endings:
                counts[each.kind][ending.how] += 1
                counts[each.kind]["most MiB"] = max(counts[each.kind]["most MiB"], ending.mib)
                counts[each.kind]["most ms"] = max(counts[each.kind]["most ms"], round(1000 * ending.seconds))
                if ending.how in BAD or ending.how not in COLUMNS:
                    print(f"{each.kind}: {each.name}: {ending.how}: {' '.join(ending.command)[:200]}")
                    print(f"    {ending.text[-600:]}", flush=True)
            row = {"number": number, "kind": each.kind, "name": each.name, "endings": [vars(e) for e in endings]}
            lines.write(json.dumps(row) + "\n")
    return {kind: dict(found) for kind, found in counts.items()}


def tables(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, str]:
    """Return the counts of all seeds by kind; columns that are 0 everywhere are in a line of their own."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for run in runs.values():
        for kind, found in run.items():
            for name in (kind, "all"):
                counts[name].update({key: value for key, value in found.items() if not key.startswith("most")})
                for key in ("most MiB", "most ms"):
                    counts[name][key] = max(counts[name][key], found[key])
    total = counts.pop("all")
    others = sorted(set(total) - {*COLUMNS, "inputs", "most MiB", "most ms"})
    shown = ["inputs", *(name for name in (*COLUMNS, *others) if total[name]), "most MiB", "most ms"]
    rows = [[kind, *(f"{found[name]:,}" for name in shown)] for kind, found in [*counts.items(), ("all", total)]]
    never = ", ".join(name for name in BAD if not total[name])
    return {"endings": markdown(["kind", *shown], rows), "never": f"Never: {never}."}
