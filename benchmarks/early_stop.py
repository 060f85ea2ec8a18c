"""The early stop of `wudi` in closed form against Adam: accuracy by task and time, in one run.

    python -m benchmarks run early_stop --models tiny --seeds 0 1 2 [--data DATA] [--output runs/methods]

Networks, tasks and vectors are those of `benchmarks.methods`, and so is the choice of λ on validation data. The
``time`` of the closed form is chosen with it. Values are numbers of test examples that are classified rightly, and
milliseconds of the processor of one merge.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ledger import holm, markdown, plus_minus
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
    return {"alone": list(alone["test"].values()), "ways": found}


def tables(runs: Mapping[int, Any]) -> dict[str, str]:
    """Return a table of the ways: accuracy, in points against Adam also by task, and time.

    A task's difference is bold where a paired t-test over seeds shows it, with Holm's correction for all of the table.
    """
    found = list(runs.values())
    first, *others = WAYS

    def normalized(values: Mapping[str, Any], way: str) -> Sequence[float]:
        return [count / alone for count, alone in zip(values["ways"][way]["right"], values["alone"], strict=True)]

    differences = {
        way: [
            [100 * (one - adam) for one, adam in zip(normalized(each, way), normalized(each, first), strict=True)]
            for each in found
        ]
        for way in others
    }
    by_task = [task for way in others for task in zip(*differences[way], strict=True)]
    means = (plus_minus(values, "{:+.1f}") for values in by_task)
    of_tasks = (f"**{mean}**" if bold else mean for mean, bold in zip(means, _distinguished(by_task), strict=True))
    lines = []
    for way in WAYS:
        accuracy = plus_minus([statistics.fmean(normalized(each, way)) for each in found], "{:.3f}")
        times = Counter(each["ways"][way]["time"] for each in found).most_common()
        chosen = ", ".join(f"{time} ({count})" for time, count in times if time)
        ratio = statistics.median(each["ways"][first]["ms"] / each["ways"][way]["ms"] for each in found)
        against = ["", "", ""]
        if way != first:
            points = plus_minus([statistics.fmean(one) for one in differences[way]], "{:+.1f}")
            tasks = itertools.islice(of_tasks, len(differences[way][0]))
            against = [points, ", ".join(tasks), f"{ratio:.0f} ×"]
        lines.append([way, accuracy, chosen, *against])
    heads = ["solution", "normalized accuracy", "time (seeds)", "points above Adam", "by task", "times faster"]
    return {"against": markdown(heads, lines)}


def _distinguished(by_task: Sequence[Sequence[float]]) -> list[bool]:
    """Return of which tasks the differences, one a seed, have a mean other than 0."""
    from scipy import stats

    spread = [len(task) > 2 and statistics.stdev(task) > 0 for task in by_task]
    p_values = [
        float(stats.ttest_1samp(task, 0.0).pvalue) if s else 1.0 for task, s in zip(by_task, spread, strict=True)
    ]
    return [p_value < 0.05 for p_value in holm(p_values)]
