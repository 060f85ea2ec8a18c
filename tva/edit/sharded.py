"""An edit of a model that is sharded over the processes of a Trainer: each sets its own elements of every weight.

Under FSDP and FSDP2 a process holds a stretch of every flattened weight. An edit is a sum element by element, so each
process adds its stretch of a vector to its stretch of the base, and none holds a whole model or a whole vector. Work
on whole tensors, such as fingerprints, passes through rank 0 chunk by chunk.
"""

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torchmetrics import Metric

from tva.callbacks.partition import Partition
from tva.callbacks.sharding import Shards
from tva.checkpoints import Fingerprint, Info, LazyWeights, Spec, canonical_state_dict
from tva.checkpoints.fingerprint import FLOATS, TensorHash
from tva.checkpoints.lazy import Entry
from tva.errors import some
from tva.evaluation.ranks import is_sharded


@dataclass(frozen=True)
class Slot:
    """This process's stretch of one weight.

    Attributes:
        owner: The module that holds the parameter or buffer.
        attribute: Its name there.
        spec: Dtype and shape of the whole weight.
        start: Index of the first flattened element that is held here.
        stop: One past the last.
    """

    owner: nn.Module
    attribute: str
    spec: Spec
    start: int
    stop: int

    def local(self) -> Tensor:
        """Return the memory of the elements that are here, while nothing is gathered."""
        tensor = getattr(self.owner, self.attribute).detach()
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    @property
    def place(self) -> tuple[int, str]:
        """A key that tied weights share."""
        return id(getattr(self.owner, self.attribute)), self.attribute


class ShardedModel:
    """A model that a Trainer's strategy has sharded once, for all evaluations of an edit.

    Args:
        trainer: The Trainer.
        model: The model; it is set up, built and sharded as for a validation.
        datamodule: The data module that it is set up for.

    Attributes:
        root: What the strategy runs: the model, or what wraps it.
        slots: This process's part of each weight, by name.
        layouts: By name, the processes in order and how many elements each holds.
    """

    def __init__(self, trainer: L.Trainer, model: L.LightningModule, datamodule: L.LightningDataModule) -> None:
        self.trainer, self.model, self.strategy = trainer, model, trainer.strategy
        model.trainer = datamodule.trainer = trainer
        trainer.datamodule = datamodule
        self.strategy.connect(model)
        self.strategy.setup_environment()
        if trainer.local_rank == 0:
            datamodule.prepare_data()
        self.strategy.barrier()
        datamodule.setup("validate")
        model.setup("validate")
        if is_overridden("configure_model", model):
            with (
                self.strategy.tensor_init_context(),
                self.strategy.model_sharded_context(),
                trainer.precision_plugin.module_init_context(),
            ):
                model.configure_model()
        owners = _owners(model)
        with _kept_defaults(model):
            self.strategy.setup(trainer)
        self.root = self.strategy.model
        self.reshard()
        flat = _flat_stretches(self.root)
        self.slots = {name: _slot(name, *place, flat) for name, place in owners.items()}
        odd = [name for name, slot in self.slots.items() if slot.local().numel() != slot.stop - slot.start]
        if odd:
            raise ValueError(f"{some(odd)} is tied over several units of FSDP. Wrap what shares a weight as one unit.")
        self.layouts = self._layouts()

    def reshard(self) -> None:
        """Free what forward passes have gathered, so that the next one gathers what an edit has set."""
        for part in self.model.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        for wrapper in FullyShardedDataParallel.fsdp_modules(self.root):
            handle = wrapper._handle
            if handle is not None and handle.uses_sharded_strategy and hasattr(handle.flat_param, "_full_param_padded"):
                handle.reshard(True)

    def _layouts(self) -> dict[str, list[tuple[int, torch.Size]]]:
        mine = {name: (slot.start, slot.stop) for name, slot in self.slots.items()}
        everywhere: list[Any] = [None] * self.trainer.world_size
        dist.all_gather_object(everywhere, mine)
        layouts, odd = {}, []
        for name, slot in self.slots.items():
            layout: list[tuple[int, torch.Size]] = []
            end, count = 0, slot.spec.numel()
            while end < count:
                held = ((rank, part.get(name, (0, 0))) for rank, part in enumerate(everywhere))
                rank, stop = next(((rank, b) for rank, (a, b) in held if a == end < b), (0, end))
                if stop == end:
                    odd.append(name)
                    break
                layout.append((rank, torch.Size([stop - end])))
                end = stop
            layouts[name] = layout or [(0, torch.Size([0]))]
        if odd:
            raise ValueError(f"The processes do not hold {some(odd)} in stretches of rows. {BY_ROWS}")
        return layouts

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let the Trainer evaluate the model as it is sharded, where it would build and wrap it once more."""
        model, strategy = self.model, self.strategy
        given: list[tuple[Any, str]] = [(model, "configure_model")]
        if self.root is not model:  # each step of an edit gathers by itself, so it goes through the wrapper by itself
            given += [(strategy, "_setup_model"), (strategy, "_forward_redirection")]
            given += [(model, "validation_step"), (model, "test_step")]
        before = [(owner, name, vars(owner)[name]) for owner, name in given if name in vars(owner)]
        model.configure_model = lambda: None
        if self.root is not model:
            strategy._setup_model = lambda model: self.root
            strategy._forward_redirection = lambda root, inner, name, *args: getattr(inner, name)(*args)
            for name in ("validation_step", "test_step"):
                setattr(model, name, _through(self.root, model, getattr(model, name)))
        try:
            yield
        finally:
            for owner, name in given:
                delattr(owner, name)
            for owner, name, value in before:
                setattr(owner, name, value)

    def lazy(
        self,
        tensors: Mapping[str, Tensor] | None = None,
        digests: Mapping[str, str] | None = None,
        stream: Callable[[str], Iterator[Tensor]] | None = None,
    ) -> LazyWeights:
        """Return weights of which only this process's elements can be read, by default the model's own."""
        parts = {name: slot.local() for name, slot in self.slots.items()} if tensors is None else tensors
        entries = {
            name: ShardEntry(name, self.slots[name], part, digests or {}, stream) for name, part in parts.items()
        }
        return LazyWeights(Info(Path("model"), "model in memory"), entries)

    # --- what passes rank 0

    def shards(self, tensors: Mapping[str, Tensor]) -> Shards:
        """Return what sends this process's elements of some weights, or of a vector's deltas, to rank 0."""
        stand_ins = {}
        for name, tensor in tensors.items():
            partition = Partition(self.layouts[name], functools.partial(tensor.reshape, -1))
            stand_ins[name] = partition.stand_in(tensor.dtype, self.slots[name].spec.shape)
        return Shards(self.strategy, stand_ins)

    def fingerprint(self, tensors: Mapping[str, Tensor]) -> Fingerprint:
        """Return the fingerprint of the whole tensors; every process must call it."""
        return Fingerprint.from_tensors({name: found[0] for name, found in self.digests(tensors).items()})

    def digests(self, tensors: Mapping[str, Tensor], casts: bool = False) -> dict[str, list[str]]:
        """Return by name the digest of a tensor, and with ``casts`` those in other dtypes that have its values."""
        shards = self.shards(tensors)

        def work() -> dict[str, list[str]]:
            found = {}
            for name, tensor in tensors.items():
                dtypes = [getattr(torch, other) for other in FLOATS] if casts and tensor.is_floating_point() else []
                shape = self.slots[name].spec.sizes
                hashes = {dtype: TensorHash(Spec(dtype, shape)) for dtype in dict.fromkeys([tensor.dtype, *dtypes])}
                for part in shards.parts(name):
                    for dtype, hashed in list(hashes.items()):
                        if torch.equal(part.to(dtype).to(part.dtype), part) or dtype == part.dtype:
                            hashed.update(part.to(dtype))
                        else:
                            del hashes[dtype]
                found[name] = [hashed.hexdigest() for hashed in hashes.values()]
            return found

        return shards.on_rank_zero(lambda: (list(tensors), work))

    def whole(self, name: str, part: Tensor) -> Tensor:
        """Return the whole tensor on the CPU; every process must call it, and hold one at a time."""
        out, end, device = torch.empty(self.slots[name].spec.numel(), dtype=part.dtype), 0, self.strategy.root_device
        for rank, (count,) in self.layouts[name]:
            mine = rank == dist.get_rank()
            segment = part.reshape(-1).to(device) if mine else torch.empty(count, dtype=part.dtype, device=device)
            dist.broadcast(segment, src=rank)
            out[end : end + count] = segment
            end += count
        return out.reshape(self.slots[name].spec.sizes)

    def everywhere(self, value: Any) -> list[Any]:
        """Collect a value from every process; every process must call it."""
        found: list[Any] = [None] * self.trainer.world_size
        dist.all_gather_object(found, value)
        return found


BY_ROWS = (
    "Shard by rows, as fully_shard and FSDP with use_orig_params=True do, without tensor parallelism (for "
    "ModelParallelStrategy: tensor_parallel_size=1)."
)


@contextlib.contextmanager
def set_up(
    trainer: L.Trainer, model: L.LightningModule, datamodule: L.LightningDataModule
) -> Iterator[ShardedModel | None]:
    """Shard a model as the Trainer's strategy does, once for all evaluations; None where each process holds all.

    Args:
        trainer: The Trainer.
        model: The model.
        datamodule: A task, which the model is set up for.
    """
    strategy = trainer.strategy
    if not is_sharded(strategy):
        yield None
        return
    launcher = strategy.launcher
    made = functools.partial(ShardedModel, trainer, model, datamodule)
    sharded = made() if launcher is None else launcher.launch(made, trainer=trainer)
    with sharded.held():
        yield sharded


@contextlib.contextmanager
def _kept_defaults(model: L.LightningModule) -> Iterator[None]:
    """Keep what metrics start from, which Lightning 2.6 overwrites where it gives memory to a model that had none."""
    metrics = [(part, copy.deepcopy(part._defaults)) for part in model.modules() if isinstance(part, Metric)]
    yield
    for metric, defaults in metrics:
        metric._defaults = defaults
        metric.reset()


def _through(root: nn.Module, model: L.LightningModule, step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a step that runs as the forward pass of what wraps the model."""

    @functools.wraps(step)
    def through(*args: Any, **kwargs: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            del model.forward  # the step may call the model's own
            return step(*args, **kwargs)

        model.forward = forward
        return root(*args, **kwargs)

    return through


def _owners(model: L.LightningModule) -> dict[str, tuple[nn.Module, str, Spec]]:
    """Return by name of a weight the module that holds it, its name there, and its dtype and shape."""
    if any(isinstance(part, FullyShardedDataParallel) for part in model.modules()):
        raise ValueError(
            "An edit sees a model before FSDP wraps it, and this one is wrapped already. Build it in __init__ or "
            "configure_model, and give the strategy an auto_wrap_policy."
        )
    found = {}
    for owner in model.modules():
        for tensors in (owner._parameters, owner._buffers):
            found.update({id(tensor): (owner, name) for name, tensor in tensors.items() if tensor is not None})
    state = canonical_state_dict(model.state_dict(keep_vars=True))
    odd = [name for name, tensor in state.items() if id(tensor) not in found]
    if odd:
        raise ValueError(
            f"Each weight must be a parameter or buffer to be set where it is sharded; {some(odd)} is made by "
            f"{type(model).__name__}'s state_dict. Leave state_dict as it is."
        )
    return {name: (*found[id(tensor)], Spec(tensor.dtype, tensor.shape)) for name, tensor in state.items()}


def _flat_stretches(root: nn.Module) -> dict[tuple[int, str], tuple[int, int]]:
    """Return by owner and name of FSDP's parameters which elements this process has."""
    found = {}
    for wrapper in FullyShardedDataParallel.fsdp_modules(root):
        handle = wrapper._handle
        if handle is None:
            continue
        if not handle._use_orig_params:
            raise ValueError(f"FSDP must keep each weight apart to be edited: {BY_ROWS}")
        if not handle.uses_sharded_strategy:
            continue
        flat = handle.flat_param
        for info, shard in zip(flat._param_infos, flat._shard_param_infos, strict=True):
            stop = shard.intra_param_end_idx + 1 if shard.in_shard else 0
            found[id(info.module), info.param_name] = shard.intra_param_start_idx if shard.in_shard else 0, stop
        for shared in flat._shared_param_infos:
            prim = found[id(shared.prim_module), shared.prim_param_name]
            found[id(shared.module), shared.param_name] = prim
    return found


def _slot(
    name: str, owner: nn.Module, attribute: str, spec: Spec, flat: Mapping[tuple[int, str], tuple[int, int]]
) -> Slot:
    tensor = getattr(owner, attribute)
    spec = Spec(tensor.dtype, spec.sizes)  # the strategy's precision may have changed it
    if isinstance(tensor, DTensor):
        sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        if tuple(sizes[1:]) != tuple(tensor.shape[1:]):
            raise ValueError(f"{name!r} is sharded as {tensor.placements}. {BY_ROWS}")
        row = math.prod(spec.sizes[1:])
        start = offsets[0] * row if sizes[0] else 0
        return Slot(owner, attribute, spec, start, start + sizes[0] * row)
    start, stop = flat.get((id(owner), attribute), (0, spec.numel()))
    return Slot(owner, attribute, spec, start, stop)


class ShardEntry(Entry):
    """A weight of which this process has a stretch; all of it passes while rank 0 writes."""

    def __init__(
        self,
        name: str,
        slot: Slot,
        part: Tensor,
        digests: Mapping[str, str],
        stream: Callable[[str], Iterator[Tensor]] | None,
    ) -> None:
        self.name, self.slot, self.part, self.digest, self._stream = name, slot, part, digests.get(name), stream
        self.dtype, self.shape = part.dtype, slot.spec.shape

    @property
    def location(self) -> object:
        return self.slot.place

    def slice(self, start: int, stop: int) -> Tensor:
        first = self.slot.start
        if start < first or stop > self.slot.stop:
            raise ValueError(
                f"This process holds elements {first} to {self.slot.stop} of a weight that is sharded, and {start} to "
                f"{stop} were needed. Give task vectors whose names and shapes are the model's own."
            )
        return self.part.reshape(-1)[start - first : stop - first].cpu()

    def parts(self) -> Iterator[Tensor]:
        """Yield the flattened weight in chunks; on rank 0, in the order that was announced."""
        if self._stream is None:
            raise RuntimeError(f"{self.name!r} was read whole, and no process holds all of it.")
        return self._stream(self.name)
