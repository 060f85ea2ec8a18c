"""The paper's experiments, by groups of them, from the runs of `tva paper`.

    python -m benchmarks run paper --group texts --seeds 0 1 2 --data_root DATA [--output runs/paper]
    python -m benchmarks run paper --group texts --seeds 0 1 2 --runs DIR --commit COMMIT

The first runs what is not finished. The second only reads what is, in the output folder of `tva paper run`, and records
the commit with which it was run.
"""

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ledger import markdown, over_seeds
from tva.cli.main import main as tva
from tva.evaluation.intervals import student_interval
from tva.paper.results import Made, effects_of, find_fits, find_made, rows_of
from tva.paper.suite import Scale, find_scale

OPTIONS = {"group": "images", "scale": "real", "data_root": "", "output": "runs/paper", "runs": "", "commit": ""}
PARTS = ("group",)
DEPENDS = ("benchmarks/paper.py", "tva/paper", "tva/edit", "tva/evaluation", "tva/search", "tva/models", "tva/data")
GROUPS = {
    "images": ("forgetting-images",),
    "sums": ("adding-images", "ablations"),
    "texts": ("forgetting-texts", "adding-texts", "analogy-domains"),
    "analogies": ("analogy-subpopulations", "few-shot"),
    "language": ("forgetting-toxicity", "forgetting-style", "analogy-sentiment"),
    "smoke": ("forgetting-images", "adding-images", "analogy-subpopulations"),
}
LABELS = ("base", "finetuned", "edited", "random")


def measure(seed: int, group: str, scale: str, data_root: str, output: str, runs: str, commit: str) -> dict[str, Any]:
    """Run a group's experiments if need be, and return one seed's numbers, pairs and edits."""
    if group not in GROUPS:
        raise ValueError(f"There is no group {group!r} of the paper's experiments; there are {', '.join(GROUPS)}.")
    scale = "smoke" if group == "smoke" else scale
    if not runs:
        root = ["--data_root", data_root] if data_root else []
        _call("paper", "run", *GROUPS[group], "--scale", scale, "--output", output, "--seeds", f"[{seed}]", *root)
    return gather([find_scale(name, scale) for name in GROUPS[group]], Path(runs or output), seed, commit)


def _call(*words: str) -> None:
    try:
        tva(list(words))
    except SystemExit as stop:
        if stop.code:
            raise


def gather(scales: Sequence[Scale], folder: Path, seed: int, commit: str = "") -> dict[str, Any]:
    """Return what a folder of finished runs has of a seed: rows, effects, pairs, and edits that forget one task.

    Raises:
        ValueError: It has nothing of that seed.
    """
    values: dict[str, Any] = {"scale": scales[0].name, "rows": {}, "effects": {}, "pairs": {}, "edits": {}}
    ours: list[Made] = []
    fits: dict[tuple[str, str], float] = {}
    for scale in scales:
        made, name = find_made(folder, scale), scale.experiment
        own = [each for each in made if each.seed == seed]
        if not own:
            continue
        rows, effects = rows_of(scale, made), effects_of(scale, made)
        values["rows"][name] = {row.row: _short(row.seeds[seed]) for row in rows if seed in row.seeds}
        values["effects"][name] = {each.effect: _short(each.seeds[seed]) for each in effects if seed in each.seeds}
        values["edits"] |= {each.name: _edit_values(each) for each in own if each.group == "forget-{task}"}
        found = next(filter(None, map(_pairs, own)), None)
        values["pairs"] |= {name: found} if found else {}
        used = {vector for each in own for vector in each.content["vectors"]}
        fits |= {
            (scale.setup_name, fit["task"]): fit["seconds"]
            for fit in find_fits(folder, [scale.setup_name])
            if fit["seed"] == seed and fit["task"] in used
        }
        ours += own
    if not ours:
        raise ValueError(f"{folder} has no finished edits of seed {seed}; `tva paper run` makes them.")
    how = {
        "seconds": round(sum(fits.values()) + sum(each.seconds for each in ours)),
        "date": max(each.content["created"] for each in ours)[:10],
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
    }
    return {
        **{key: value for key, value in values.items() if value},
        "made": how | ({"commit": commit} if commit else {}),
    }


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _edit_values(made: Made) -> dict[str, Any]:
    content = made.content
    return {
        "coef": content["coefficients"]["scaling_coef"],
        "holds": content["holds"],
        "tasks": {
            name: {label: task[label]["value"] for label in LABELS if label in task} | {"n": task["num_examples"]}
            for name, task in content["tasks"].items()
        },
    }


def _pairs(made: Made) -> dict[str, list[float]]:
    """Return by pair the mean normalized accuracy of its sum on its tasks, and the cosine of its vectors."""
    pairs, subsets, cosine = (
        made.content["diagnostics"].get(name, {}).get("rows", {}) for name in ("pairs", "subsets", "cosine")
    )
    names = {key: key.split(" + ") for key in pairs | subsets}
    return {
        " + ".join(pair): [round((pairs | subsets)[key]["normalized"], 4), round(cosine[pair[0]][pair[1]], 4)]
        for key, pair in names.items()
        if len(pair) == 2
    }


def tables(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, str]:
    """Return a comparison with the paper for each experiment, pairs of tasks, and the edits that forget."""
    found = list(runs.values())
    names = dict.fromkeys(name for run in found for name in run["rows"])
    made = {name: compared(runs, name, found[0]["scale"]) for name in names}
    made |= {f"{name}-pairs": pairs(found, name) for name in found[0].get("pairs", {})}
    return made | ({"edits": edits(runs)} if "edits" in found[0] else {})


def pairs(found: Sequence[Mapping[str, Any]], experiment: str) -> str:
    """Return a matrix: above its diagonal mean normalized accuracy in percent, below it cosines; means over seeds."""
    runs = [run["pairs"][experiment] for run in found if experiment in run.get("pairs", {})]
    names = list(dict.fromkeys(name for pair in runs[0] for name in pair.split(" + ")))

    def cell(row: int, column: int) -> str:
        if row == column:
            return ""
        pair = " + ".join(names[place] for place in sorted((row, column)))
        return f"{_mean(runs, pair, 1):.3f}".replace("-", "−") if row > column else f"{100 * _mean(runs, pair, 0):.1f}"

    places = range(len(names))
    return markdown(["", *names], [[names[row], *(cell(row, column) for column in places)] for row in places])


def _mean(runs: Sequence[Mapping[str, Sequence[float]]], pair: str, place: int) -> float:
    return statistics.fmean(run[pair][place] for run in runs)


def compared(runs: Mapping[int, Mapping[str, Any]], experiment: str, scale: str = "real") -> str:
    """Return an experiment's numbers beside those of the paper, and its effects below them."""
    found = find_scale(experiment, scale)
    column, rows = found.options.get("paper"), {}
    for entry in found.content["rows"]:
        rows_by_seed = [run["rows"].get(experiment, {}) for run in runs.values()]
        values = [own[entry["row"]] for own in rows_by_seed if entry["row"] in own]
        if values:
            paper = (entry.get("paper") or {}).get(column)
            rows[entry["row"]] = _row(entry["row"], paper, values, entry.get("unit", "percent") == "percent")
    for entry in found.content.get("effects", []):
        key = entry["effect"]
        values = [own[key] for run in runs.values() if key in (own := run.get("effects", {}).get(experiment, {}))]
        if len(values) > 1:
            low, _ = student_interval(np.array(values), 0.9)
            ours = f"by {statistics.fmean(values):.3f}, at least {low:.3f}".replace("-", "−")
            rows[key] = [f"*{entry['effect']}*", "", ours, "shown" if low > 0 else "not shown", ""]
    heads = ["number", f"paper ({column})" if column else "paper", "ours", "95% over seeds", "difference"]
    return markdown(heads, list(rows.values()))


def _row(name: str, paper: float | None, values: Sequence[float], percent: bool) -> list[str]:
    mean, ends = statistics.fmean(values), over_seeds(values)
    form = "{:.1f}" if percent else "{:.3g}"
    if percent and ends is not None and max(values) <= 100:
        ends = max(0.0, ends[0]), min(100.0, ends[1])
    return [
        name,
        "" if paper is None else f"{paper}",
        form.format(mean),
        "" if ends is None else f"[{form.format(ends[0])}, {form.format(ends[1])}]".replace("-", "−"),
        "" if paper is None else f"{mean - paper:{'+.1f' if percent else '+.3g'}}".replace("-", "−"),
    ]


def edits(runs: Mapping[int, Mapping[str, Any]]) -> str:
    """Return a row for each task that was forgotten."""
    found = list(runs.values())
    heads = ["forgotten", "λ by seed", "base", "fine-tuned", "edited", "random", "control, base → edited", "holds"]
    return markdown(heads, [_edit(found, name) for name in found[0]["edits"] if name.startswith("forget-")])


def _edit(found: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    made, task = [run["edits"][name] for run in found], name.removeprefix("forget-")
    (control,) = made[0]["tasks"].keys() - {task}

    def mean(label: str, of: str = task) -> str:
        return f"{100 * statistics.fmean(edit['tasks'][of][label] for edit in made):.1f}"

    coefs, holds = ", ".join(f"{edit['coef']:g}" for edit in made), sum(edit["holds"] for edit in made)
    kept = f"{mean('base', control)} → {mean('edited', control)}"
    return [task, coefs, *map(mean, LABELS), kept, f"{holds} of {len(made)}"]
