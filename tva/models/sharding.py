"""FSDP2 for tva's models: each repeated block is a unit, and what is left of the network is one more."""

from functools import partial

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn


def shard_later(module: L.LightningModule, part: str) -> None:
    """Let ``configure_model`` shard one part of a model, where the strategy asks for that; for ``setup``.

    Not a method of the class: Lightning's WeightAveraging warns of every model that has one.
    """
    if isinstance(getattr(module.trainer, "strategy", None), ModelParallelStrategy):
        module.configure_model = partial(shard, module, part)


def shard(module: L.LightningModule, part: str) -> None:
    """Shard one part of a model over the data-parallel ranks, if the strategy has a mesh.

    Args:
        module: Changed in place; nothing happens if it is sharded already.
        part: Name of the attribute that holds the network.

    Raises:
        ValueError: The strategy splits single tensors (tensor parallelism), or the network cannot be sharded.
    """
    mesh = module.device_mesh
    if mesh is None:
        return
    from torch.distributed.fsdp import FSDPModule, fully_shard

    network = getattr(module, part)
    if isinstance(network, FSDPModule):
        return
    tensor_parallel = mesh["tensor_parallel"].size()
    if tensor_parallel > 1:
        raise ValueError(
            f"{type(module).__name__} is sharded by FSDP2 only, and the strategy asks for tensor_parallel_size="
            f"{tensor_parallel}. Set tensor_parallel_size: 1."
        )
    odd = [option for option in ("tangent", "lora", "head='learned'") if _has(module, option)]
    if odd:
        raise ValueError(
            f"{type(module).__name__} with {odd[0]} cannot be sharded. Use strategy: ddp, or leave {odd[0]} out."
        )
    data_parallel = mesh["data_parallel"]
    for block in repeated_blocks(network):
        fully_shard(block, mesh=data_parallel)
    fully_shard(network, mesh=data_parallel)


def _has(module: L.LightningModule, option: str) -> bool:
    if option == "head='learned'":
        return bool(getattr(module, "learns_head", False))
    value = module.hparams.get(option)
    return value is not None and value is not False


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """Return the blocks that a network repeats: the items of its outermost lists of one class.

    Example:
        >>> len(repeated_blocks(nn.Sequential(nn.ModuleList(nn.Linear(2, 2) for _ in range(3)))))
        3
    """
    found: list[nn.Module] = []
    for child in network.children():
        blocks = list(child.children()) if isinstance(child, (nn.ModuleList, nn.Sequential)) else []
        alike = len(blocks) > 1 and len({type(block) for block in blocks}) == 1
        if alike and all(list(block.parameters()) for block in blocks):
            found += blocks
        else:
            found += repeated_blocks(child)
    return found
