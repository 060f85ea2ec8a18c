"""The weights that vectors are taken against: written once, found again after an interruption, read lazily."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from tva.callbacks.lora import LoraView
from tva.callbacks.names import names_of
from tva.callbacks.remote_files import deliver, exists, is_remote, open_anywhere, plain, remove, workplace
from tva.callbacks.sharding import Shards, is_shard, live_state

from tva.arithmetic import check_same
from tva.checkpoints import Fingerprint, LazyWeights, TensorHash, canonical_state_dict, fingerprint, open_weights
from tva.checkpoints.atomic import hidden_folder, is_alive
from tva.checkpoints.names import match_state, matched
from tva.errors import MismatchError, some
from tva.vectors.write import TensorSource, write_weights

SNAPSHOT = ".previous-"  # how the name of the weights at the last trajectory vector starts


def snapshot_name(run: str | None, step: int) -> str:
    """Return the file name of the weights at a step; it tells this process from those that died."""
    return f"{SNAPSHOT}{run}-{step}-{os.getpid()}@{socket.gethostname()}.safetensors"


def remove_snapshots_of_dead(folder: str, keep: str | None) -> None:
    """Remove the snapshots that processes of this machine left behind when they were killed, but for one."""
    left = re.compile(re.escape(SNAPSHOT) + r".*-(\d+)@" + re.escape(socket.gethostname()) + r"\.safetensors")
    for path in () if is_remote(folder) else Path(folder).glob(".*"):
        found = left.search(path.name)
        if found and str(path) != keep and not is_alive(int(found[1])):
            path.unlink(missing_ok=True)


class BaseWeights:
    """A file of weights with its fingerprint.

    Every rank knows its path and digest; only rank 0 reads it.

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
    def opened(cls, path: Path, tree: Fingerprint) -> BaseWeights:
        """Wrap a file that was just written."""
        base = cls(None, str(path), tree.digest)
        base.weights, base.tree, base.settled = open_weights(path), tree, True
        return base

    def state(self) -> dict[str, str]:
        """Return the state to store in a checkpoint."""
        return {"base": self.path, "base_fingerprint": self.digest}

    def remove_snapshot(self) -> None:
        """Remove the file, if it is one that only the next trajectory vector needs."""
        if self.path is not None and os.path.basename(self.path).startswith(SNAPSHOT):
            remove(self.path)

    def settle(
        self, shards: Shards, state: Mapping[str, Tensor], view: LoraView, folder: str, beside: Sequence[str] = ()
    ) -> None:
        """Find the base, or write the present weights as the base; every rank takes part.

        Args:
            shards: Of ``state``.
            state: The model's weights under canonical names.
            view: Names without LoRA.
            folder: Where a base is written.
            beside: Folders to search as well, where it is no longer at the recorded path.
        """

        def prepare() -> tuple[Sequence[str], Callable[[], tuple[str, str]]]:
            names = view.plain_names(state)
            if self.digest is not None:
                return [], lambda: self._find(names, beside)
            if self.given is not None:
                return [], lambda: self._open_given({name: state[stored] for name, stored in names.items()})
            if self.resumed_from_step > 0 and self.name is None:
                raise ValueError(
                    f"This run resumes at step {self.resumed_from_step} from a checkpoint that names no base, and the "
                    f"resumed weights are not the base. Pass the original base: TaskVectorCallback(base=PATH)."
                )
            sources = _sources(shards, state, names)
            order = sorted(sources, key=lambda name: -sources[name].spec.dtype.itemsize)
            return [names[name] for name in order], lambda: self._capture(sources, folder)

        self.path, self.digest = shards.on_rank_zero(prepare)
        self.settled = True

    def try_to_settle(self, strategy: Strategy, names: Collection[str]) -> bool:
        """Find the base if it is where it was; return on every rank whether it is.

        Args:
            strategy: The Trainer's.
            names: The network's own names of its weights.
        """
        if not self.settled and strategy.is_global_zero:
            try:
                self._find(names)
            except (OSError, ValueError):
                self.digest = None
        self.digest = strategy.broadcast(self.digest)
        self.settled = self.digest is not None
        return self.settled

    def _capture(self, sources: Mapping[str, TensorSource], folder: str) -> tuple[str, str]:
        with workplace(folder) as inside, hidden_folder(inside / "base") as hidden:
            local = hidden / "base.safetensors"
            self.tree = write_weights(sources, local)
            path = f"{folder}/{self.name or f'base-{self.tree.digest}.safetensors'}"
            self.weights = open_anywhere(str(local))
            if not exists(path):
                deliver(local, path)
        return path, self.tree.digest

    def _open_given(self, state: Mapping[str, Tensor]) -> tuple[str, str]:
        self.weights = match_state(open_anywhere(self.given), state)
        check_same(state, self.weights, "the model", f"the base {self.given}")
        self.tree = fingerprint(self.weights)
        return plain(self.given), self.tree.digest

    def _find(self, names: Collection[str], beside: Sequence[str] = ()) -> tuple[str, str]:
        recorded = plain(self.given or self.path)
        paths = [recorded, *(f"{folder}/{os.path.basename(recorded)}" for folder in beside if self.given is None)]
        path = next((path for path in paths if exists(path)), None)
        if path is None:
            also = f" nor in {some(dict.fromkeys(beside))}" if len(paths) > 1 else ""
            raise FileNotFoundError(
                f"The base that this run started from was expected at {recorded}, but it is not there{also}. Put it "
                f"back, or pass its new path: TaskVectorCallback(base=PATH)."
            )
        stored = open_anywhere(path)
        found = fingerprint(stored)
        new = matched(stored, names)  # bases of earlier versions have the wrapper's prefix
        self.weights = stored.renamed(new)
        self.tree = Fingerprint.from_tensors({name: found.tensors[old] for name, old in new.items()})
        if self.digest not in (found.digest, self.tree.digest):
            raise ValueError(
                f"The checkpoint was trained from the base {self.digest}, but {path} is {found.digest}. Put the "
                f"original base back, or pass its path: TaskVectorCallback(base=PATH)."
            )
        return path, self.digest


def check_keys(
    found: Mapping[str, Sequence[int]], base: BaseWeights, view: LoraView, module: L.LightningModule
) -> None:
    """Check on rank 0 that the model still has the base's keys; a module may leave parts out of its checkpoint.

    Args:
        found: Names and shapes of the weights, without LoRA.
        base: The base.
        view: Names without LoRA.
        module: The model.

    Raises:
        MismatchError: A name or a shape is another.
    """
    known = set(view.plain_names(names_of(module)))
    extra = [name for name in found if name not in base.weights]
    missing = [name for name in base.weights if name not in found and name not in known]
    shapes = [
        f"{name!r} is {list(shape)} now and {list(base.weights.spec(name).shape)} in the base"
        for name, shape in found.items()
        if name in base.weights and base.weights.spec(name).shape != torch.Size(shape)
    ]
    problems = [f"the model now has {some(extra)}"] if extra else []
    problems += [f"it no longer has {some(missing)}"] if missing else []
    problems += ["; ".join(shapes[:3])] if shapes else []
    if problems:
        raise MismatchError(
            f"The model's keys changed since the base {base.path} was captured: {'; '.join(problems)}. Change the "
            f"model before fitting starts (in its constructor or configure_model), so that the base has all its parts."
        )


def check_model(strategy: Strategy, module: L.LightningModule, base: BaseWeights) -> None:
    """Check that the model still has the base's keys, as no callback may have changed them; every rank takes part.

    Raises:
        MismatchError: A name or a shape is another.
    """
    view, state = LoraView(module), canonical_state_dict(live_state(strategy, module))
    message = None
    if strategy.is_global_zero:
        try:
            check_keys(
                {name: state[stored].shape for name, stored in view.plain_names(state).items()}, base, view, module
            )
        except MismatchError as error:
            message = str(error)
    message = strategy.broadcast(message)
    if message is not None:
        raise MismatchError(message)


def digest_of(strategy: Strategy, module: L.LightningModule) -> str:
    """Return the fingerprint that the present weights would have as a base, on every rank; every rank takes part."""
    state = canonical_state_dict(live_state(strategy, module))
    shards = Shards(strategy, state)

    def prepare() -> tuple[Sequence[str], Callable[[], str]]:
        names = LoraView(module).plain_names(state)
        sources = _sources(shards, state, names)
        return list(names.values()), lambda: _hash(sources)

    return shards.on_rank_zero(prepare)


def _sources(shards: Shards, state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, TensorSource]:
    return {
        name: shards.source(stored) if is_shard(state[stored]) else TensorSource.of(state[stored])
        for name, stored in names.items()
    }


def _hash(sources: Mapping[str, TensorSource]) -> str:
    digests = {}
    for name, source in sources.items():
        digest = TensorHash(source.spec)
        for part in source.parts():
            digest.update(part)
        digests[name] = digest.hexdigest()
    return Fingerprint.from_tensors(digests).digest
