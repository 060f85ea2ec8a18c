"""Coefficients for every tensor, layer or vector, trained by an ordinary Trainer: AdaMerging and aTLAS."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
import xxhash
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from tva.checkpoints import atomic_path
from tva.console import say_where
from tva.errors import some
from tva.evaluation.evaluate import quiet
from tva.evaluation.ranks import gather
from tva.search.base import Choice, Problem, Search
from tva.search.candidate import Candidate
from tva.search.learners import CoefficientLearner, ComponentLearner, TrainingContext

Per = Literal["tensor", "layer", "vector", "component"]
Loss = Literal["entropy", "cross_entropy", "expert"]

KEEP_EVERY = 50  # steps


class Learned(Search):
    r"""Train the coefficients :math:`\theta^l = \theta_0^l + \sum_t \lambda_t^l \tau_t^l` on validation data.

    Only the coefficients are trained; the model runs unchanged under `torch.func.functional_call`. Test data is never
    seen, and validation labels only by ``"cross_entropy"``. An interrupted training resumes at a multiple of 50 steps,
    and a finished one continues if ``num_steps`` is raised. The processes of a Trainer with several devices share every
    batch out and train the same coefficients.

    Args:
        loss: ``"entropy"`` of the predictions on the targets, which needs no label (AdaMerging; the model's ``forward``
            must give logits); ``"expert"``, the cross-entropy to the predictions of each target's own fine-tuned model,
            which needs none either; or ``"cross_entropy"`` (aTLAS): where batches are ``inputs, labels`` that of the
            logits, else the loss of the model's ``training_step``. If the objective makes the targets worse (a small
            accuracy, a large loss), their cross-entropy is increased, and that of the constraints' controls is kept
            small.
        per: One coefficient for each ``"tensor"``, ``"layer"`` (or other module), or ``"vector"``; or
            ``"component"``: each singular component of every matrix is kept or left out (AdaRank), and what is kept
            has the coefficient ``start``.
        start: Where all coefficients start.
        learning_rate: Adam's.
        num_steps: Optimizer steps, each with one batch of every task.
        batch_size: Examples of each task in a step.
        clamp: Keep coefficients in [0, 1]; by default with ``"entropy"``, as in its paper.
        seed: Seed of the order of the examples.

    Source: Yang et al., "AdaMerging: adaptive model merging for multi-task learning", ICLR 2024; Zhang et al.,
    "Knowledge composition using task vectors with learned anisotropic scaling" (aTLAS), NeurIPS 2024; the labels of
    ``"expert"`` are those of SyMerge, ICML 2026. Lee et al., "AdaRank: adaptive rank pruning for enhanced model
    merging", ICLR 2026, for ``"component"``.
    """

    def __init__(
        self,
        loss: Loss = "entropy",
        per: Per = "tensor",
        start: float = 0.3,
        learning_rate: float = 1e-3,
        num_steps: int = 500,
        batch_size: int = 16,
        clamp: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.loss, self.per, self.start, self.learning_rate = loss, per, start, learning_rate
        self.num_steps, self.batch_size, self.seed = num_steps, batch_size, seed
        self.clamp = loss == "entropy" if clamp is None else clamp

    def run(self, problem: Problem) -> Choice:
        """Train the coefficients, then see on validation data whether the constraints hold."""
        context: TrainingContext = problem.training_context()
        forget = problem.objective is not None and problem.objective.worsens(problem.base)
        if problem.rule != "best" or (forget and self.loss != "cross_entropy"):
            raise ValueError(
                f"Learned coefficients serve an objective that makes the targets better (rule='best'), and with "
                f"loss='cross_entropy' also one that makes them worse; with loss={self.loss!r} it does not forget."
            )
        if self.loss == "expert" and (missing := sorted(set(context.targets) - set(context.experts))):
            raise ValueError(
                f"loss='expert' imitates the fine-tuned model of each target, so each must have a vector of its name; "
                f"there is none for {some(missing)}. Name the vectors as the targets, or use loss='entropy'."
            )
        kept = [c.task for c in problem.constraints if c.task in context.controls]
        tasks = {**context.targets} | ({name: context.controls[name] for name in kept} if forget else {})
        signs = {task: -1.0 if forget and task in context.targets else 1.0 for task in tasks}
        learner = (ComponentLearner if self.per == "component" else CoefficientLearner)(context, self, signs)
        kept = _Kept(context, {**vars(self), "num_steps": None, "signs": signs}, learner)
        done = kept.restore(self.num_steps)
        loaders = {task: self._loader(tasks[task], context.trainer, done) for task in tasks}
        # the mean over processes of each one's weighted mean is the mean over the batch
        learner.weights = {task: loader.batch_sampler.weight for task, loader in loaders.items()}
        on_cpu = context.trainer.strategy.root_device.type == "cpu"
        trainer = L.Trainer(
            accelerator="cpu" if on_cpu else "auto",
            devices=context.trainer.num_devices if on_cpu else context.trainer.device_ids,
            num_nodes=context.trainer.num_nodes,
            strategy="ddp" if context.trainer.world_size > 1 else "auto",
            use_distributed_sampler=False,
            precision=context.trainer.precision,
            max_steps=self.num_steps - done,
            max_epochs=1,
            callbacks=[kept],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        if done < self.num_steps:
            with evaluating(context.model), quiet():
                trainer.fit(learner, CombinedLoader(loaders, "min_size"))
        context.model.cpu()
        vector = learner.vector()
        candidate = Candidate.of(scaling_coef=1.0)
        problem.record(candidate, context.evaluate(vector), problem.base)
        choice = problem.choose([candidate])
        what = "components kept or left out" if self.per == "component" else f"one coefficient a {self.per}"
        reason = f"{self.num_steps} steps of {self.loss} on validation data, {what}"
        losses = kept.losses()
        details = {"coefficients": learner.table(), "loss": losses[:: max(1, len(losses) // 50)], "steps_kept": done}
        return Choice(candidate, choice.feasible, reason if choice.feasible else choice.reason, vector, details)

    def _loader(self, datamodule: L.LightningDataModule, trainer: L.Trainer, done: int = 0) -> DataLoader:
        loader = datamodule.val_dataloader()
        if not isinstance(loader, DataLoader):
            raise ValueError(
                f"Learning coefficients needs one DataLoader; {type(datamodule).__name__}.val_dataloader gives a "
                f"{type(loader).__name__}."
            )
        size = min(self.batch_size, len(loader.dataset))
        if size < trainer.world_size:
            raise ValueError(
                f"Each of {trainer.world_size} processes must have an example of every task in a step, but a step has "
                f"{size}. Use a larger batch_size, or fewer devices."
            )
        sampler = RandomSampler(loader.dataset, generator=torch.Generator().manual_seed(self.seed))
        share = _Share(
            BatchSampler(sampler, size, drop_last=True),
            range(done, self.num_steps),
            trainer.global_rank,
            trainer.world_size,
        )
        return DataLoader(loader.dataset, batch_sampler=share, collate_fn=loader.collate_fn)


class _Share:
    """One process's examples of every step's batch, each batch the same for any number of processes.

    Args:
        batches: Those of one epoch; each epoch has its own.
        steps: Which steps to take, counted through all epochs.
        rank: Of this process.
        num_ranks: How many there are.
    """

    def __init__(self, batches: BatchSampler, steps: range, rank: int, num_ranks: int) -> None:
        self.batches, self.steps, self.rank, self.num_ranks = batches, steps, rank, num_ranks
        self.weight = len(range(rank, batches.batch_size, num_ranks)) * num_ranks / batches.batch_size

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        endless = itertools.chain.from_iterable(itertools.repeat(self.batches))
        for rows in itertools.islice(endless, self.steps.start, self.steps.stop):
            yield rows[self.rank :: self.num_ranks]


class _Kept(L.Callback):
    """A training's state in a file, from which the next run with the same inputs and options goes on.

    Args:
        context: Where the file is, and what the training depends on.
        options: What else it depends on, as JSON values.
        learner: What is trained.
    """

    def __init__(self, context: TrainingContext, options: Mapping[str, Any], learner: CoefficientLearner) -> None:
        self.context, self.learner = context, learner
        described = json.dumps([context.inputs, options], sort_keys=True, default=repr)
        self.key = xxhash.xxh3_128_hexdigest(described.encode())

    def restore(self, num_steps: int) -> int:
        """Restore a state of at most this many steps; return how many are done."""
        trainer, found = self.context.trainer, None
        if trainer.is_global_zero and self.context.kept is not None and self.context.kept.exists():
            found = torch.load(self.context.kept, weights_only=True)
        found = trainer.strategy.broadcast(found)
        if found is None or found["key"] != self.key or len(found["losses"]) > num_steps:
            return 0
        with torch.no_grad():
            self.learner.coefs.copy_(found["coefs"])
        self.learner.optimizer_state = found["optimizer"]
        self.learner.losses = found["losses"]
        return len(found["losses"])

    def losses(self) -> list[float]:
        """Return each step's loss, the mean of all processes; all must call this."""
        return np.mean(gather(self.context.trainer, self.learner.losses), axis=0).tolist()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.is_global_zero:
            say_where(lambda: f"learning coefficients: step {len(self.learner.losses):,} of {trainer.max_steps:,}")
        if len(self.learner.losses) % KEEP_EVERY and trainer.global_step < trainer.max_steps:
            return
        losses = self.losses()
        if not trainer.is_global_zero or self.context.kept is None:
            return
        self.context.kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.context.kept) as temporary:
            coefs, optimizer = self.learner.coefs.detach().cpu(), trainer.optimizers[0].state_dict()
            torch.save({"key": self.key, "coefs": coefs, "optimizer": optimizer, "losses": losses}, temporary)


@contextlib.contextmanager
def evaluating(model: L.LightningModule) -> Iterator[None]:
    """Put a model into evaluation mode, and silence what its steps log."""
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    model.log = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del model.log
        for name, module in model.named_modules():
            module.training = modes.get(name, module.training)
