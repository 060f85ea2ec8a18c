"""The demo, whole: every effect that the README shows appears, and the analogy never saw its fourth part."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tva.edit.evaluator
from examples import demo
from tva.data import ImageTask
from tva.data.builtin import load_builtin
from tva.data.image_task import Examples


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run `make demo`'s module once; note every picture that is read for anything but a test score."""
    output = tmp_path_factory.mktemp("demo")
    read: set[bytes] = set()
    phase = {"test": False}
    with pytest.MonkeyPatch.context() as patch:
        get, evaluate = Examples.__getitems__, tva.edit.evaluator.evaluate

        def noted_get(self, indices):
            if not phase["test"]:
                read.update(self.images[index].tobytes() for index in indices)
            return get(self, indices)

        def noted_evaluate(trainer, model, datamodule, split, **options):
            phase["test"] = split == "test"
            try:
                return evaluate(trainer, model, datamodule, split, **options)
            finally:
                phase["test"] = False

        patch.setattr(Examples, "__getitems__", noted_get)
        patch.setattr(tva.edit.evaluator, "evaluate", noted_evaluate)
        demo.main(["--output", str(output)])
    reports = {edit: json.loads((output / edit / "seed=0/edit.json").read_text()) for edit in demo.EDITS}
    return output, reports, read


def value(report, task, label):
    return report["tasks"][task][label]["value"]


def test_make_demo_runs_it():
    root = Path(demo.__file__).parents[1]
    (module,) = re.findall(r"^demo: .*\n\t.*python -m (\S+)", (root / "Makefile").read_text(), re.MULTILINE)
    ran = subprocess.run([sys.executable, "-m", module, "--help"], cwd=root, capture_output=True, text=True, check=True)
    assert "usage: python -m examples.demo" in ran.stdout


@pytest.mark.slow
def test_forgetting_takes_more_than_half_and_keeps_the_control(run):
    report = run[1]["forget"]
    assert value(report, "digits", "edited") < 0.5 * value(report, "digits", "base")
    assert value(report, "objects", "edited") >= 0.95 * value(report, "objects", "base")
    assert value(report, "digits", "random") > 0.9 * value(report, "digits", "base")
    assert report["holds"] is True


@pytest.mark.slow
def test_addition_lifts_every_task(run):
    report = run[1]["add"]
    targets = [name for name, task in report["tasks"].items() if task["role"] == "target"]
    assert len(targets) >= 3
    for name in targets:
        assert value(report, name, "base") < value(report, name, "finetuned") - 0.1
        assert value(report, name, "edited") > max(value(report, name, "base"), value(report, name, "random")) + 0.05
        assert report["tasks"][name]["normalized"] > 0.6


@pytest.mark.slow
def test_the_analogy_improves_a_fourth_part_that_was_never_read(run):
    _, reports, read = run
    assert value(reports["analogy"], "sketch_b", "edited") > value(reports["analogy"], "sketch_b", "base") + 0.03
    assert value(reports["analogy"], "sketch_b", "edited") > value(reports["analogy"], "sketch_b", "random") + 0.03
    symbols = load_builtin("symbols")
    of_part = {}
    for split in symbols.values():
        for row in split:
            of_part.setdefault((row["style"], row["half"]), set()).add(row["image"].tobytes())
    assert not read & of_part["sketch", "B"]
    for part in (("solid", "A"), ("solid", "B"), ("sketch", "A")):
        assert len(read & of_part[part]) > 300  # the net that was cast does catch what is read


@pytest.mark.slow
def test_the_figure_is_drawn_and_the_curves_are_recorded(run):
    output, reports, _ = run
    drawing = (output / "curves.svg").read_text()
    assert len(drawing.encode()) < 20_000  # it is in the README
    for name in ("digits (target)", "objects (control)", "forget: -digits", "scaling coefficient λ"):
        assert name in drawing
    assert "3 edits side by side" in (output / "report.html").read_text()
    for report in reports.values():
        assert len({e["coefficients"]["scaling_coef"] for e in report["evaluations"] if e["split"] == "val"}) == 21


def test_no_demo_config_trains_or_chooses_on_the_fourth_part():
    import yaml

    for config in (demo.CONFIGS / "fit").glob("*.yaml"):
        where = yaml.safe_load(config.read_text()).get("data", {}).get("init_args", {}).get("where") or {}
        assert (where.get("style"), where.get("half")) != ("sketch", "B"), config
    edit = yaml.safe_load((demo.CONFIGS / "edit/analogy.yaml").read_text())
    assert "sketch_b" not in edit["maximize"]
    assert not edit.get("subject_to")


def test_spread_and_task_names():
    assert demo.spread([0.5, 0.6, 0.7]) == "60.0% [35.2, 84.8]"
    assert ImageTask("builtin:digits").name == "digits"
