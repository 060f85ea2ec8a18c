"""The weights that vectors are taken against: written once, found again after an interruption, read lazily."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from tva.callbacks.lora import LoraView
from tva.callbacks.remote_files import deliver, exists, open_anywhere, plain, remove, workplace
from tva.callbacks.sharding import Shards, is_shard

from tva.arithmetic import check_same
from tva.checkpoints import Fingerprint, LazyWeights, canonical_names, fingerprint, open_weights
from tva.vectors.write import TensorSource, write_weights

SNAPSHOT = ".previous-"  # how the name of the weights at the last trajectory vector starts


class Base:
    """A file of weights with its fingerprint.

    Every rank knows its place and digest; rank 0 alone reads it.

    Args:
        given: Where the user says that it is.
        recorded: Where a checkpoint says that it is.
        digest: The fingerprint that the checkpoint says it has.
        name: Of the file, where it is written; by default ``base-FINGERPRINT.safetensors``.

    Attributes:
        weights: The weights, open for reading, on rank 0.
        tree: Their fingerprint, on rank 0.
        resumed_from_step: Optimizer steps of the checkpoint that the run resumes from.
    """

    weights: LazyWeights
    tree: Fingerprint

    def __init__(
        self,
        given: str | os.PathLike[str] | None,
        recorded: str | None = None,
        digest: str | None = None,
        name: str | None = None,
    ) -> None:
        self.given = None if given is None else os.fspath(given)
        self.path = recorded
        self.digest = digest
        self.name = name
        self.resumed_from_step = 0
        self.settled = False

    @classmethod
    def opened(cls, path: Path, tree: Fingerprint) -> Base:
        """Make one of a file that was just written."""
        base = cls(None, str(path), tree.digest)
        base.weights, base.tree, base.settled = open_weights(path), tree, True
        return base

    def state(self) -> dict[str, str]:
        """Give what a checkpoint keeps."""
        return {"base": self.path, "base_fingerprint": self.digest}

    def remove_snapshot(self) -> None:
        """Remove the file, if it is one that only the next trajectory vector needs."""
        if self.path is not None and os.path.basename(self.path).startswith(SNAPSHOT):
            remove(self.path)

    def settle(self, shards: Shards, state: Mapping[str, Tensor], view: LoraView, folder: str) -> None:
        """Find the base, or write the present weights as the base; every rank takes part.

        Args:
            shards: Of ``state``.
            state: The model's weights under canonical names.
            view: How names look without LoRA.
            folder: Where a base is written.
        """

        def prepare() -> tuple[Sequence[str], Callable[[], tuple[str, str]]]:
            names = view.plain_names(state)
            if self.digest is not None:
                return [], self._find
            if self.given is not None:
                return [], lambda: self._open_given({name: state[stored] for name, stored in names.items()})
            if self.resumed_from_step > 0 and self.name is None:
                raise ValueError(
                    f"This run resumes at step {self.resumed_from_step} from a checkpoint that names no base, and the "
                    f"resumed weights are not the base. Pass the original base: TaskVectorCallback(base=PATH)."
                )
            sources = {
                name: shards.source(stored) if is_shard(state[stored]) else TensorSource.of(state[stored])
                for name, stored in names.items()
            }
            order = sorted(sources, key=lambda name: -sources[name].spec.dtype.itemsize)
            return [names[name] for name in order], lambda: self._capture(sources, folder)

        self.path, self.digest = shards.on_rank_zero(prepare)
        self.settled = True

    def try_to_settle(self, strategy: Strategy) -> bool:
        """Find the base if it is where it was; whether it is, on every rank."""
        if not self.settled and strategy.is_global_zero:
            try:
                self._find()
            except (OSError, ValueError):
                self.digest = None
        self.digest = strategy.broadcast(self.digest)
        self.settled = self.digest is not None
        return self.settled

    def _capture(self, sources: Mapping[str, TensorSource], folder: str) -> tuple[str, str]:
        with workplace(folder) as inside:
            local = inside / f".base-{os.getpid()}.safetensors"
            try:
                self.tree = write_weights(sources, local)
                path = f"{folder}/{self.name or f'base-{self.tree.digest}.safetensors'}"
                self.weights = open_anywhere(str(local))
                if not exists(path):
                    deliver(local, path)
            finally:
                Path(local).unlink(missing_ok=True)
        return path, self.tree.digest

    def _open_given(self, state: Mapping[str, Tensor]) -> tuple[str, str]:
        self.weights = open_anywhere(self.given)
        check_same(state, self.weights, "the model", f"the base {self.given}")
        self.tree = fingerprint(self.weights)
        return plain(self.given), self.tree.digest

    def _find(self) -> tuple[str, str]:
        path = plain(self.given or self.path)
        if not exists(path):
            raise FileNotFoundError(
                f"The base that this run started from was expected at {path}, but nothing is there. Put it back, or "
                f"pass its new place: TaskVectorCallback(base=PATH)."
            )
        self.weights = open_anywhere(path)
        self.tree = fingerprint(self.weights)
        if self.tree.digest != self.digest:
            raise ValueError(
                f"The checkpoint was trained from the base {self.digest}, but {path} is {self.tree.digest}. Put the "
                f"original base back, or pass its place: TaskVectorCallback(base=PATH)."
            )
        return path, self.tree.digest


def names_of(module: nn.Module) -> list[str]:
    """List the canonical names of all parameters and buffers, tied ones under each name."""
    parameters = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    return [*_canonical(parameters), *buffer_names(module)]


def buffer_names(module: nn.Module) -> list[str]:
    """List the canonical names of all buffers."""
    return _canonical([name for name, _ in module.named_buffers(remove_duplicate=False)])


def _canonical(names: Sequence[str]) -> list[str]:
    # What FSDP and activation checkpointing add is in parameters' names, never in those of a state dict.
    inner = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
    return list(canonical_names([".".join(part for part in name.split(".") if part not in inner) for name in names]))
