"""How often does a gate let an edit through that loses more than was allowed? Real predictions, many draws.

    python benchmarks/real/gate.py DATA [--seeds 0 1 2] [--draws 300] [--output runs/real]

After ``benchmarks/real/run.py DATA --only forget``. The two controls are evaluated under λ = 0, 0.1 … 1 of each
forgetting edit, on all their validation and test examples. These then stand for the population: as often as asked for,
as many validation and test examples as the edit had are drawn from them with replacement; λ is chosen on the first part
by point estimate or at 95 % confidence, and the gate decides on the second. An edit is too far if a control has less
than 95 % of the base on the population. What was evaluated is kept under OUTPUT.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from run import CONFIDENCE, FORGET, Benchmark, rows
from torch import Tensor

from tva import TaskVector
from tva.evaluation.bounds import clears

KEEP = 0.95
GRID = [step / 10 for step in range(11)]
CONTROLS = ("cifar10", "rsscn7")
Right = Mapping[str, Mapping[str, np.ndarray]]  # control -> split -> right or wrong, shape (λ, examples)


def measure(config: Path) -> Right:
    """Evaluate the controls of an edit at every coefficient."""
    from tva.cli.lightning import open_edit
    from tva.evaluation.evaluate import evaluate

    opened = open_edit(str(config))
    trainer, model = opened["trainer"], opened["model"]
    ((_, path),) = opened["vectors"].items()
    vector, base = -TaskVector.load(path), dict[str, Tensor]()
    found: dict[str, dict[str, np.ndarray]] = {}
    for task in CONTROLS:
        datamodule = opened["controls"][task]
        for split in ("val", "test"):
            before = evaluate(trainer, model, datamodule, split)
            base = base or {name: tensor.clone() for name, tensor in model.state_dict().items()}

            def setter(coef: float, base: Mapping[str, Tensor] = base) -> Callable[[], Any]:
                return lambda: model.load_state_dict(vector.apply_to(base, scaling_coef=coef))

            edits = [setter(coef) for coef in GRID]
            scores = evaluate(trainer, model, datamodule, split, edits=edits, share=before.shareable)
            model.load_state_dict(base)
            right = np.stack([evaluation.scores["accuracy"] for evaluation in scores])  # (λ, examples)
            assert (right[0] == before.scores["accuracy"]).all(), "λ = 0 must be the base"
            found.setdefault(task, {})[split] = right
            print(config.parent, task, split, right.mean(1).round(3), file=sys.stderr, flush=True)
    return found


def holds(right: Mapping[str, np.ndarray], chosen: int, confidence: float | None) -> bool:
    """Whether all controls keep enough at a coefficient, given their answers, each of shape (λ, examples)."""
    if confidence is None:
        return all(answers[chosen].mean() >= KEEP * answers[0].mean() for answers in right.values())
    return all(clears(answers[chosen], answers[0], KEEP, 0.0, confidence) for answers in right.values())


def simulate(right: Right, confidence: float | None, draws: int) -> dict[str, float]:
    """Choose and prove on random draws; give shares of the draws, and the mean coefficient chosen."""
    sizes = {task: answers["val"].shape[1] for task, answers in right.items()}
    everything = {task: np.concatenate([answers["val"], answers["test"]], 1) for task, answers in right.items()}
    too_far = [not holds(everything, chosen, None) for chosen in range(len(GRID))]
    random, counts, coefs = np.random.default_rng(0), np.zeros(3), []
    for _ in range(draws):
        parts: list[dict[str, np.ndarray]] = [{}, {}]
        for task, answers in everything.items():
            drawn = random.integers(answers.shape[1], size=answers.shape[1])  # independent, as a split would not be
            parts[0][task], parts[1][task] = answers[:, drawn[: sizes[task]]], answers[:, drawn[sizes[task] :]]
        chosen = next((at for at in reversed(range(1, len(GRID))) if holds(parts[0], at, confidence)), 0)
        passed = chosen > 0 and holds(parts[1], chosen, confidence)
        counts += [too_far[chosen], passed, passed and too_far[chosen]]
        coefs.append(GRID[chosen])
    chosen_too_far, passed, wrongly = counts / draws
    return {"chosen too far": chosen_too_far, "passed": passed, "passed too far": wrongly, "λ": float(np.mean(coefs))}


def main() -> None:
    """Evaluate what is not there yet, printing the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with images/*.parquet")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("runs/real"))
    options = parser.parse_args()
    benchmark = Benchmark(options.data.absolute(), options.output)
    header = ["edit", "constraints hold by", "mean λ", "λ chosen is too far", "gate passed", "passed and too far"]
    print("\n".join(list(rows(header, []))[:2]))
    for edit in reversed(FORGET):
        for seed in options.seeds:
            folder = benchmark.folder(edit, seed)
            kept = Path(f"{folder}.right.json")
            if not kept.exists():
                found = measure(folder / "run.yaml")
                text = json.dumps({t: {s: a.astype(int).tolist() for s, a in f.items()} for t, f in found.items()})
                temporary = kept.with_suffix(".part")
                temporary.write_text(text)
                os.replace(temporary, kept)
            read = json.loads(kept.read_text())
            right = {t: {s: np.array(answers, dtype=bool) for s, answers in f.items()} for t, f in read.items()}
            for confidence in (None, CONFIDENCE):
                shares = simulate(right, confidence, options.draws)
                how = "point estimate" if confidence is None else f"confidence {confidence}"
                *percent, coef = shares.values()
                start = [f"`-{edit.removeprefix('forget_')}`, seed {seed}", how]
                cells = [*start, f"{coef:.2f}", *(f"{share:.1%}" for share in percent)]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    main()
