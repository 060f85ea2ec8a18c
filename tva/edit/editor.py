"""One model in memory whose weights are set to many states."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from tva.arithmetic import BATCH_NORM_STATISTICS
from tva.checkpoints import Fingerprint, canonical_state_dict, fingerprint
from tva.search import SCALING, Candidate
from tva.vectors.task_vector import TaskVector

Statistics = Literal["keep", "delta", "reestimate"]
_ESTIMATED = (*BATCH_NORM_STATISTICS, "num_batches_tracked")
MAX_VECTORS = 4  # task vectors that are held at once for one pass


@dataclass(frozen=True)
class EditState:
    """Weights the model can be set to: the base moved along a vector.

    Attributes:
        label: What it is called in the report: ``edited``, ``random``, ``fine-tuned on TASK`` …
        recipe: What the vector is, in words that with the vectors' fingerprints determine it.
        coefs: Values of all coefficients, that of the whole recipe among them as ``scaling_coef``.
        vector: Makes the vector.
        statistics: How BatchNorm statistics are handled.
        remake: Make the vector again for each batch, so that any number of states share a pass though few vectors are
            held; for vectors that are made faster than a pass takes.
        candidate: The candidate whose state it is, by which another process makes the same one.
    """

    label: str
    recipe: str
    coefs: tuple[tuple[str, Any], ...]
    vector: Callable[[], TaskVector]
    statistics: Statistics
    remake: bool = False
    candidate: Candidate | None = None

    @property
    def scaling_coef(self) -> float:
        """Coefficient of the vector."""
        return dict(self.coefs)["scaling_coef"]

    def at_zero(self, statistics: Statistics) -> EditState:
        """Return the state at coefficient 0 of the same vector, which must score as the base does."""
        coefs = tuple({**dict(self.coefs), "scaling_coef": 0.0}.items())
        candidate = self.candidate
        if candidate is not None:
            candidate = Candidate(tuple({**dict(candidate.coefs), SCALING: 0.0}.items()))
        return replace(self, coefs=coefs, statistics=statistics, remake=False, candidate=candidate)

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from other states in memory."""
        return self.label, self.recipe, repr(self.coefs), self.statistics


class Editor:
    """A model in memory whose weights are set to ``base + λ · vector``, always from the base.

    Args:
        trainer: Trainer that evaluates.
        model: Any LightningModule; its present weights are the base.
        datamodules: The tasks by name.
        statistics: How BatchNorm statistics are handled; see `tva.edit.options.EditOptions`.
        reestimate_with: Data modules whose training images statistics are estimated from.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        model: L.LightningModule,
        datamodules: Mapping[str, L.LightningDataModule],
        statistics: Statistics = "keep",
        reestimate_with: Iterable[L.LightningDataModule] = (),
    ) -> None:
        self.trainer = trainer
        self.model = model
        self.datamodules = datamodules
        self.statistics = statistics
        self.reestimate_with = list(reestimate_with)
        self._found: tuple[Any, dict[str, Tensor]] | None = None
        self.base: dict[str, Tensor] = {name: tensor.detach().clone() for name, tensor in self._live().items()}
        self._base_on: dict[torch.device, dict[str, Tensor]] = {}
        self._vectors_on: dict[int, tuple[TaskVector, TaskVector]] = {}  # with the original, so that its id stays its
        self._estimated: dict[tuple[int, float], tuple[TaskVector, dict[str, Tensor]]] = {}

    @torch.no_grad()
    def set(self, vector: TaskVector | None, scaling_coef: float, statistics: Statistics | None = None) -> None:
        """Set the model in place to ``base + scaling_coef * vector``; without a vector, to the base."""
        statistics = statistics or self.statistics
        live = self._live()
        device = next(iter(live.values())).device if live else torch.device("cpu")
        base = self._resident(device)
        moved = None if vector is None else self._resident_vector(vector, device)
        written = moved.deltas.keys() if moved is not None else set()
        for name, tensor in live.items():
            if name not in written:
                tensor.copy_(base[name])
        if vector is None or moved is None:
            return
        moved.write_into(live, base, scaling_coef, buffers="delta" if statistics == "delta" else "keep")
        if statistics == "reestimate" and scaling_coef != 0:
            self._set_estimated(vector, scaling_coef, live)

    # --- what differs where each process holds a part of every weight

    def state(self) -> Mapping[str, Tensor]:
        """Return the model's weights as they are now."""
        return canonical_state_dict(self.model.state_dict())

    def base_state(self) -> Mapping[str, Tensor]:
        """Return the base's weights."""
        return self.base

    def unsaved_buffers(self) -> dict[str, Tensor]:
        """Return copies of the buffers that are not in the model's state dict."""
        saved = self.model.state_dict().keys()
        return {name: buffer.detach().clone() for name, buffer in self.model.named_buffers() if name not in saved}

    def fingerprint(self, tensors: Mapping[str, Tensor]) -> Fingerprint:
        """Return the fingerprint of the base, or of a vector's deltas."""
        return fingerprint(tensors)

    def norm(self, vector: TaskVector) -> float:
        """Return the Euclidean norm of a vector."""
        return vector.norm()

    def moves(self, vector: TaskVector) -> bool:
        """Whether a vector has a delta that is not 0."""
        return any(bool(delta.any()) for delta in vector.deltas.values())

    def random_like(self, vector: TaskVector, seed: int) -> TaskVector:
        """Return a random vector with the norms of another one."""
        return vector.random_like(seed)

    def check_effect(self, vector: TaskVector, scaling_coef: float) -> None:
        """Check that the edit the model is set to changed something."""
        vector.check_effect(self.state(), self.base, scaling_coef)

    def check_base(self, vector: TaskVector, allow_other_base: bool) -> None:
        """Check that a vector may be applied to the base."""
        vector.check_base(self.base, allow_other_base=allow_other_base)

    def on_rank_zero(self, order: Callable[[], list[str]], work: Callable[[], None]) -> None:
        """Run something on the first process.

        Args:
            order: Returns the names of weights in the order in which the work reads them.
            work: What to run.
        """
        if self.trainer.is_global_zero:
            work()

    def _live(self) -> dict[str, Tensor]:
        """Return the model's own tensors by name, looked up again only when they have moved."""
        tensors = itertools.chain(self.model.parameters(), self.model.buffers())
        place = tuple((tensor.data_ptr(), tensor.device) for tensor in tensors)
        if self._found is None or self._found[0] != place:
            self._found = place, canonical_state_dict(self.model.state_dict())
        return self._found[1]

    def _resident(self, device: torch.device) -> dict[str, Tensor]:
        """Return the base on the device where it is added to, moved there once."""
        if device.type == "cpu":
            return self.base
        if device not in self._base_on:
            self._base_on[device] = {name: tensor.to(device) for name, tensor in self.base.items()}
        return self._base_on[device]

    def _resident_vector(self, vector: TaskVector, device: torch.device) -> TaskVector:
        """Return a vector on the device where it is added, moved there once; the last few are kept."""
        if device.type == "cpu":
            return vector
        if id(vector) not in self._vectors_on:
            while len(self._vectors_on) >= MAX_VECTORS:
                self._vectors_on.pop(next(iter(self._vectors_on)))
            deltas, buffers = (
                {name: tensor.to(device) for name, tensor in part.items()} for part in (vector.deltas, vector.buffers)
            )
            self._vectors_on[id(vector)] = vector, TaskVector(deltas, buffers, vector.untouched, vector.origin)
        return self._vectors_on[id(vector)][1]

    def _set_estimated(self, vector: TaskVector, scaling_coef: float, live: Mapping[str, Tensor]) -> None:
        key = id(vector), scaling_coef
        if key not in self._estimated:
            self._reestimate()
            self._estimated[key] = (
                vector,
                {  # the vector is kept, so that its id is not given to another
                    name: tensor.clone() for name, tensor in live.items() if name.endswith(_ESTIMATED)
                },
            )
        for name, tensor in self._estimated[key][1].items():
            live[name].copy_(tensor)

    def _reestimate(self) -> None:
        from torch.optim.swa_utils import update_bn

        def images() -> Iterator[Tensor]:
            for datamodule in self.reestimate_with:
                datamodule.trainer = self.trainer  # it may not have been evaluated yet, or only on another stage
                datamodule.prepare_data()
                datamodule.setup("fit")
                for batch_images, _ in itertools.islice(datamodule.train_dataloader(), 20):
                    yield batch_images

        device = next(iter(self.model.parameters())).device
        training = {name: module.training for name, module in self.model.named_modules()}
        with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)  # the same images each time, so that what is written is what was evaluated
            update_bn(images(), self.model, device)
        for name, module in self.model.named_modules():
            module.training = training[name]
