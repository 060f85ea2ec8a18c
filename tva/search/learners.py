"""What `tva.search.Learned` trains: coefficients of task vectors, or masks of their singular components."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tva.checkpoints import canonical_state_dict
from tva.evaluation.result import Evaluation
from tva.layers import block_of
from tva.vectors.task_vector import TaskVector

FIRST_SCORE = 0.1  # of every component, so that Adam's first steps can leave one out
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


class CoefficientLearner(L.LightningModule):
    """A module whose only parameters are coefficients of task vectors.

    Args:
        context: The model, the base and the vectors.
        options: Loss, granularity and optimizer.
        signs: By task whether its loss is minimized (1) or maximized (-1).
    """

    def __init__(self, context: TrainingContext, options: Any, signs: Mapping[str, float]) -> None:
        super().__init__()
        self._context = (context,)  # in a tuple, which hides the model from this module's own parameters
        self.options = options
        self.signs = dict(signs)
        moved = list(dict.fromkeys(name for vector in context.vectors.values() for name in vector.deltas))
        place = {
            "tensor": lambda name: name,
            "layer": block_of,
            "vector": lambda name: "all",
            "component": lambda name: name,
        }[options.per]
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


class ComponentLearner(CoefficientLearner):
    r"""A module whose only parameters are scores of singular components: one that is positive is kept.

    The delta of a matrix (or of a convolution, by outputs) is :math:`\lambda \sum_r m_r \sigma_r u_r v_r^\top` with the
    masks :math:`m_r = [s_r > 0]`, whose gradient is taken to be the sigmoid's (straight-through). All are kept at the
    start. Other tensors move whole. :math:`\lambda` is the option ``start``.

    Source: Lee et al., "AdaRank: adaptive rank pruning for enhanced model merging", ICLR 2026.
    """

    def __init__(self, context: TrainingContext, options: Any, signs: Mapping[str, float]) -> None:
        super().__init__(context, options, signs)
        self._parts: list[dict[str, Tensor]] = []  # by vector and tensor's name, then U, S or V
        self._spans: list[dict[str, tuple[int, int]]] = []
        total = 0
        for deltas in self._deltas:
            parts, spans = {}, {}
            for name, delta in deltas.items():
                if delta.ndim > 1 and delta.numel():
                    matrix = delta.flatten(1).to(torch.promote_types(delta.dtype, torch.float32))
                    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
                    parts |= {f"{name}/U": u, f"{name}/S": values, f"{name}/V": v}
                    spans[name] = total, total + len(values)
                    total += len(values)
            self._parts.append(parts)
            self._spans.append(spans)
        self.coefs = nn.Parameter(torch.full((total,), FIRST_SCORE))

    def on_fit_start(self) -> None:
        super().on_fit_start()
        for parts in self._parts:
            parts.update({name: tensor.to(self.device) for name, tensor in parts.items()})

    def masks(self) -> Tensor:
        """Return 1 for each component that is kept, else 0, with the sigmoid's gradient."""
        soft = self.coefs.sigmoid()
        return (self.coefs > 0).to(soft.dtype) + (soft - soft.detach())  # 1 + soft - soft would not be 1

    def edited(self) -> dict[str, Tensor]:
        """Return the tensors that the vectors move, as functions of the scores."""
        found: dict[str, Tensor] = {}
        masks = self.masks()
        for place, deltas in enumerate(self._deltas):
            for name in deltas:
                moved = found.get(name, self._base[name]) + self.options.start * self._kept(place, name, masks)
                found[name] = moved.to(self._base[name].dtype)
        return found

    def _kept(self, place: int, name: str, masks: Tensor) -> Tensor:
        delta, parts = self._deltas[place][name], self._parts[place]
        if name not in self._spans[place]:
            return delta
        mask = masks[slice(*self._spans[place][name])]
        return ((parts[f"{name}/U"] * (parts[f"{name}/S"] * mask)) @ parts[f"{name}/V"]).reshape(delta.shape)

    @torch.no_grad()
    def table(self) -> dict[str, dict[str, float]]:
        """Return by vector and matrix how many components are kept."""
        counts = (self.coefs > 0).cpu()
        return {
            vector: {name: int(counts[slice(*span)].sum()) for name, span in spans.items()}
            for vector, spans in zip(self._context[0].vectors, self._spans, strict=True)
        }

    @torch.no_grad()
    def vector(self) -> TaskVector:
        """Return the sum of what is kept, times the coefficient; running statistics do not move."""
        scaled = []
        masks = self.masks()
        for place, vector in enumerate(self._context[0].vectors.values()):
            deltas = {
                name: (self.options.start * self._kept(place, name, masks)).cpu().to(delta.dtype)
                for name, delta in vector.deltas.items()
            }
            untouched = {**dict.fromkeys(vector.buffers, "excluded"), **vector.untouched}
            scaled.append(TaskVector(deltas, {}, untouched, vector.origin))
        return functools.reduce(lambda left, right: left + right, scaled)


def _logits(model: nn.Module, tensors: Mapping[str, Tensor], batch: Any) -> Tensor:
    if hasattr(model, "wrapped"):  # `tva.models.network.Network`, whose state dict has the names of the network in it
        renamed = {f"network.{name}": tensor for name, tensor in tensors.items()}
        return functional_call(model, renamed, (batch,))[0]
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
    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, *arguments: Any) -> Any:
        return getattr(self.model, self.method)(*arguments)
