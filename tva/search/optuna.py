"""Search by Optuna, with a storage that several processes or machines share, the only importer of optuna."""

from __future__ import annotations

import functools
import math
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from tva.search.base import Choice, Problem, Search
from tva.search.candidate import Candidate

Sampler = Literal["tpe", "cmaes", "random"]


class Optuna(Search):
    """Search several coefficients with Optuna's samplers; needs ``pip install 'tva[optuna]'``.

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
        if find_spec("optuna") is None:  # before anything is evaluated
            raise ValueError("This search needs optuna: pip install 'tva[optuna]'.")
        super().__init__(ranges, shared)
        if num_trials < 1:
            raise ValueError(f"num_trials must be 1 or more; found {num_trials}.")
        self.num_trials, self.sampler = num_trials, sampler
        self.storage, self.study, self.seed = storage, study, seed

    def run(self, problem: Problem) -> Choice:
        """Make trials until there are enough, then choose among those of all processes."""
        import optuna

        if problem.rule != "best":
            raise ValueError("Optuna searches the best objective: set rule='best', or use Grid, Bisect or Race.")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        problem.shared_among(self.num_trials)
        trials = _Trials(self, problem)
        while (values := problem.once(trials.ask)) is not None:
            candidate = Candidate.of(**values)
            problem.score([candidate])
            problem.once(functools.partial(trials.tell, candidate))
        finished = problem.once(trials.finished)
        for attributes in finished:
            candidate = Candidate.of(**attributes["coefs"])
            problem.tried[candidate] = attributes["scores"]
            problem.slack |= {(candidate, text): value for text, value in attributes["slack"].items()}
            if attributes.get("confidence", problem.test_confidence) != problem.test_confidence:
                problem.score([candidate])  # of a search that was to be shorter, whose tests were less strict
        choice = problem.choose()
        return Choice(
            choice.candidate, choice.feasible, choice.reason, details={"trials": len(finished), "seed": self.seed}
        )


class _Trials:
    """The study of one search; of several processes that evaluate together only the first opens it."""

    def __init__(self, search: Optuna, problem: Problem) -> None:
        self.search, self.problem = search, problem
        self.trial: Any = None

    @functools.cached_property
    def study(self) -> Any:
        import optuna

        return optuna.create_study(
            storage=self._open_storage(),
            sampler=self._make_sampler(),
            study_name=self.search.study,
            direction="minimize",
            load_if_exists=True,
        )

    def ask(self) -> dict[str, float] | None:
        """Return the coefficients of the next trial; None when there are enough."""
        search = self.search
        if len(self.finished()) >= search.num_trials:
            return None
        self.trial = self.study.ask()
        names = list(search.ranges)[:1] if search.shared else list(search.ranges)
        values = {name: self.trial.suggest_float(name, *search.ranges[name]) for name in names}
        return dict.fromkeys(search.ranges, values[names[0]]) if search.shared else values

    def tell(self, candidate: Candidate) -> None:
        """Put what the candidate scored into the study."""
        problem, tpe = self.problem, self.search.sampler == "tpe"
        scores, base = problem.tried[candidate], {task: e.metrics for task, e in problem.base.items()}
        slack = {c.text: problem.slack.get((candidate, c.text), 0.0) for c in problem.constraints}
        self.trial.set_user_attr("coefs", dict(candidate.coefs))
        self.trial.set_user_attr("scores", {task: dict(metrics) for task, metrics in scores.items()})
        self.trial.set_user_attr("slack", slack)
        self.trial.set_user_attr("confidence", problem.test_confidence)
        short = {c.text: min(c.shortfall(scores, base, slack[c.text]), 1e9) for c in problem.constraints}
        if tpe:
            for text, shortfall in short.items():
                self.trial.set_constraint(text, shortfall)
        assert problem.objective is not None
        value = problem.objective.value(scores)
        loss = -value if problem.objective.maximize else value
        # a sampler that knows no constraints must see them in the value
        penalty = 0.0 if tpe or not any(short.values()) else 1e3 + 1e3 * sum(short.values())
        self.study.tell(self.trial, loss + penalty if math.isfinite(loss) else 1e12)

    def finished(self) -> list[dict[str, Any]]:
        """Return the coefficients, scores and slacks of the trials that all processes have finished."""
        import optuna

        states = [optuna.trial.TrialState.COMPLETE]
        return [trial.user_attrs for trial in self.study.get_trials(deepcopy=False, states=states)]

    def _open_storage(self) -> Any:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        storage = self.search.storage
        if storage is None or "://" in storage:
            return storage
        Path(storage).parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(storage))

    def _make_sampler(self) -> Any:
        import optuna

        seed = self.search.seed
        if self.search.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if self.search.sampler == "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
