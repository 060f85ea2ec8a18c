"""Choosing a coefficient: both forgetting rules, constraints and objectives, on scores written by hand."""

import pytest

from tva.search import Constraint, Grid, Objective, Search, choose

TASKS = ["digits", "photos", "photos-2.0"]


def scores(digits: float, photos: float) -> dict[str, dict[str, float]]:
    return {"digits": {"accuracy": digits}, "photos": {"accuracy": photos, "loss": 1 - photos}}


# the target is lowest at 0.4; the control falls below 95 % of 0.8 after 0.6, and comes back at 1.0
TRIED = {
    0.0: scores(0.9, 0.80),
    0.2: scores(0.5, 0.80),
    0.4: scores(0.1, 0.79),
    0.6: scores(0.3, 0.76),
    0.8: scores(0.0, 0.75),
    1.0: scores(0.2, 0.77),
}
BASE = TRIED[0.0]
KEEP = Constraint.parse("photos/accuracy >= 0.95 * base", TASKS)
FORGET = Objective.parse("digits/accuracy", maximize=False, targets=["digits"], tasks=TASKS)


def test_largest_is_the_papers_rule():
    assert choose(TRIED, BASE, [KEEP], FORGET, "largest").scaling_coef == 1.0
    without_the_last = {coef: value for coef, value in TRIED.items() if coef < 1}
    assert choose(without_the_last, BASE, [KEEP], None, "largest").scaling_coef == 0.6


def test_best_takes_the_lowest_target_among_those_whose_control_holds():
    choice = choose(TRIED, BASE, [KEEP], FORGET, "best")
    assert (choice.scaling_coef, choice.feasible) == (0.4, True)
    assert choose(TRIED, BASE, [], FORGET, "best").scaling_coef == 0.8  # lowest of all, without a constraint


def test_best_maximizes_too_and_ties_go_to_the_smaller_edit():
    keep_photos = Objective.parse("photos/accuracy", maximize=True, targets=["digits"], tasks=TASKS)
    assert choose(TRIED, BASE, [], keep_photos, "best").scaling_coef == 0.2
    flat = {coef: scores(0.5, 0.5) for coef in (0.3, -0.1, 0.2)}
    assert choose(flat, BASE, [], keep_photos, "best").scaling_coef == -0.1


def test_no_feasible_coefficient_gives_the_closest_and_says_so():
    strict = Constraint.parse("photos/accuracy > base", TASKS)
    choice = choose(TRIED, BASE, [strict], FORGET, "best")
    assert not choice.feasible
    assert choice.scaling_coef == 0.2
    assert "'photos/accuracy > base'" in choice.reason


def test_coefficient_zero_is_never_chosen_while_another_holds():
    better_at_zero = Objective.parse("digits/accuracy", maximize=True, targets=["digits"], tasks=TASKS)
    assert choose(TRIED, BASE, [KEEP], better_at_zero, "best").scaling_coef == 0.2


@pytest.mark.parametrize(
    ("text", "bound", "holds"),
    [
        ("photos/accuracy >= 0.95 * base", 0.76, True),
        ("photos/accuracy>=base", 0.8, False),
        ("photos/loss <= base + 0.05", 0.25, True),
        ("photos/loss < 0.1 + base / 2 - 0.15", 0.05, False),
        ("photos/accuracy > -base", -0.8, True),
    ],
)
def test_constraints_are_read_as_written(text, bound, holds):
    constraint = Constraint.parse(text, TASKS)
    assert constraint.bound(BASE) == pytest.approx(bound)
    assert constraint.holds(TRIED[0.4], BASE) is holds
    assert (constraint.shortfall(TRIED[0.4], BASE) == 0) is holds


def test_nan_never_holds():
    assert not KEEP.holds(scores(0.1, float("nan")), BASE)
    assert KEEP.shortfall(scores(0.1, float("nan")), BASE) == float("inf")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("photos >= 0.9", "must read like"),
        ("photos/accuracy = 0.9", "must read like"),
        ("imagenet/accuracy >= 0.9", r"on the task 'imagenet', which is not among.*controls\.imagenet"),
        ("photos/accuracy >= 0.9 * bse", "numbers, 'base' and"),
        ("photos/accuracy >= open('x')", "numbers, 'base' and"),
    ],
)
def test_constraints_that_cannot_be_read(text, message):
    with pytest.raises(ValueError, match=message):
        Constraint.parse(text, TASKS)


def test_a_constraint_without_any_control_says_none_is_given():
    with pytest.raises(ValueError, match="none is given"):
        Constraint.parse("photos/accuracy >= 0.95 * base", [])


def test_a_metric_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(ValueError, match="photos has no metric 'f1'; it has 'accuracy', 'loss'"):
        Constraint.parse("photos/f1 >= 0.5", TASKS).holds(TRIED[0.2], BASE)


@pytest.mark.parametrize("text", ["digits", "mean(accuracy", "digits/accuracy + 1", ""])
def test_objectives_that_cannot_be_read(text):
    with pytest.raises(ValueError, match="must read"):
        Objective.parse(text, maximize=True, targets=["digits"], tasks=TASKS)


def test_objectives_on_tasks_that_are_not_there():
    with pytest.raises(ValueError, match="not among"):
        Objective.parse("cars/accuracy", maximize=True, targets=["digits"], tasks=TASKS)
    with pytest.raises(ValueError, match="mean over the targets"):
        Objective.parse("mean(accuracy)", maximize=True, targets=[], tasks=TASKS)


def test_the_default_grid_is_the_papers_21_points():
    assert Grid().coefficients() == [round(0.05 * step, 2) for step in range(21)]
    assert Grid(-1, 1, 3).coefficients() == [-1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="2 points or more"):
        Grid(num=1)
    with pytest.raises(ValueError, match="start < stop"):
        Grid(1, 0)
    with pytest.raises(TypeError, match=r"tva\.search\.Grid"):
        Search().coefficients()
