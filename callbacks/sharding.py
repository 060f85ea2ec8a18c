"""Which strategies are supported, and how a sharded state dict reaches rank 0: a message at a time, never whole.

Only rank 0 reads the base and writes files. The other ranks send it their shards, in an order that it has announced,
and it receives all of them even after it has failed, so that no rank deadlocks.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    Strategy,
    XLAStrategy,
)
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from tva.callbacks.deepspeed import zero_state
from tva.callbacks.names import module_state
from tva.callbacks.partition import Layout

from tva.checkpoints import Spec
from tva.errors import MismatchError, some
from tva.vectors.write import TensorSource

T = TypeVar("T")

CHUNK = 2**19  # elements that one message brings

SUPPORTED = (SingleDeviceStrategy, DDPStrategy, FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)


def check_package(trainer: L.Trainer, callback: L.Callback) -> None:
    """Raise if the Trainer is of the older package ``pytorch_lightning``, whose classes are others.

    Raises:
        ValueError: It is.
    """
    if type(trainer.strategy).__module__.partition(".")[0] == "pytorch_lightning":
        raise ValueError(
            f"{type(callback).__name__} needs a Trainer of the package lightning, and this one is of the package "
            f"pytorch_lightning, whose classes are different ones. Write `import lightning as L` in place of "
            f"`import pytorch_lightning as pl`, and use L.Trainer and L.LightningModule."
        )


def check_strategy(strategy: Strategy) -> None:
    """Raise, before training starts, if no right vector could be written under a strategy.

    Raises:
        ValueError: The strategy is not supported; the message says what to do instead.
    """
    name = type(strategy).__name__
    if not isinstance(strategy, SUPPORTED) or isinstance(strategy, (SingleDeviceXLAStrategy, XLAStrategy)):
        raise ValueError(
            f"TaskVectorCallback supports {', '.join(kind.__name__ for kind in SUPPORTED)}; this Trainer uses {name}. "
            f"Train without the callback, and take the vector from the checkpoint afterwards: "
            f"TaskVector.between(open_weights(BASE), open_weights(CHECKPOINT))."
        )


def is_sharded(strategy: Strategy) -> bool:
    """Whether a rank's module holds only a part of the weights while it trains."""
    stage_3 = isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3
    return stage_3 or isinstance(strategy, (FSDPStrategy, ModelParallelStrategy))


def live_state(strategy: Strategy, module: L.LightningModule) -> dict[str, Any]:
    """Return the weights as they are now, each rank its own shards; every rank must call it."""
    if isinstance(strategy, DeepSpeedStrategy):
        return zero_state(module)
    if not is_sharded(strategy):
        return module_state(module)
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    return get_model_state_dict(strategy.model)


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is this rank's part of one that is split over several."""
    return isinstance(tensor, DTensor) or hasattr(tensor, "local_shards") or _is_stand_in(tensor)


class Shards:
    """The sharded tensors of a state dict, sent to rank 0 one after the other.

    Every rank makes one of the same names, and calls `on_rank_zero`.

    Args:
        strategy: The Trainer's.
        state: This rank's state dict; tensors that are whole are not touched.

    Raises:
        MismatchError: The ranks hold different names.
    """

    def __init__(self, strategy: Strategy, state: Mapping[str, Tensor]) -> None:
        self.strategy = strategy
        self.tensors = {name: tensor for name, tensor in state.items() if is_shard(tensor)}
        self._waiting: list[str] = []
        self._taken: Iterator[Tensor] = iter(())
        if strategy.world_size > 1 and (is_sharded(strategy) or isinstance(strategy, DeepSpeedStrategy)):
            text = "\n".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(self.tensors.items()))
            digests: list[Any] = [None] * strategy.world_size
            dist.all_gather_object(digests, hashlib.sha1(text.encode()).hexdigest())
            if len(set(digests)) > 1:
                ranks = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
                raise MismatchError(
                    f"All ranks must hold shards of the same tensors, but ranks {some(ranks)} differ from rank 0 "
                    f"(this one holds {len(self.tensors)}). Build the same model on every rank."
                )

    def on_rank_zero(self, prepare: Callable[[], tuple[Sequence[str], Callable[[], T]]]) -> T:
        """Run something on rank 0 while the others send it their shards; a failure there is one everywhere.

        Args:
            prepare: Called on rank 0; returns the names in the order in which their `parts` will be read, and the
                function that reads them.

        Returns:
            What that function returned, on every rank.

        Raises:
            RuntimeError: Rank 0 failed; there the error itself is raised.
        """
        error: Exception | None = None
        value = None
        if not self.strategy.is_global_zero:
            for name in self.strategy.broadcast(None):
                for _ in self._exchange(name):
                    pass
        else:
            work = None
            try:
                order, work = prepare()
                self._waiting = [name for name in order if name in self.tensors]
            except Exception as caught:  # raised below on every rank
                error = caught
            self.strategy.broadcast(list(self._waiting))
            try:
                value = None if work is None else work()
            except Exception as caught:  # likewise
                error = caught
            for _ in self._taken:  # what nobody will use is received as well, so that no rank waits
                pass
            while self._waiting:
                for _ in self._exchange(self._waiting.pop(0)):
                    pass
        message = None if error is None else f"{type(error).__name__}: {error}"
        value, message = self.strategy.broadcast((value, message))
        if error is not None:
            raise error
        if message is not None:
            raise RuntimeError(f"Rank 0 failed: {message}")
        return value

    def source(self, name: str) -> TensorSource:
        """Return a source of a sharded tensor, to be read in the announced order."""
        tensor = self.tensors[name]
        return TensorSource(Spec(tensor.dtype, torch.Size(tensor.shape)), lambda: self.parts(name))

    def parts(self, name: str) -> Iterator[Tensor]:
        """Yield, on rank 0, the flattened tensor part by part, on the CPU."""
        if not self._waiting or self._waiting[0] != name:
            raise RuntimeError(f"{name!r} was asked for out of the announced order.")
        self._taken = self._exchange(self._waiting.pop(0))
        for part in self._taken:
            yield part.detach().cpu().contiguous().reshape(-1)

    def _exchange(self, name: str) -> Iterator[Tensor]:
        """Bring one tensor to rank 0; every rank must run it to its end."""
        tensor, device = self.tensors[name], self.strategy.root_device
        layout = _layout(tensor)
        if layout is None:  # split in several ways at once, as by tensor parallelism: whole, but only this one
            yield tensor.partition.full_tensor() if _is_stand_in(tensor) else tensor.detach().to(device).full_tensor()
            return
        mine = dist.get_rank()
        local = iter(_local_parts(tensor))
        for rank, shape in layout:
            count, part = shape.numel(), next(local).detach().reshape(-1) if rank == mine else None
            if count == 0 and mine == 0:
                yield torch.empty(0, dtype=tensor.dtype)
            for start in range(0, count, CHUNK):
                size = min(CHUNK, count - start)
                chunk = torch.empty(size, dtype=tensor.dtype, device=device) if part is None and mine == 0 else None
                if part is not None:
                    chunk = part[start : start + size].to(device)
                if rank != 0 and mine == rank:
                    dist.send(chunk.contiguous(), dst=0)
                elif rank != 0 and mine == 0:
                    dist.recv(chunk, src=rank)
                if mine == 0:
                    yield chunk


def _is_stand_in(tensor: Tensor) -> bool:
    return hasattr(tensor, "partition")


def _layout(tensor: Tensor) -> Layout | None:
    """List which rank holds which rows, in order; None if the tensor is split otherwise than by rows over all ranks."""
    if _is_stand_in(tensor):
        return tensor.partition.layout
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        if tuple(tensor.placements) != (Shard(0),) or mesh.size() != dist.get_world_size() or tensor.dim() == 0:
            return None
        rows, ranks = tensor.shape[0], mesh.mesh.flatten().tolist()
        each = -(-rows // len(ranks))  # as torch.chunk splits
        counts = [max(0, min(each, rows - position * each)) for position in range(len(ranks))]
        return [(rank, torch.Size((n, *tensor.shape[1:]))) for rank, n in zip(ranks, counts, strict=True)]
    shards = tensor.metadata().shards_metadata
    if any(any(shard.shard_offsets[1:]) for shard in shards):
        raise ValueError("FSDP shards tensors by rows; a ShardedTensor split otherwise is not supported.")
    shards = sorted(shards, key=lambda shard: shard.shard_offsets[:1])
    return [(shard.placement.rank(), torch.Size(shard.shard_sizes)) for shard in shards]


def _local_parts(tensor: Tensor) -> list[Tensor]:
    if _is_stand_in(tensor):
        return [tensor.partition.local()]
    if isinstance(tensor, DTensor):
        return [tensor.to_local()]
    return [shard.tensor for shard in tensor.local_shards()]
