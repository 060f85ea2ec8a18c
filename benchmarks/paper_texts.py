"""Experiments from `tva paper`: forgetting and adding six real text tasks.

python -m benchmarks run paper_texts --seeds 0 1 2 --data_root DATA
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks import paper

OPTIONS = {**paper.OPTIONS}
DEPENDS = (*paper.DEPENDS, "benchmarks/paper_texts.py")
EXPERIMENTS = ("forgetting-texts", "adding-texts")


def measure(seed: int, scale: str, data_root: str, output: str) -> dict[str, Any]:
    """Run the experiments if need be, and return one seed's numbers and edits."""
    return paper.run_seed(EXPERIMENTS, seed, scale, data_root, output)


def tables(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, str]:
    """Return a comparison with the paper for each experiment, and the edits that forget."""
    return {name: paper.compared(runs, name) for name in EXPERIMENTS} | {"edits": paper.edits(runs)}
