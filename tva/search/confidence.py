"""Many coefficients under one confidence: tests in sequence, tests that share it, and what the examples suffice for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tva.evaluation.bounds import MAX_EXAMPLES, allowed_loss, clears, needed_examples
from tva.evaluation.result import Evaluation
from tva.search.candidate import Candidate
from tva.search.goals import Constraint

RISE = 0.99  # confidence with which a constraint must get better for it to be called not monotone


def chains(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Return the sequences in which candidates are tested, each from the smallest edit to the largest.

    In a sequence one coefficient grows, or several that are always equal, in one direction from 0. Of several
    coefficients the last one grows, in one sequence for each value of the others.

    Example:
        >>> grid = [Candidate.of(scaling_coef=x) for x in (-1.0, -0.5, 0.5, 1.0)]
        >>> [[c.scaling_coef for c in chain] for chain in chains(grid)]
        [[-0.5, -1.0], [0.5, 1.0]]
    """
    together = all(len({value for _, value in candidate.coefs}) == 1 for candidate in candidates)
    last = [candidate.coefs[-1][1] for candidate in candidates]
    only_down = max(last, default=0.0) <= 0
    found: dict[tuple[object, ...], list[Candidate]] = {}
    for candidate, value in zip(candidates, last, strict=True):
        others = () if together else candidate.coefs[:-1]
        down = value < 0 or (value == 0 and only_down)
        found.setdefault((others, down), []).append(candidate)
    return [sorted(chain, key=lambda c: abs(c.coefs[-1][1])) for chain in found.values()]


def leading(sequences: Sequence[Sequence[Candidate]], holds: Callable[[Candidate], bool]) -> set[Candidate]:
    """Return the candidates of which, in their sequence, all up to themselves hold.

    Each sequence's error is that of one test: to pass a candidate that does not hold, the first such one must have
    been passed.

    Source: Maurer, Hothorn and Lehmacher, "Multiple comparisons in drug clinical trials and preclinical assays:
    a-priori ordered hypotheses", 1995.
    """
    found: set[Candidate] = set()
    for sequence in sequences:
        for candidate in sequence:
            if not holds(candidate):
                break
            found.add(candidate)
    return found


def lacking_power(
    constraints: Sequence[Constraint], base: Mapping[str, Evaluation], confidence: float, split: str = "validation"
) -> list[str]:
    """Return a sentence for each constraint that no edit can be shown to meet on these examples unless it gains.

    Args:
        constraints: On the edit.
        base: The base's evaluations by task.
        confidence: With which each is tested.
        split: What the examples are called.
    """
    found = []
    for constraint in constraints:
        evaluation, metric = base[constraint.task], constraint.metric
        if metric not in evaluation.scores or not constraint.holds_at_base(base):
            continue
        at_base = {constraint.task: evaluation.metrics}
        scores, groups = evaluation.scores[metric], evaluation.groups
        unit = "" if groups is None else f" in {evaluation.num_groups:,} groups"
        test = constraint.slope, constraint.offset, confidence, constraint.above
        if clears(scores, scores, *test, groups=groups):
            continue
        needed = needed_examples(scores, *test, groups=groups)
        how = f"raise val_size of {constraint.task}" if split == "validation" else f"test {constraint.task} on more"
        if constraint.bound(at_base) == at_base[constraint.task][metric]:
            remedy = "the bound leaves no room below the base, so that no number of examples suffices"
        elif needed is None:
            remedy = f"more than {MAX_EXAMPLES:,} are needed even if nothing is lost"
        else:
            units = " groups" if unit else ""
            remedy = f"{needed:,}{units} are needed even if nothing is lost; {how}, or lower the confidence"
        found.append(
            f"with {evaluation.num_examples:,} {split} examples{unit} at {metric} {evaluation.metrics[metric]:.3g} of "
            f"the base, no coefficient can be shown to keep {constraint.text!r} with {confidence:.4g} confidence "
            f"unless it gains: {remedy}"
        )
    return found


def power_of(constraint: Constraint, base: Evaluation, confidence: float) -> tuple[int | None, float | None]:
    """Return what a constraint's examples suffice for: how many are needed, and what loss is still shown to be allowed.

    Args:
        constraint: On the edit.
        base: The base's evaluation of its task.
        confidence: With which it is tested; 0.5 is the point estimate, of which nothing is said.

    Returns:
        As `needed_examples` (groups, where these are the unit) and `allowed_loss`.
    """
    if confidence == 0.5 or constraint.metric not in base.scores:
        return None, None
    scores = base.scores[constraint.metric]
    test = constraint.slope, constraint.offset, confidence, constraint.above
    return needed_examples(scores, *test, groups=base.groups), allowed_loss(scores, *test, groups=base.groups)


def rising(
    constraints: Sequence[Constraint],
    points: Sequence[Candidate],
    scores: Mapping[Candidate, Mapping[tuple[str, str], np.ndarray]],
    groups: Mapping[str, np.ndarray | None],
    holds: Callable[[Candidate], bool],
) -> str | None:
    """Describe where a constraint gets better as the coefficient grows, among points evaluated on the same examples.

    Args:
        constraints: That are taken to get only worse.
        points: Any that were evaluated.
        scores: By point, and by task and metric, one score per example; may lack some.
        groups: By task the group of each example, where groups are the independent draws.
        holds: Whether all constraints hold at a point.

    Returns:
        Two points that contradict it, in words; None where none do.
    """
    ordered = sorted(points, key=lambda point: point.size)
    for place, small in enumerate(ordered):
        for large in ordered[place + 1 :]:
            if holds(large) and not holds(small):
                return f"the constraints hold at {large} and fail at {small}"
            for constraint in constraints:
                key = constraint.task, constraint.metric
                if key not in scores.get(small, {}) or key not in scores.get(large, {}):
                    continue
                better, worse = scores[large][key], scores[small][key]
                if len(better) != len(worse):
                    continue
                above, of = constraint.above, groups[constraint.task]
                if clears(better, worse, 1.0, 0.0, RISE, above, guard=False, groups=of):
                    return f"{'/'.join(key)} is better at {large} than at {small}"
    return None
