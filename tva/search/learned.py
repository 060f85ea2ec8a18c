"""Coefficients for every tensor, layer or vector, trained by an ordinary Trainer: AdaMerging and aTLAS."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
import xxhash
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from tva.checkpoints import atomic_path, canonical_state_dict
from tva.console import say_where
from tva.errors import some
from tva.evaluation.evaluate import quiet
from tva.evaluation.ranks import gather
from tva.evaluation.result import Evaluation
from tva.layers import block_of
from tva.search.base import Choice, Problem, Search
from tva.search.candidate import Candidate
from tva.vectors.task_vector import TaskVector

Per = Literal["tensor", "layer", "vector"]
Loss = Literal["entropy", "cross_entropy", "expert"]

KEEP_EVERY = 50  # steps
IGNORED = -100  # a target that torch's cross-entropy leaves out by default


@dataclass(frozen=True)
class TrainingContext:
    """Inputs for training coefficients.

    Attributes:
        trainer: The Trainer that evaluates; its device and precision are used.
        model: The model; it is left as it was.
        base: The base's state dict.
        vectors: Task vectors by name, each times its number in the recipe where the recipe is a sum; else only the
            recipe's value.
        targets: Data modules of the tasks to change, set up.
        controls: Data modules of the control tasks, set up where they decide.
        experts: By target the task vector of the model that was fine-tuned on it, where one has the target's name.
        buffers: By task the buffers that the model makes for it and does not save, such as its head.
        evaluate: Evaluates the base moved along a vector, on validation data.
        inputs: All that training depends on besides its options, as JSON values.
        kept: File for the state of a training that is cut off; None keeps none.
    """

    trainer: L.Trainer
    model: L.LightningModule
    base: Mapping[str, Tensor]
    vectors: Mapping[str, TaskVector]
    targets: Mapping[str, L.LightningDataModule]
    controls: Mapping[str, L.LightningDataModule]
    experts: Mapping[str, TaskVector]
    buffers: Mapping[str, Mapping[str, Tensor]]
    evaluate: Callable[[TaskVector], dict[str, Evaluation]]
    inputs: Mapping[str, Any]
    kept: Path | None


class Learned(Search):
    r"""Train the coefficients :math:`\theta^l = \theta_0^l + \sum_t \lambda_t^l \tau_t^l` on validation data.

    Only the coefficients are trained; the model runs unchanged under `torch.func.functional_call`. Test data is never
    seen, and validation labels only by ``"cross_entropy"``. A training that was cut off goes on at a multiple of 50
    steps, and a finished one when ``num_steps`` is raised. The processes of a Trainer with several devices share every
    batch out and train the same coefficients.

    Args:
        loss: ``"entropy"`` of the predictions on the targets, which needs no label (AdaMerging; the model's ``forward``
            must give logits); ``"expert"``, the cross-entropy to the predictions of each target's own fine-tuned
            model, which needs none either; or ``"cross_entropy"`` (aTLAS): where batches are ``inputs, labels`` that
            of the logits, else the loss of the model's ``training_step``. With an objective that makes the targets
            worse (a small accuracy, a large loss) their cross-entropy is made large, and that of the constraints'
            controls is kept small.
        per: One coefficient for each ``"tensor"``, ``"layer"`` (or other module), or ``"vector"``; or
            ``"component"``: each singular component of every matrix is kept or left out (AdaRank), and what is kept
            has the coefficient ``start``.
        start: Where all coefficients start.
        learning_rate: Adam's.
        num_steps: Optimizer steps, each with one batch of every task.
        batch_size: Examples of each task in a step.
        clamp: Keep coefficients in [0, 1]; by default with ``"entropy"``, as in its paper.
        seed: Of the order of the examples.

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
        reason = f"{self.num_steps} steps of {self.loss} on validation data, one coefficient a {self.per}"
        losses = kept.losses()
        details = {
            "coefficients": learner.table(),
            "loss": losses[:: max(1, len(losses) // 50)],
            "steps_kept": done,
        }
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


class CoefficientLearner(L.LightningModule):
    """A module whose only parameters are coefficients of task vectors.

    Args:
        context: The model, the base and the vectors.
        options: Loss, granularity and optimizer.
        signs: By task whether its loss is made small (1) or large (-1).
    """

    def __init__(self, context: TrainingContext, options: Learned, signs: Mapping[str, float]) -> None:
        super().__init__()
        self._context = (context,)  # in a tuple, which hides the model from this module's own parameters
        self.options = options
        self.signs = dict(signs)
        moved = list(dict.fromkeys(name for vector in context.vectors.values() for name in vector.deltas))
        place = {"tensor": lambda name: name, "layer": block_of, "vector": lambda name: "all", "component": lambda name: name}[options.per]
        self.groups = list(dict.fromkeys(map(place, moved)))
        self.group_of = {name: self.groups.index(place(name)) for name in moved}
        self.coefs = nn.Parameter(
            torch.full((len(context.vectors), len(self.groups)), options.start)
        )  # (vectors, groups)
        self.losses: list[float] = []
        self.weights = dict.fromkeys(signs, 1.0)  # of this process's examples in the mean
        self.optimizer_state: dict[str, Any] | None = None
        experts = context.experts if options.loss == "expert" else {}
        self._experts = {task: vector.apply_to(context.base, buffers="delta") for task, vector in experts.items()}
        self._deltas: list[dict[str, Tensor]] = [dict(vector.deltas) for vector in context.vectors.values()]
        self._base = dict(context.base)
        state = context.model.state_dict()
        self._names = dict(zip(canonical_state_dict(state), state, strict=True))  # as recorded -> as in the module
        self._task_buffers = {task: dict(buffers) for task, buffers in context.buffers.items()}

    def on_fit_start(self) -> None:
        self._context[0].model.to(self.device)
        for tensors in (self._base, *self._deltas, *self._task_buffers.values(), *self._experts.values()):
            tensors.update({name: tensor.to(self.device) for name, tensor in tensors.items()})

    def edited(self) -> dict[str, Tensor]:
        """Return the tensors that the vectors move, as functions of the coefficients."""
        coefs = self.coefs.clamp(0, 1) if self.options.clamp else self.coefs
        found: dict[str, Tensor] = {}
        for row, deltas in zip(coefs, self._deltas, strict=True):
            for name, delta in deltas.items():
                moved = found.get(name, self._base[name]) + row[self.group_of[name]] * delta
                found[name] = moved.to(self._base[name].dtype)
        return found

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        model = self._context[0].model
        weights = {self._names[name]: tensor for name, tensor in self.edited().items()}
        total = torch.zeros((), device=self.device)
        for task, part in batch.items():
            tensors = {**weights, **self._task_buffers.get(task, {})}
            if self.options.loss == "entropy":
                logits, shares = _predicted(model, tensors, part)
                loss = _mean(torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1), shares)
            elif self.options.loss == "expert":
                logits, shares = _predicted(model, tensors, part)
                labels = self._expert_labels(model, task, part)
                loss = _mean(F.cross_entropy(logits, labels, reduction="none"), shares)
            else:
                loss = _cross_entropy(model, tensors, part, batch_idx)
            total = total + self.signs[task] * self.weights[task] * loss
        self.losses.append(float(total.detach()))
        return total

    @torch.no_grad()
    def _expert_labels(self, model: nn.Module, task: str, batch: Any) -> Tensor:
        expert = {self._names[name]: tensor for name, tensor in self._experts[task].items()}
        return _predicted(model, {**expert, **self._task_buffers.get(task, {})}, batch)[0].softmax(dim=-1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.options.learning_rate)
        if self.optimizer_state is not None:
            optimizer.load_state_dict(self.optimizer_state)
        return optimizer

    @torch.no_grad()
    def _values(self) -> Tensor:
        return (self.coefs.clamp(0, 1) if self.options.clamp else self.coefs).detach().cpu()

    def table(self) -> dict[str, dict[str, float]]:
        """Return the coefficients by vector and by tensor, layer or all."""
        rows = zip(self._context[0].vectors, self._values().tolist(), strict=True)
        return {name: dict(zip(self.groups, row, strict=True)) for name, row in rows}

    def vector(self) -> TaskVector:
        """Return the sum of the vectors, each tensor times its coefficient; running statistics do not move."""
        scaled = []
        for vector, row in zip(self._context[0].vectors.values(), self._values().tolist(), strict=True):
            deltas = {name: delta * row[self.group_of[name]] for name, delta in vector.deltas.items()}
            untouched = {**dict.fromkeys(vector.buffers, "excluded"), **vector.untouched}
            scaled.append(TaskVector(deltas, {}, untouched, vector.origin))
        return functools.reduce(lambda left, right: left + right, scaled)


def _logits(model: nn.Module, tensors: Mapping[str, Tensor], batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        inputs = {key: value for key, value in batch.items() if key not in ("label", "labels", "target")}
        outputs = functional_call(model, dict(tensors), (), inputs)
    else:
        outputs = functional_call(model, dict(tensors), (batch[0],))
    return getattr(outputs, "logits", outputs)


def _predicted(model: nn.Module, tensors: Mapping[str, Tensor], batch: Any) -> tuple[Tensor, Tensor | None]:
    """Return logits (predictions, classes) and the weight of each; None where each example has one prediction.

    A model with a method ``predictions``, which returns logits (batch, length, classes) and targets (batch, length),
    as `tva.models.LanguageModel`, predicts every target token; an example's tokens share its weight.
    """
    if not hasattr(model, "predictions"):
        return _logits(model, tensors, batch), None
    renamed = {f"model.{name}": tensor for name, tensor in tensors.items()}
    logits, targets = functional_call(_Call(model, "predictions"), renamed, (batch,))
    counted = targets != IGNORED
    return logits[counted], (counted / counted.sum(dim=1, keepdim=True) / len(counted))[counted]


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    return values.mean() if weights is None else (values * weights).sum()


def _cross_entropy(model: L.LightningModule, tensors: Mapping[str, Tensor], batch: Any, batch_idx: int) -> Tensor:
    if isinstance(batch, Sequence) and len(batch) == 2 and batch[1].dtype == torch.int64:
        return F.cross_entropy(_logits(model, tensors, batch), batch[1])
    renamed = {f"model.{name}": tensor for name, tensor in tensors.items()}
    outputs = functional_call(_Call(model, "training_step"), renamed, (batch, batch_idx))
    return outputs["loss"] if isinstance(outputs, Mapping) else outputs


class _Call(nn.Module):
    """A method of a model as the forward that `functional_call` calls."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, *arguments: Any) -> Any:
        return getattr(self.model, self.method)(*arguments)


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
