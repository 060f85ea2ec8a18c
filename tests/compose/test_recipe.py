"""Recipes: what they compute, and where the caret stands when they cannot."""

import re

import pytest
import torch

from tva import TaskVector
from tva.compose.recipe import Recipe, RecipeError


def vector(*values: float) -> TaskVector:
    return TaskVector({"w": torch.tensor(values)})


VECTORS = {"a": vector(1, 2), "b": vector(10, 20), "c": vector(100, 200)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", [1, 2]),
        ("-a", [-1, -2]),
        ("a + b - c", [-89, -178]),
        ("0.5 * (a + b)", [5.5, 11]),
        ("(a + b) / 2", [5.5, 11]),
        ("a * -2", [-2, -4]),
        ("2 * 3 * a", [6, 12]),
        ("analogy(a, b, c)", [109, 218]),
        ("c + (b - a)", [109, 218]),
        ("mean(a, b, c)", [37, 74]),
        ("mean(a)", [1, 2]),
        ("s * a + l * (b - c)", [-178, -356]),
        (" analogy( a , b - a , c ) ", [108, 216]),
    ],
)
def test_recipes_compute_what_they_say(text, expected):
    recipe = Recipe(text, VECTORS, {"s": 2, "l": 2})
    assert recipe.evaluate(VECTORS).deltas["w"].tolist() == expected


def test_a_recipe_names_what_it_uses():
    recipe = Recipe("s * b + a - b", VECTORS, {"s": 2.0, "unused": 1.0})
    assert recipe.vectors == ["b", "a"]
    assert recipe.coefs == {"s": 2.0}


@pytest.mark.parametrize(
    ("text", "message", "caret_at"),
    [
        ("-tixic", "'tixic' is unknown; .* Did you mean 'toxic'?", "tixic"),
        ("toxic + other", "'other' is unknown", "other"),
        ("toxic * a", "Two task vectors cannot be multiplied", "* a"),
        ("toxic + 1", "A task vector and a number cannot be added", "+ 1"),
        ("(toxic) - 1", "A task vector and a number cannot be added", "- 1"),
        ("1 / toxic", "divided by a task vector", "/ toxic"),
        ("2 * 3", "A recipe must give a task vector", "2 * 3"),
        ("analogie(a, a, a)", "no function 'analogie'; .* Did you mean 'analogy'?", "analogie"),
        ("a + analogy(a, a)", "takes 3 task vectors and was given 2", "analogy"),
        ("mean(a, 2)", "This is a number, but mean takes task vectors", "2"),
        ("mean()", "takes at least one", "mean"),
        ("mean(a, density=1)", "mean has no option 'density'; it has no options", "1"),
        ("a ** 2", "Only names, numbers", "a"),
        ("a.deltas", "Only names, numbers", "a"),
        ("__import__('os').system('true')", "Only names, numbers", "__import__"),
        ("[a for a in a]", "Only names, numbers", "["),
        ("λμ + a", "'λμ' is unknown", "λμ"),
        ("a + λμ", "'λμ' is unknown", "λμ"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_caret(text, message, caret_at):
    with pytest.raises(RecipeError) as error:
        Recipe(text, ["toxic", "a"])
    first, shown, caret = str(error.value).splitlines()
    assert re.search(message, first)
    assert shown[caret.index("^") :].startswith(caret_at)


@pytest.mark.parametrize("text", ["a +", "a b", "a; a", "a = a"])
def test_what_is_no_expression_is_refused(text):
    with pytest.raises(RecipeError, match="not an expression"):
        Recipe(text, ["a"])


def test_division_by_zero_and_bad_names():
    with pytest.raises(RecipeError, match="divides by zero"):
        Recipe("a / (1 - 1)", VECTORS).evaluate(VECTORS)
    with pytest.raises(RecipeError, match="letters, digits and underscores.*'run-1'"):
        Recipe("a", ["a", "run-1"])
    with pytest.raises(RecipeError, match="both a task vector and a coefficient"):
        Recipe("a", ["a"], {"a": 1.0})


def test_methods_in_one_another_are_limited():
    Recipe("ties(" * 16 + "a" + ")" * 16, ["a"])
    with pytest.raises(RecipeError, match="At most 16 methods may be in one another"):
        Recipe("ties(" * 17 + "a" + ")" * 17, ["a"])
