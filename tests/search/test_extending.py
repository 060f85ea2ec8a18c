"""A search is one file in tva/search, one entry point, or any class on the path."""

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

import tva.search
from tva import plugins
from tva.evaluation.result import Evaluation
from tva.search import Constraint, Problem, Search, searches_in

MODULE = """
from tva.search import Candidate, Grid, Search

class Halves(Search):
    '''Try 1, ½, ¼ … of the range's end.

    Args:
        num: How many.
    '''

    def __init__(self, num: int = 6) -> None:
        super().__init__()
        self.num = num

    def run(self, problem):
        (name, (low, high)) = next(iter(self.ranges.items()))
        problem.score([Candidate.of(**{name: low + (high - low) / 2**step}) for step in range(self.num)])
        return problem.choose()

class _Hidden(Search):
    pass
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    Path("searches_from_outside").mkdir()
    Path("searches_from_outside/__init__.py").touch()
    Path("searches_from_outside/halves.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "searches_from_outside"
    for name in [name for name in sys.modules if name.startswith("searches_from_outside")]:
        del sys.modules[name]


def run(search):
    def evaluate(candidates, windows, seed):
        return [{"a": Evaluation({"loss": 1 + candidate.scaling_coef}, 10)} for candidate in candidates]

    constraint = Constraint.parse("a/loss <= base + 0.3", ["a"])
    return search.run(Problem(evaluate, {"a": Evaluation({"loss": 1.0}, 10)}, [constraint], rule="largest"))


def test_the_searches_of_a_folder_are_found_and_those_it_imports_or_hides_are_not(outside):
    found = searches_in(outside)
    assert list(found) == ["Halves"]
    assert run(found["Halves"]()).scaling_coef == 0.25


def test_two_searches_of_one_name_are_refused(outside):
    Path(f"{outside}/quarters.py").write_text(MODULE)
    with pytest.raises(ValueError, match=r"halves and .*quarters both define the search 'Halves'"):
        searches_in(outside)


def test_every_search_of_the_package_is_exported():
    assert {"Bisect", "Grid", "Learned", "Optuna", "Race"} <= set(tva.search.SEARCHES)
    for name, kind in tva.search.SEARCHES.items():
        assert getattr(tva.search, name) is kind
        assert name in tva.search.__all__
        assert issubclass(kind, Search)
    with pytest.raises(AttributeError, match="no attribute 'Nope'"):
        _ = tva.search.Nope


def test_the_search_of_an_installed_package_has_a_class_path_in_tva_search(outside, monkeypatch):
    points = [
        EntryPoint("Halves", f"{outside}.halves:Halves", "tva.searches"),
        EntryPoint("NotOne", "math:tau", "tva.searches"),
    ]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points if group == "tva.searches" else [])
    plugins.installed.cache_clear()
    try:
        parser = ArgumentParser()
        parser.add_argument("--search", type=Search)
        for path in ("tva.search.Halves", f"{outside}.halves.Halves"):
            parsed = parser.parse_args([f"--search={path}", "--search.num=3"])
            search = parser.instantiate_classes(parsed).search
            assert (type(search).__name__, search.num) == ("Halves", 3)
            assert run(search).scaling_coef == 0.25
        with pytest.raises(TypeError, match="must be a subclass of tva.search.Search; found 6.28"):
            _ = tva.search.NotOne
    finally:
        plugins.installed.cache_clear()
        vars(tva.search).pop("Halves", None)
