"""The early stop of `wudi` in closed form against Adam: accuracy by task and time, in one run.

    python -m benchmarks run early_stop --models tiny --seeds 0 1 2 [--data DATA] [--output runs/methods]

Networks, tasks and vectors are those of `benchmarks.methods`, and so is the choice of λ on validation data. The
``time`` of the closed form is chosen with it. Values are numbers of test examples that are classified rightly, and
milliseconds of the processor of one merge.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ledger import markdown, with_interval
from benchmarks.merge_models import MODELS
from benchmarks.methods import Merges, Row, setting_of, tune

OPTIONS = {"models": "tiny", "num_tasks": 4, "data": "", "output": "runs/methods"}
PARTS = ("models",)
DEPENDS = ("benchmarks/early_stop.py", "benchmarks/methods.py", "benchmarks/merge_models.py",
           "tva/merge/methods/wudi.py")  # fmt: skip
TIMES = (50, 250, 10)  # of those alike, the first is taken
WAYS = {
    "Adam, 300 steps": {"": ""},
    "filtered": {f"{t}": f', solve="filtered", time={t}' for t in TIMES},
    "filtered, participation": {f"{t}": f', solve="filtered", time={t}, rank="participation"' for t in TIMES},
}


def measure(seed: int, models: str, num_tasks: int, data: str, output: str) -> dict[str, Any]:
    """Return what Adam and the closed form reach with one seed, and how long they take."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    model = MODELS[models](data, Path(output), num_tasks)
    model.open(seed)
    merges = Merges(model)
    alone = {s: {t: model.right(model.vectors[t], 1.0, t, s) for t in model.tasks} for s in ("val", "test")}
    found = {}
    for way, among in WAYS.items():
        tried, spent = [], []
        for name, options in among.items():
            row = Row(way, lambda s, options=options: f"wudi({s.all}{options}{s.matrix})")
            started = time.process_time()
            merges.of(row.recipe(setting_of(model, 1.0)))
            spent.append(1e3 * (time.process_time() - started))
            coef, _, score = tune(row, merges, alone["val"])
            tried.append((score, name, coef, merges.right(row, coef, "test")))
        _, name, coef, right = max(tried, key=lambda each: each[0])
        found[way] = {"time": name, "scaling_coef": coef, "ms": min(spent), "right": list(right.values())}
        print(f"{models} {seed}: {way} {found[way]} of {alone['test']}", flush=True)
    return {"alone": list(alone["test"].values()), "tasks": list(model.tasks), "ways": found}


def tables(runs: Mapping[int, Any]) -> dict[str, str]:
    """Return a table of the ways: accuracy, in points against Adam also by task, and time."""
    found = list(runs.values())
    first, *_ = WAYS

    def normalized(values: Mapping[str, Any], way: str) -> Sequence[float]:
        return [count / alone for count, alone in zip(values["ways"][way]["right"], values["alone"], strict=True)]

    lines = []
    for way in WAYS:
        accuracy = with_interval([statistics.fmean(normalized(each, way)) for each in found], form="{:.3f}".format)
        differences = [
            [100 * (one - adam) for one, adam in zip(normalized(each, way), normalized(each, first), strict=True)]
            for each in found
        ]
        of_tasks = [f"{statistics.fmean(task):+.1f}" for task in zip(*differences, strict=True)]
        points = with_interval([statistics.fmean(one) for one in differences], form="{:+.1f}".format)
        chosen = ", ".join(f"{w['time']}·{w['scaling_coef']:.2g}".lstrip("·") for w in (e["ways"][way] for e in found))
        ratio = statistics.median(each["ways"][first]["ms"] / each["ways"][way]["ms"] for each in found)
        against = ["", "", ""] if way == first else [points, ", ".join(of_tasks), f"{ratio:.0f} ×"]
        lines.append([way, accuracy, chosen, *against])
    heads = ["solution", "normalized accuracy", "time·λ by seed", "points above Adam", "by task", "times faster"]
    return {"against": markdown(heads, lines)}
