"""Choice and proof on the same examples, and edits below chance, through the whole of an edit."""

import json
from pathlib import Path

import pytest
from small_edit import Task, edit

from tva.report.edit_report import Comparison, Score, TaskReport
from tva.report.page import _chance


class Same(Task):
    """Tests on what it validates on."""

    def test_dataloader(self):
        return self._counted(1, "test")


def test_a_coefficient_is_not_proved_on_the_examples_it_was_chosen_on(vectors):
    tasks = {"targets": {"a": Same(1), "b": Task(2)}}
    with pytest.raises(ValueError, match="of the 200 test examples of a 200 are among its validation examples"):
        edit(vectors, **tasks)
    assert not Path("out").exists()
    report = edit(vectors, **tasks, allow_shared_examples=True)
    assert report.sizes["a"] == {"val": 200, "test": 200, "shared": 200}
    assert "shared" not in report.sizes["b"]
    assert "200 of them among its validation examples" in Path("out/report.html").read_text()
    given = edit(vectors, **tasks, maximize=None, scaling_coef=0.5)  # was not chosen on any data
    assert given.sizes["a"]["test"] == 200


def test_the_chance_level_is_in_the_report_and_a_model_below_it_is_said_to_be_inverted(vectors):
    edit(vectors, maximize=None, scaling_coef=0.5)
    found = json.loads(Path("out/edit.json").read_text())["tasks"]["a"]
    assert 0.3 < found["chance"] < 0.7
    assert found["below_chance"] is False

    def report(high):
        scores = {"base": Score(0.9, 0.85, 0.95), "edited": Score(0.28, 0.22, high)}
        return TaskReport("target", "test", "accuracy", True, 200, scores, Comparison(*[0.0] * 7), chance=0.5)

    assert report(0.34).below_chance
    assert not report(0.52).below_chance
    assert not report(None).below_chance
    entry = {"chance": 0.5, "below_chance": True, "metric": "accuracy"}
    assert _chance(entry, "edited") == " chance 50.0%, below it: inverted, not gone"
    assert _chance(entry, "base") == ""
