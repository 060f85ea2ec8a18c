"""Search by Optuna, with a storage that several processes or machines share; the one door to optuna."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any, Literal

from tva.search.problem import Candidate, Choice, Problem, Search

Sampler = Literal["tpe", "cmaes", "random"]


class Optuna(Search):
    """Search several coefficients with Optuna's samplers; needs ``pip install tva[optuna]``.

    Processes that are given the same storage and study work on one search: each adds its trials, sees those of the
    others, and stops when all together have finished ``num_trials``; a search that was cut off goes on.

    Args:
        ranges: By coefficient the smallest and the largest value.
        shared: Give all of them the same value.
        num_trials: Trials of all processes together.
        sampler: ``"tpe"``, which takes constraints into account; ``"cmaes"``, for five coefficients or more (needs
            the package cmaes); or ``"random"``.
        storage: A file that processes share (on a network disk: nodes), or a database URL that Optuna knows; by
            default this process's memory.
        study: Name of the search in the storage.
        seed: Of the sampler; processes of one search need different ones.

    Source: Akiba et al., "Optuna: a next-generation hyperparameter optimization framework", KDD 2019.
    """

    def __init__(
        self,
        ranges: dict[str, list[float]] | None = None,
        shared: bool = False,
        num_trials: int = 40,
        sampler: Sampler = "tpe",
        storage: str | None = None,
        study: str = "tva",
        seed: int = 0,
    ) -> None:
        super().__init__(ranges, shared)
        if num_trials < 1:
            raise ValueError(f"num_trials must be 1 or more; found {num_trials}.")
        self.num_trials, self.sampler = num_trials, sampler
        self.storage, self.study, self.seed = storage, study, seed

    def run(self, problem: Problem) -> Choice:
        """Make trials until there are enough, then choose among those of all processes."""
        try:
            import optuna
        except ImportError as error:
            raise ValueError("This search needs optuna: pip install tva[optuna].") from error

        if problem.rule != "best":
            raise ValueError("Optuna searches the best objective: set rule='best', or use Grid, Bisect or Race.")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            storage=self._open_storage(),
            sampler=self._make_sampler(),
            study_name=self.study,
            direction="minimize",
            load_if_exists=True,
        )
        finished = [optuna.trial.TrialState.COMPLETE]
        names = list(self.ranges)[:1] if self.shared else list(self.ranges)
        while len(study.get_trials(deepcopy=False, states=finished)) < self.num_trials:
            trial = study.ask()
            values = {name: trial.suggest_float(name, *self.ranges[name]) for name in names}
            if self.shared:
                values = dict.fromkeys(self.ranges, values[names[0]])
            candidate = Candidate.of(**values)
            problem.score([candidate])
            scores, base = problem.tried[candidate], {task: e.metrics for task, e in problem.base.items()}
            slack = {c.text: problem.slack.get((candidate, c.text), 0.0) for c in problem.constraints}
            trial.set_user_attr("coefs", values)
            trial.set_user_attr("scores", {task: dict(metrics) for task, metrics in scores.items()})
            trial.set_user_attr("slack", slack)
            short = {c.text: min(c.shortfall(scores, base, slack[c.text]), 1e9) for c in problem.constraints}
            if self.sampler == "tpe":
                for text, shortfall in short.items():
                    trial.set_constraint(text, shortfall)
            assert problem.objective is not None
            value = problem.objective.value(scores)
            loss = -value if problem.objective.maximize else value
            # a sampler that knows no constraints must see them in the value
            penalty = 0.0 if self.sampler == "tpe" or not any(short.values()) else 1e3 + 1e3 * sum(short.values())
            study.tell(trial, loss + penalty if math.isfinite(loss) else 1e12)
        complete = study.get_trials(deepcopy=False, states=finished)
        for trial in complete:
            candidate = Candidate.of(**trial.user_attrs["coefs"])
            problem.tried[candidate] = trial.user_attrs["scores"]
            problem.slack |= {(candidate, text): value for text, value in trial.user_attrs["slack"].items()}
        choice = problem.choose()
        return Choice(
            choice.candidate, choice.feasible, choice.reason, details={"trials": len(complete), "seed": self.seed}
        )

    def _open_storage(self) -> Any:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        if self.storage is None or "://" in self.storage:
            return self.storage
        Path(self.storage).parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(self.storage))

    def _make_sampler(self) -> Any:
        import optuna

        if self.sampler == "random":
            return optuna.samplers.RandomSampler(seed=self.seed)
        if self.sampler == "cmaes":
            return optuna.samplers.CmaEsSampler(seed=self.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(seed=self.seed, constant_liar=True)
