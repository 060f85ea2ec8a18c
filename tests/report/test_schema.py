"""Reports of edits from elsewhere, against the schema."""

import copy
import json
import random
from pathlib import Path

import jsonschema
import pytest
from small_edit import edit

from tva.report.edit_report import read_report
from tva.report.schema import _schema, problems

ODD = [None, True, -1, 2**70, float("nan"), "", "x" * 5000, [], {}, [[]], {"a": {}}]


def mutated(content, rng):
    """Replace or remove a part of a report."""
    content = copy.deepcopy(content)
    slots, level = [], [content]
    while level:
        found = [(each, key) for each in level for key in (each if isinstance(each, dict) else range(len(each)))]
        slots += found
        level = [each[key] for each, key in found if isinstance(each[key], dict | list)]
    container, key = rng.choice(slots)
    if rng.random() < 0.3:
        del container[key]
    else:
        container[key] = rng.choice(ODD)
    return content


@pytest.fixture(scope="module")
def report(vectors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    edit(vectors, folder=folder)
    return json.loads((folder / "out/edit.json").read_text())


def test_problems_are_those_that_a_library_finds(report):
    schema = {**_schema(), "required": ["base", "vectors"]}
    library = jsonschema.Draft202012Validator(schema)
    assert not list(problems(report))
    for seed in range(150):
        changed = mutated(report, random.Random(seed))
        if changed.get("evaluations") != []:  # an error of its own
            assert bool(list(problems(changed))) == (not library.is_valid(changed)), seed


def test_a_field_of_another_kind_is_named(report):
    report = copy.deepcopy(report)
    next(iter(report["tasks"].values()))["base"]["value"] = "\x1b[31m" + "9" * 500
    Path("edit.json").write_text(json.dumps(report))
    with pytest.raises(
        ValueError, match=r"edit.json is not an edit report of this version .*base/value must be number"
    ):
        read_report(Path())


@pytest.mark.parametrize("name", ["base", "vectors"])
def test_a_report_without_its_inputs_is_an_error_with_its_path(report, name):
    Path("edit.json").write_text(json.dumps({key: value for key, value in report.items() if key != name}))
    with pytest.raises(ValueError, match=f"edit.json is not an edit report of this version .*{name}"):
        read_report(Path())
