"""Run tva on thousands of hostile inputs, and count how its commands end.

Each input is made from a seed and tried in a fork of its own: at most 10 s and 500 MiB a command, status 0, 1 or 2, an
error that names its file, no control characters, nothing executed and nothing left of what failed.

    python benchmarks/hostile.py                  # all, about 20 minutes on one core
    python benchmarks/hostile.py --seed 1 --only pickle --scale 0.2
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import os
import tempfile
import time
import warnings
from pathlib import Path

import torch
from attacks.good import make_good
from attacks.inputs import Inputs
from attacks.trial import BAD, Ending, trial

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


def run(seed: int, scale: float, only: str, folder: Path, log: Path | None = None) -> dict[str, collections.Counter]:
    """Try all inputs; return how their commands ended, by kind."""
    if (
        child := os.fork()
    ) == 0:  # so that this process, which is forked for each input, draws nothing and has no threads
        make_good(folder / "good")
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("the sound files cannot be made")
    warm()
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    lines = log.open("w") if log else None
    for number, each in enumerate(Inputs(folder / "good", scale)):
        if not f"{each.kind}: {each.name}".startswith(only):
            continue
        endings: list[Ending] = trial(each, f"{seed}/{number}", folder / "work")
        counts[each.kind]["inputs"] += 1
        for ending in endings:
            counts[each.kind][ending.how] += 1
            counts[each.kind]["most MiB"] = max(counts[each.kind]["most MiB"], ending.mib)
            counts[each.kind]["most ms"] = max(counts[each.kind]["most ms"], round(1000 * ending.seconds))
            if ending.how in BAD or ending.how not in COLUMNS:
                print(f"{each.kind}: {each.name}: {ending.how}: {' '.join(ending.command)[:200]}")
                print(f"    {ending.text[-600:]}")
        if lines:
            row = {"number": number, "kind": each.kind, "name": each.name, "endings": [vars(e) for e in endings]}
            lines.write(json.dumps(row) + "\n")
            lines.flush()
    return counts


def table(counts: dict[str, collections.Counter]) -> str:
    """Return a Markdown table of the counts; columns that are 0 everywhere are in its last line."""
    total: collections.Counter = collections.Counter()
    for found in counts.values():
        total.update({key: value for key, value in found.items() if not key.startswith("most")})
        for key in ("most MiB", "most ms"):
            total[key] = max(total[key], found[key])
    shown = ["inputs", *(name for name in total if name in COLUMNS and total[name]), "most MiB", "most ms"]
    lines = [f"| kind | {' | '.join(shown)} |", "|---" * (len(shown) + 1) + "|"]
    for kind, found in [*counts.items(), ("all", total)]:
        lines.append(f"| {kind} | {' | '.join(str(found[name]) for name in shown)} |")
    return "\n".join([*lines, "", f"0 times: {', '.join(name for name in BAD if not total[name])}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="times the number of random inputs")
    parser.add_argument("--only", default="", help="the start of KIND: NAME")
    parser.add_argument("--log", type=Path, help="a JSON line for each input")
    parser.add_argument("--folder", type=Path, help="by default a temporary one")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        os.environ["HF_HUB_OFFLINE"] = "1"
        counts = run(given.seed, given.scale, given.only, folder, given.log.absolute() if given.log else None)
        os.chdir("/")
    print(table(counts))
    print(f"seed {given.seed}, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
