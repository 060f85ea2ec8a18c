"""Experiments from `tva paper`: what `make paper-smoke` checks, on the model and sets that ship with tva.

python -m benchmarks run paper_smoke --seeds 0 1 2
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks import paper

OPTIONS = {**paper.OPTIONS, "scale": "smoke", "output": "runs/paper-smoke"}
DEPENDS = (*paper.DEPENDS, "benchmarks/paper_smoke.py")
EXPERIMENTS = ("forgetting-images", "adding-images", "analogy-subpopulations")


def measure(seed: int, scale: str, data_root: str, output: str) -> dict[str, Any]:
    """Run the experiments if need be, and return one seed's numbers and edits."""
    return paper.run_seed(EXPERIMENTS, seed, scale, data_root, output)


def tables(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, str]:
    """Return a comparison with the paper for each experiment."""
    return {name: paper.compared(runs, name, "smoke") for name in EXPERIMENTS}
