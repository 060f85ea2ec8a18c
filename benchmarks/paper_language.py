"""Experiments from `tva paper`: what a language model of 135 M parameters writes, and sentiment by analogy.

python -m benchmarks run paper_language --seeds 0 1 2 --data_root DATA
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks import paper

OPTIONS = {**paper.OPTIONS}
DEPENDS = (*paper.DEPENDS, "benchmarks/paper_language.py")
EXPERIMENTS = ("forgetting-toxicity", "forgetting-style", "analogy-sentiment")


def measure(seed: int, scale: str, data_root: str, output: str) -> dict[str, Any]:
    """Run the experiments if need be, and return one seed's numbers and edits."""
    return paper.run_seed(EXPERIMENTS, seed, scale, data_root, output)


def tables(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, str]:
    """Return a comparison with the paper for each experiment."""
    return {name: paper.compared(runs, name) for name in EXPERIMENTS}
