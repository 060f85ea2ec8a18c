"""Results of experiments: the paper's numbers, ours with an interval over seeds, and which effects hold."""

import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tva.checkpoints.foreign import read_json
from tva.errors import some
from tva.evaluation.intervals import student_interval
from tva.paper.quantities import mean, quantity
from tva.paper.suite import Scale
from tva.report.edit_report import read_report
from tva.report.series import is_feasible

DONE = "done.json"  # in the folder of an edit: what it was made of, and how long it took


@dataclass(frozen=True)
class Row:
    """One number of the paper and ours.

    Attributes:
        experiment: The experiment's name.
        scale: The scale's name.
        row: Label of the number.
        paper: The paper's number, if it reports one.
        ours: Mean over seeds, in the paper's unit.
        low: Lower end of Student's 95% interval over seeds; None for one seed.
        high: Upper end.
        seeds: One number a seed.
        edits: Number of edits per seed that it is the mean of.
        unit: ``percent`` or ``number``.
        column: Column of the paper's table.
        differs: How the set-up differs from the paper's.
    """

    experiment: str
    scale: str
    row: str
    paper: float | None
    ours: float | None
    low: float | None
    high: float | None
    seeds: dict[int, float]
    edits: int
    unit: str
    column: str | None
    differs: str

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's."""
        return None if self.ours is None or self.paper is None else self.ours - self.paper


@dataclass(frozen=True)
class Effect:
    """A direction that an experiment should show.

    Attributes:
        experiment: The experiment's name.
        scale: The scale's name.
        effect: The claim, in words.
        difference: Mean over seeds of the effect's size: positive in the claimed direction.
        limit: Student's lower one-sided confidence limit of it, over seeds; None for fewer than two.
        confidence: Of the limit.
        seeds: One difference a seed.
    """

    experiment: str
    scale: str
    effect: str
    difference: float | None
    limit: float | None
    confidence: float
    seeds: dict[int, float]

    @property
    def holds(self) -> bool:
        """Whether the limit is above zero."""
        return self.limit is not None and self.limit > 0


@dataclass(frozen=True)
class Made:
    """One finished edit.

    Attributes:
        group: Its template.
        name: Its name.
        seed: Its seed.
        seconds: Duration of the run that made it.
        content: Its ``edit.json``.
        folder: Its folder.
    """

    group: str
    name: str
    seed: int
    seconds: float
    content: Any
    folder: Path


def edit_folder(output: Path, scale: Scale, name: str, seed: int) -> Path:
    """Return the folder of one edit of an experiment."""
    return output / scale.experiment / scale.name / name / f"seed={seed}"


_DONE_FORM = {"config": str, "group": str, "name": str, "seed": int, "seconds": float, "metric": (None, list)}


def read_done(file: Path) -> dict[str, Any]:
    """Read the mark of a finished fit or edit.

    Raises:
        ValueError: It is something else.
    """
    done: dict[str, Any] = read_json(file, _DONE_FORM)
    if "config" not in done or "seconds" not in done:
        raise ValueError(f"{file} is not the mark of a finished run. Remove it, and the run is made again.")
    return {"group": "", "name": "", "seed": 0, "metric": None, **done}


def find_made(output: Path, scale: Scale) -> list[Made]:
    """Find the finished edits of an experiment, of all seeds; edits that it no longer names are not its own."""
    found, names = [], _names(scale)
    for file in sorted((output / scale.experiment / scale.name).glob(f"*/seed=*/{DONE}")):
        if not file.parent.name.removeprefix("seed=").isdecimal():
            continue  # replaced by another edit
        done = read_done(file)
        if done["name"] not in names.get(done["group"], ()):
            continue
        report = read_report(file.parent / "edit")
        found.append(Made(done["group"], done["name"], done["seed"], done["seconds"], report, file.parent))
    return found


def by_seed(scale: Scale, made: Sequence[Made], edits: str, value: str) -> dict[int, float]:
    """Return a quantity's mean over the edits of a group, one per seed, without the seeds of `left_out`."""
    found = {
        seed: mean(quantity(value, each.content) for each in made if (each.group, each.seed) == (edits, seed))
        for seed, names in _lacking(scale, made, edits).items()
        if not names
    }
    return {seed: value for seed, value in found.items() if value is not None}


def _names(scale: Scale) -> dict[str, list[str]]:
    """Return the names of the edits of one seed by group."""
    names: dict[str, list[str]] = {}
    for edit in scale.edits([0]):
        names.setdefault(edit.group, []).append(edit.name)
    return names


def _lacking(scale: Scale, made: Sequence[Made], edits: str) -> dict[int, list[str]]:
    """Return by seed the edits of a group that are missing or have no feasible coefficient."""
    own = [each for each in made if each.group == edits]
    there = {(each.seed, each.name) for each in own if is_feasible(each.content)}
    names = _names(scale).get(edits, [])
    return {seed: [n for n in names if (seed, n) not in there] for seed in sorted({each.seed for each in own})}


def left_out(scale: Scale, made: Sequence[Made]) -> list[str]:
    """Return a sentence for each seed of a group that tables leave out, as not all of its edits have numbers."""
    return [
        f"{scale.experiment} ({scale.name}), {group}: seed {seed} is left out, as {some(names)} is missing or has no "
        f"feasible coefficient"
        for group in _names(scale)
        for seed, names in _lacking(scale, made, group).items()
        if names
    ]


def rows_of(scale: Scale, made: Sequence[Made]) -> Iterator[Row]:
    """Return the rows of an experiment's table that have numbers."""
    column = scale.options.get("paper")
    names = _names(scale)
    for entry in scale.content["rows"]:
        if scale.name not in entry.get("scales", [scale.name]):
            continue
        unit = entry.get("unit", "percent")
        factor = 100.0 if unit == "percent" else 1.0
        seeds = by_seed(scale, made, entry["edits"], entry["value"])
        if not seeds:
            continue
        values = {seed: factor * value for seed, value in seeds.items()}
        ends = student_interval(np.array(list(values.values())))
        paper = (entry.get("paper") or {}).get(column)
        yield Row(
            scale.experiment,
            scale.name,
            entry["row"],
            paper,
            mean(values.values()),
            ends[0] if ends else None,
            ends[1] if ends else None,
            values,
            len(names[entry["edits"]]),
            unit,
            column if paper is not None else None,
            scale.differs,
        )


def effects_of(scale: Scale, made: Sequence[Made], confidence: float = 0.95) -> Iterator[Effect]:
    """Test each effect of an experiment, with seeds as the unit."""
    for entry in scale.content.get("effects", []):
        if scale.name not in entry.get("scales", [scale.name]):
            continue
        above = "above" in entry
        ours = by_seed(scale, made, entry["edits"], entry["value"])
        other = by_seed(scale, made, entry["edits"], entry["above" if above else "below"])
        differences = {s: (v - other[s]) * (1 if above else -1) for s, v in ours.items() if s in other}
        ends = student_interval(np.array(list(differences.values())), 2 * confidence - 1)
        yield Effect(
            scale.experiment,
            scale.name,
            entry["effect"],
            mean(differences.values()),
            ends and ends[0],
            confidence,
            differences,
        )


def find_fits(output: Path, setups: Iterable[str]) -> list[dict[str, Any]]:
    """Return the finished fits of setups: task, seed, seconds and the metric that each reached."""
    found = []
    for setup in sorted(set(setups)):
        for file in sorted((output / "fits" / setup).glob(f"*/seed=*/{DONE}")):
            seed = file.parent.name.removeprefix("seed=")
            if seed.isdecimal():
                done = read_done(file)
                place = {"setup": setup, "task": file.parent.parent.name, "seed": int(seed)}
                found.append({**place, "seconds": done["seconds"], "metric": done["metric"]})
    return found


def ledger(
    rows: Sequence[Row],
    effects: Sequence[Effect],
    made: Sequence[tuple[Scale, Made]],
    fits: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return all numbers behind a table as plain values, without local paths."""
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "threads": os.environ.get("OMP_NUM_THREADS")}
    return {
        "machine": machine,
        "fits": list(fits),
        "rows": [{**asdict(row), "difference": row.difference} for row in rows],
        "effects": [{**asdict(effect), "holds": effect.holds} for effect in effects],
        "edits": [
            {
                "experiment": scale.experiment,
                "scale": scale.name,
                "edit": each.name,
                "seed": each.seed,
                "seconds": each.seconds,
                "vectors": {name: vector["fingerprint"] for name, vector in each.content["vectors"].items()},
                **{key: each.content[key] for key in _KEPT},
            }
            for scale, each in made
        ],
    }


_KEPT = (
    "recipe",
    "coefficients",
    "verdict",
    "tasks",
    "baselines",
    "diagnostics",
    "sizes",
    "versions",
    "created",
)
