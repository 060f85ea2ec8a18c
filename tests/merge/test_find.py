"""Merge methods from outside: a file in the folder, an entry point of an installed package, a dotted path."""

import re
import sys
from pathlib import Path

import pytest
import torch
from small_cli import run

import tva.merge.methods
from tva import TaskVector, open_weights, save_weights
from tva.compose.recipe import Recipe
from tva.errors import RecipeError
from tva.merge import METHODS, Method
from tva.merge.find import own_methods
from tva.plugins import installed

PAGE = (Path(__file__).parents[2] / "docs" / "tutorials" / "your-method.md").read_text()
(MEDIAN,) = re.findall(r"```python\n([^`]*class Median.*?)```", PAGE, re.S)
OTHER = "class Other:\n    pass\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with a base and three vectors, and a package on the path that defines the page's method."""
    Path("site/outside").mkdir(parents=True)
    Path("site/outside/__init__.py").write_text("")
    Path("site/outside/median.py").write_text(MEDIAN + "\n\n" + OTHER)
    monkeypatch.syspath_prepend(Path("site"))
    base = {"w": torch.randn(300), "still": torch.ones(3)}
    save_weights(base, "base.safetensors")
    for name in "abc":
        save_weights({**base, "w": base["w"] + torch.randn(300)}, f"{name}.safetensors")
    installed.cache_clear()
    yield tmp_path
    installed.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "outside"]:
        del sys.modules[name]


def install(folder, name, value, package="outside"):
    """Make the package one that is installed, with an entry point."""
    information = folder / f"site/{package}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[tva.merge_methods]\n{name} = {value}\n")
    installed.cache_clear()


def compose(recipe, output="out.safetensors"):
    vectors = [word for name in "abc" for word in (f"--vectors.{name}", f"{name}.safetensors")]
    return run("compose", "--base", "base.safetensors", *vectors, "--recipe", recipe, "--output", output, "--keep_undo")


def assert_is_the_median(recipe):
    base = open_weights("base.safetensors")
    given = {name: TaskVector.between(base, open_weights(f"{name}.safetensors")) for name in "abc"}
    expected = torch.stack([vector.deltas["w"] for vector in given.values()]).median(dim=0).values
    assert torch.equal(Recipe(recipe, given).evaluate(given).deltas["w"], 0.5 * (2 * expected))
    assert compose(recipe) == 0
    assert torch.equal(open_weights("out.safetensors")["w"], base["w"] + 0.5 * (2 * expected))
    assert run("verify", "out.safetensors") == 0
    assert run("revert", "out.safetensors", "--output", "back.safetensors") == 0
    assert torch.equal(open_weights("back.safetensors")["w"], base["w"])


def test_a_dotted_path_names_a_method(folder):
    assert_is_the_median("0.5 * outside.median.Median(a, b, c, scale=2)")


def test_an_installed_package_adds_a_method_by_an_entry_point(folder):
    install(folder, "median", "outside.median:Median")
    assert_is_the_median("0.5 * median(a, b, c, scale=2)")


def test_a_file_in_the_folder_adds_a_method(folder, monkeypatch):
    Path("more").mkdir()
    Path("more/a_median.py").write_text(MEDIAN)
    monkeypatch.setattr(tva.merge.methods, "__path__", [*tva.merge.methods.__path__, "more"])
    found = own_methods()
    assert found.keys() == METHODS.keys() | {"median"}
    assert list(found) == sorted(found), "the order is that of the names, whatever the files are called"
    monkeypatch.setitem(METHODS, "median", found["median"])
    assert_is_the_median("0.5 * median(a, b, c, scale=2)")
    del sys.modules["tva.merge.methods.a_median"]


def test_verify_says_that_a_package_is_missing(folder, capsys):
    assert compose("outside.median.Median(a, b, c)") == 0
    Path("site/outside").rename("elsewhere")
    for name in ("outside", "outside.median"):
        sys.modules.pop(name)
    sys.path_importer_cache.clear()
    assert run("verify", "out.safetensors") == 2
    text = capsys.readouterr().err
    assert "The recipe of out.safetensors cannot be computed here" in text
    assert "there is no module 'outside'" in text
    assert "Install it" in text


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("nowhere.Median(a, b)", "there is no module 'nowhere'"),
        ("outside.median.Mode(a, b)", "the module outside.median has no 'Mode'"),
        ("outside.median.Other(a, b)", r"must be a merge method: a frozen dataclass derived from tva.merge.Method"),
        ("os.system(a, b)", "must be a merge method"),
        ("median(a, b)", "There is no function 'median'; known are analogy, .* or named by a dotted path"),
        ("a.w", "Only names, numbers"),
        ("a[0](b)", "Only names, numbers"),
    ],
)
def test_what_is_no_method_is_refused_where_it_stands(folder, recipe, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(recipe, "abc")


def test_an_entry_point_that_is_no_method_is_refused(folder):
    install(folder, "other", "outside.median:Other")
    with pytest.raises(RecipeError, match=r"other, which is outside.median:Other, must be a merge method"):
        Recipe("other(a)", "a")


def test_two_packages_with_one_name_are_refused(folder):
    install(folder, "median", "outside.median:Median")
    install(folder, "median", "outside.median:Other", "another")
    with pytest.raises(RecipeError, match="Two installed packages define 'median'"):
        Recipe("median(a)", "a")


def test_every_method_is_in_the_folder_under_its_name():
    assert list(METHODS) == sorted(METHODS)
    for name, method in METHODS.items():
        assert method.name == name
        assert issubclass(method, Method)
