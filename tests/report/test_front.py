"""The Pareto front of a search: against the definition, in the page, and as a file."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from small_edit import edit

from tva.report.front import front, front_rows
from tva.report.page import edit_page
from tva.search import Bisect, Grid


def content_of(values, maximize=None, target_up=True, control_up=True):
    """Make what is read of a report; ``values`` has a target's and a control's score by coefficient, 0 the base."""
    entries = []
    for coef, pair in enumerate(values):
        for task, value in zip(("t", "c"), pair, strict=True):
            entry = {"model": "edited" if coef else "base", "coefficients": {"scaling_coef": float(coef)}, "task": task}
            entries.append(entry | {"split": "val", "metric": "m", "num_examples": 10, "value": value})
    task = {"metric": "m", "base": {"value": 0.5}, "edited": {"value": 0.4}}
    return {
        "tasks": {
            "t": task | {"role": "target", "higher_is_better": target_up},
            "c": task | {"role": "control", "higher_is_better": control_up},
        },
        "evaluations": entries,
        "search": {} if maximize is None else {"maximize": maximize},
    }


@pytest.mark.parametrize("maximize", [True, False, None])  # None: as the edit went, down
@pytest.mark.parametrize("control_up", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_the_front_is_what_no_other_point_dominates(maximize, control_up, seed):
    values = np.random.default_rng(seed).integers(0, 6, (25, 2)) / 5  # with ties
    content = content_of(values.tolist(), maximize, control_up=control_up)
    signs = np.array([1 if maximize else -1, 1 if control_up else -1])
    better = values * signs
    dominated = [((better >= one).all(1) & (better > one).any(1)).any() for one in better]
    expected = {tuple(pair) for pair, out in zip(values.tolist(), dominated, strict=True) if not out}
    found = front(content, "t", "c")
    assert {(gained.value, kept.value) for gained, kept in found} == expected
    assert len(found) == len(expected)  # of equal points one
    assert [kept.value for _, kept in found] == sorted((k.value for _, k in found), reverse=control_up)


def test_a_point_without_the_control_is_not_on_the_front():
    content = content_of([(0.5, 0.5), (0.1, 0.9), (0.0, 1.0)])
    content["evaluations"].pop()
    assert [gained.value for gained, _ in front(content, "t", "c")] == [0.1]


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_an_edit_writes_its_front_and_rings_it(suffix, vectors):
    options = {"recipe": "a - b", "maximize": None, "minimize": "mean(accuracy)", "search": Grid(num=7)}
    options["subject_to"] = ["other/accuracy >= 0"]
    path = Path(f"new/front.{suffix}")
    edit(vectors, front=path, **options)
    content = json.loads(Path("out/edit.json").read_text())
    rows = front_rows(content)
    assert {(row["target"], row["control"]) for row in rows} == {("a", "other"), ("b", "other")}
    assert all(row["target_low"] <= row["target_value"] <= row["target_high"] for row in rows)
    written = json.loads(path.read_text()) if suffix == "json" else list(csv.DictReader(path.read_text().splitlines()))
    assert [float(row["control_value"]) for row in written] == [row["control_value"] for row in rows]
    assert content["search"]["maximize"] is False
    assert f"Rings: the {len(rows)} of 14 coefficients on the Pareto front" in edit_page(content)


def test_a_front_that_cannot_be_is_refused_before_anything_is_evaluated(vectors):
    with pytest.raises(ValueError, match=r"ends in \.csv or \.json; found 'front\.txt'"):
        edit(vectors, front="front.txt")
    with pytest.raises(ValueError, match="found 2 targets and 0 controls"):
        edit(vectors, front="front.csv", controls=None)


def test_a_search_that_evaluates_no_target_has_an_empty_front_of_the_base(vectors):
    asked = {"rule": "largest", "subject_to": ["other/accuracy >= 0"], "search": Bisect(num=5), "maximize": None}
    report = edit(vectors, front=Path("front.json"), **asked)
    assert json.loads(Path("front.json").read_text()) == front_rows(report.to_json())
