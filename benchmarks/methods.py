"""Compare every merge method on real tasks: normalized accuracy on test data, λ chosen on validation data.

    python -m benchmarks run methods --models tiny --seeds 0 1 2 [--num_tasks 8] [--data DATA] [--output runs/methods]

The networks and tasks are those of `benchmarks.merge_models`. Every row is tuned alike: λ, or the number in its recipe,
is the best on validation data of a quarter, half and once its scale, doubled or halved while the best is at an
end (three times at most), and of √2 times more and less than that. The rows that are done are kept under OUTPUT, so
that a run that was cut off goes on where it was. Values are numbers of test examples that are classified rightly.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.ledger import holm, markdown, plus_minus
from benchmarks.merge_models import MODELS, Model
from tva import TaskVector
from tva.compose.recipe import Recipe

OPTIONS = {"models": "tiny", "num_tasks": 4, "data": "", "output": "runs/methods"}
PARTS = ("models", "num_tasks")  # the ledger has a file for each
DEPENDS = ("benchmarks/methods.py", "benchmarks/merge_models.py", "tva/merge")
COARSE, FINE, EXTENSIONS = (0.25, 0.5, 1.0), 2**0.5, 3


@dataclass(frozen=True)
class Setting:
    """What a recipe is written from.

    Attributes:
        tasks: Names of the vectors.
        matrix: Option of methods on matrices, for a network whose matrices are convolutions.
        no_gram: Option of ``regmean``: matrices whose inputs have no Gram matrix.
        files: Returns the statistics files of a kind, as an option.
        x: The number that is tuned.
        task: Place of the task whose own model is wanted, from 1.
    """

    tasks: Sequence[str]
    matrix: str
    no_gram: str
    files: Callable[[str], str]
    x: float
    task: int = 0

    @property
    def all(self) -> str:
        return ", ".join(self.tasks)

    @property
    def sum(self) -> str:
        return self.each("{}")

    def each(self, call: str, joint: str = " + ") -> str:
        return joint.join(call.format(task) for task in self.tasks)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: What is shown.
        recipe: Writes the recipe.
        scale: Multiplies the tuned number; 0 if nothing is tuned.
        kind: Whether one model serves all tasks, every task has its own, or every pair of tasks.
        inside: Whether the tuned number stands in the recipe; it is λ otherwise.
    """

    name: str
    recipe: Callable[[Setting], str]
    scale: float = 1.0
    kind: Literal["all", "task", "pair"] = "all"
    inside: bool = False


def _filtered(time: float, rank: str = "all") -> Callable[[Setting], str]:
    return lambda s: f'wudi({s.all}, solve="filtered", time={time}, rank="{rank}"{s.matrix})'


ROWS = [
    Row("sum", lambda s: s.sum),
    Row("magnitude, density=0.2", lambda s: s.each("magnitude({}, density=0.2)")),
    Row("breadcrumbs", lambda s: s.each("breadcrumbs({})"), 2),
    Row("dare", lambda s: s.each("dare({})")),
    Row("dare, drop=0.5", lambda s: s.each("dare({}, drop=0.5)")),
    Row("della", lambda s: s.each("della({})")),
    Row("ties", lambda s: f"ties({s.all})", 2),
    Row("sign_consensus", lambda s: f"sign_consensus({s.all})", 2),
    Row("consensus", lambda s: f"consensus({s.all})"),
    Row("pcb", lambda s: f"pcb({s.all})", 2),
    Row("sce", lambda s: f"sce({s.all}, density=0.5)", 2),
    Row("model_stock", lambda s: f"model_stock({s.all})", 4),
    Row("lines of the sum", lambda s: f"lines({s.sum}, first=0.25, last={0.25 + s.x:.4g})", inside=True),
    Row("emr, one model", lambda s: f"emr({s.all})"),
    Row("tsv", lambda s: f"tsv({s.all}{s.matrix})", 2),
    Row("iso_c", lambda s: f"iso_c({s.all}{s.matrix})", 2),
    Row("iso_cts", lambda s: f"iso_cts({s.all}{s.matrix})", 2),
    Row("cart", lambda s: f"cart({s.all}, scale={s.x:.4g}{s.matrix})", 2, inside=True),
    Row("svc of the sum", lambda s: f"svc({s.sum}, {s.all}{s.matrix})"),
    Row("wudi", lambda s: f"wudi({s.all}{s.matrix})"),
    *(Row(f"wudi, filtered at {time}", _filtered(time)) for time in (10, 50, 250)),
    Row("wudi, filtered at 50, participation", _filtered(50, "participation")),
    Row("wudi, solve=exact", lambda s: f'wudi({s.all}, solve="exact"{s.matrix})'),
    Row("fisher", lambda s: f"fisher({s.all}, files={s.files('fisher')})", 4),
    Row("fisher, normalize=True", lambda s: f"fisher({s.all}, files={s.files('fisher')}, normalize=True)", 4),
    Row("regmean", lambda s: f"regmean({s.all}, files={s.files('gram')}{s.matrix}{s.no_gram})", 2),
    Row("slerp of pairs", lambda s: f"slerp({s.all})", 2, "pair"),
    Row("sum of pairs", lambda s: s.sum, 1, "pair"),
    Row("mean, λ = 1", lambda s: f"mean({s.all})", 0),
    Row("model_stock, λ = 1", lambda s: f"model_stock({s.all})", 0),
    Row("ties, λ = 1", lambda s: f"ties({s.all})", 0),
    Row("tsv, λ = 1", lambda s: f"tsv({s.all}{s.matrix})", 0),
    Row("wudi, λ = 1", lambda s: f"wudi({s.all}{s.matrix})", 0),
    Row("wudi, filtered at 50, λ = 1", _filtered(50), 0),
    Row("regmean, λ = 1", lambda s: f"regmean({s.all}, files={s.files('gram')}{s.matrix}{s.no_gram})", 0),
    Row("emr", lambda s: f"emr({s.all}, task={s.task})", 0, "task"),
    Row("tall", lambda s: f"tall({s.all}, task={s.task})", 0, "task"),
]
OF_PAIRS = [row.name for row in ROWS if row.kind == "pair"]


# --- measuring


class Merges:
    """The merges of one model and seed.

    Args:
        model: With its vectors.
    """

    def __init__(self, model: Model) -> None:
        self.model, self.made = model, ("", TaskVector({}))

    def of(self, recipe: str) -> TaskVector:
        """Return what a recipe gives; the whole grid uses the last one."""
        if recipe != self.made[0]:
            self.made = recipe, Recipe(recipe, self.model.vectors).evaluate(self.model.vectors)
        return self.made[1]

    def right(self, row: Row, x: float, split: str) -> dict[str, int]:
        """Count what is right of every task, for one value of the tuned number."""
        coef = 1.0 if row.inside or not row.scale else x
        return {
            task: self.model.right(self.of(recipe), coef, task, split)
            for recipe, tasks in recipes(row, self.model, x)
            for task in tasks
        }


def cost(recipe: str, vectors: Mapping[str, TaskVector]) -> list[float]:
    """Return a merge's milliseconds of the processor, and its MiB beyond the vectors, its result included."""
    seconds, most = math.inf, 0
    for _ in range(2):  # the first may load what it needs
        before = _resident(reset=True)
        started = time.process_time()
        merged = Recipe(recipe, vectors).evaluate(vectors)
        seconds = min(seconds, time.process_time() - started)
        most = _resident() - before
        del merged
        if seconds > 1:
            break
    return [float(f"{seconds * 1e3:.3g}"), round(max(0, most) / 2**20)]


def _resident(reset: bool = False) -> int:
    """Return the largest resident size since the last reset, in bytes; 0 where the system does not say."""
    try:
        if reset:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed would be used again, unseen
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except (OSError, AttributeError):
        return 0
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def setting_of(model: Model, x: float) -> Setting:
    """Return what the recipes of a model's tasks are written from."""
    return Setting(model.tasks, model.matrix, model.no_gram, lambda kind: repr(model.information(kind)), x)


def recipes(row: Row, model: Model, x: float) -> list[tuple[str, Sequence[str]]]:
    """Return the recipes of a row, and the tasks that each is evaluated on."""
    setting = setting_of(model, x)
    if row.kind == "task":
        return [(row.recipe(replace(setting, task=place)), [task]) for place, task in enumerate(model.tasks, 1)]
    if row.kind == "pair":
        half = len(model.tasks) // 2
        pairs = zip(model.tasks[:half], reversed(model.tasks[half:]), strict=True)
        return [(row.recipe(replace(setting, tasks=pair)), pair) for pair in pairs]
    return [(row.recipe(setting), model.tasks)]


def choose(score: Callable[[float], float], scale: float) -> tuple[float, bool]:
    """Choose the number with the best score; return it, and whether it is at the end of what was tried."""
    scores: dict[float, float] = {}

    def best() -> float:  # of those alike, the smallest
        return max(scores, key=lambda x: (scores[x], -x))

    def add(x: float) -> None:
        scores[x] = score(float(f"{x:.4g}"))

    for x in COARSE:
        add(scale * x)
    for _ in range(EXTENSIONS):
        if best() not in (min(scores), max(scores)):
            break
        add(best() * 2 if best() == max(scores) else best() / 2)
    edge = best() in (min(scores), max(scores))
    middle = best()
    add(middle * FINE)
    add(middle / FINE)
    return float(f"{best():.4g}"), edge


def tune(row: Row, merges: Merges, alone: Mapping[str, int]) -> tuple[float, bool, float]:
    """Choose a row's number on validation data; return it, whether it is at the end of those tried, and its score."""
    scores = {}

    def score(x: float) -> float:
        right = merges.right(row, x, "val")
        scores[x] = statistics.fmean(count / alone[task] for task, count in right.items())
        return scores[x]

    x, edge = choose(score, row.scale)
    return x, edge, scores[x]


def run_row(row: Row, merges: Merges, alone: Mapping[str, int]) -> list[Any]:
    """Return the tuned number, 1 if it is at the end, and what is right by task."""
    x, edge = tune(row, merges, alone)[:2] if row.scale else (1.0, False)
    found = merges.right(row, x, "test")
    return [x, int(edge), *(found[task] for task in merges.model.tasks)]


def measure(seed: int, models: str, num_tasks: int, data: str, output: str) -> dict[str, Any]:
    """Return what every row reaches with one seed."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    model = MODELS[models](data, Path(output), num_tasks)
    if len(model.tasks) != num_tasks:
        raise ValueError(f"{models} has {len(model.tasks)} tasks; found --num_tasks {num_tasks}.")
    model.open(seed)
    merges, kept = Merges(model), model.folder / f"rows-{num_tasks}.json"
    vectors = model.vectors
    alone = {s: {task: model.right(vectors[task], 1.0, task, s) for task in model.tasks} for s in ("val", "test")}
    values = json.loads(kept.read_text()) if kept.exists() else {"rows": {}}
    values |= {
        "tasks": {task: model.count(task, "test") for task in model.tasks},
        "base": [model.right(vectors[task], 0.0, task, "test") for task in model.tasks],
        "alone": [alone["test"][task] for task in model.tasks],
    }
    for row in ROWS:
        if row.name in values["rows"] or (row.kind == "pair" and num_tasks > 4):
            continue
        started = time.perf_counter()
        values["rows"][row.name] = found = run_row(row, merges, alone["val"])
        kept.write_text(json.dumps(values))
        mean = statistics.fmean(_normalized(values, row.name))
        print(f"{models} {seed}: {row.name:36} {mean:.3f} at {found[0]:g}{'*' * found[1]} "
              f"{time.perf_counter() - started:.1f} s", flush=True)  # fmt: skip
    if model.timed and "cost" not in values:
        first = {row.name: recipes(row, model, row.scale or 1.0)[0][0] for row in ROWS if row.name in values["rows"]}
        names = {recipe: name for name, recipe in reversed(first.items())}  # of rows alike, the first
        values["cost"] = {name: cost(recipe, vectors) for recipe, name in names.items()}
        kept.write_text(json.dumps(values))
    return values


# --- tables


def _normalized(values: Mapping[str, Any], name: str) -> list[float]:
    """Return the accuracy of every task divided by that of its own fine-tuned model."""
    right = values["base"] if name == "base" else values["rows"][name][2:]
    return [count / alone for count, alone in zip(right, values["alone"], strict=True)]


def _mean(values: Mapping[str, Any], name: str) -> float:
    return statistics.fmean(_normalized(values, name))


def tables(runs: Mapping[int, Any]) -> dict[str, str]:
    """Return a sentence on the tasks of a network: accuracy of the base and of the fine-tuned model."""
    found, said = list(runs.values()), []
    for place, (task, count) in enumerate(found[0]["tasks"].items()):
        base, alone = (statistics.fmean(each[key][place] / count for each in found) for key in ("base", "alone"))
        said.append(f"{task} {base:.1%} → {alone:.1%}")
    return {"tasks": ", ".join(said)}


def joined(parts: Mapping[str, Mapping[int, Any]]) -> dict[str, str]:
    """Return the tables of tuned, untuned, task-known and pairs' rows, a column a network, best mean of all first.

    A † marks a tuned number that some seed chose at the end of those tried. An accuracy is bold if a paired t-test
    over seeds distinguishes it from the sum's, with Holm's correction for all tuned rows of the network; p is of the
    mean over these networks, with the variance of seeds within each, and so corrected. Milliseconds and MiB are those
    of the network that is timed.
    """
    order = sorted(parts, key=lambda part: list(MODELS).index(part.split("-")[1]))
    networks = {MODELS[part.split("-")[1]].title: list(parts[part].values()) for part in order}
    all_runs = [each for found in networks.values() for each in found]
    rows = {row.name: row for row in ROWS if row.name in all_runs[0]["rows"]}
    tuned = [name for name, row in rows.items() if row.scale and name not in OF_PAIRS]
    changes = {
        name: [[_mean(each, name) - _mean(each, "sum") for each in found] for found in networks.values()]
        for name in tuned
        if name != "sum"
    }
    p_values = dict(zip(changes, holm([_stratified_p(change) for change in changes.values()]), strict=True))
    within = [
        dict(zip(changes, holm([_stratified_p([change[place]]) for change in changes.values()]), strict=True))
        for place in range(len(networks))
    ]

    def line(name: str) -> list[str]:
        means = [[_mean(each, name) for each in found] for found in networks.values()]
        worst = statistics.fmean(min(_normalized(each, name)) for found in networks.values() for each in found)
        cells = [plus_minus(mean, "{:.3f}") for mean in means]
        for place, found in enumerate(networks.values()):
            cells[place] += "†" * any(each["rows"].get(name, [0, 0])[1] for each in found)
            cells[place] = f"**{cells[place]}**" if within[place].get(name, 1.0) < 0.05 else cells[place]
        p_value = f"{p_values[name]:.2g}" if name in p_values else ""
        of_all = [f"{statistics.fmean(map(statistics.fmean, means)):.3f}", f"{worst:.3f}"]
        return [name, *of_all, *cells, p_value, *_cost(all_runs, name)]

    def table(names: Sequence[str], *more: str) -> str:
        heads = ["method", "mean", "worst task", *networks, *more]
        lines = sorted(map(line, names), key=lambda cells: -float(cells[1]))
        return markdown(heads, [cells[: len(heads)] for cells in lines])

    pairs = [name for name in OF_PAIRS if name in rows]
    return {
        "tuned": table(tuned, "p", "ms", "MiB"),
        "untuned": table([*(name for name, row in rows.items() if not row.scale and row.kind == "all"), "base"]),
        "known": table([name for name, row in rows.items() if row.kind == "task"]),
        **({"pairs": table(pairs)} if pairs else {}),
    }


def _stratified_p(changes: Sequence[Sequence[float]]) -> float:
    """Return the p-value of no change in the mean over fixed networks, of changes by network and seed.

    Source: Satterthwaite, "An approximate distribution of estimates of variance components", Biometrics 1946.
    """
    from scipy import stats

    if any(len(change) < 3 for change in changes):
        return 1.0
    parts = [statistics.variance(change) / len(change) for change in changes]
    if not sum(parts):
        return 1.0
    freedom = sum(parts) ** 2 / sum(part**2 / (len(change) - 1) for part, change in zip(parts, changes, strict=True))
    return float(2 * stats.t.sf(abs(sum(map(statistics.fmean, changes))) / sum(parts) ** 0.5, freedom))


def _cost(found: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """Return milliseconds and MiB of a row, the median of seeds."""
    costs = [each["cost"][name] for each in found if name in each.get("cost", {})]
    return [f"{statistics.median(one[place] for one in costs):,.0f}" if costs else "" for place in (0, 1)]
