"""DeepSpeed ZeRO: where the optimizer's weights are, and how they are read without gathering the model.

The module holds rounded copies of them (stages 1 and 2, in bfloat16 or float16) or nothing (stage 3). Those in full
precision are in stretches on the ranks, and they are what a DeepSpeed checkpoint opens as (see
`tva.checkpoints.formats.deepspeed`).
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tva.callbacks.names import module_state
from tva.callbacks.partition import Partition

from tva.errors import some


def zero_state(module: nn.Module) -> dict[str, Any]:
    """Return a module's state dict, with a stand-in for every parameter that ZeRO has partitioned.

    Every rank must call it. Trained parameters are those of the optimizer, in float32; frozen ones and buffers are the
    module's own.

    Raises:
        ValueError: The stretches do not make up a parameter: it is split over other ranks than data-parallel ones.
    """
    state = module_state(module)
    parameters = [(name, p) for name, p in module.named_parameters(remove_duplicate=False) if name in state]
    stretches: dict[str, tuple[int, int] | None] = {}
    for name, parameter in parameters:
        if not hasattr(parameter, "ds_id") and hasattr(parameter, "_hp_mapping"):
            mapping = parameter._hp_mapping  # None on a rank that holds nothing of it
            address = None if mapping is None else mapping.lp_fragment_address
            stretches[name] = None if address is None else (address.start, address.numel)
    everywhere: list[Any] = [stretches]
    if stretches and dist.get_world_size() > 1:
        everywhere = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, stretches)
    odd = []
    for name, parameter in parameters:
        if hasattr(parameter, "ds_id"):
            state[name], complete = _stage_3(parameter)
        elif name in stretches:
            state[name], complete = _stage_1_or_2(name, parameter, everywhere)
        else:  # frozen, or not partitioned
            continue
        odd += [] if complete else [name]
    if odd:
        raise ValueError(
            f"TaskVectorCallback reads what ZeRO has partitioned over all ranks alike, and {some(odd)} is split "
            f"otherwise (MiCS, experts, tensor or sequence parallelism). Train without the callback, and take the "
            f"vector from the checkpoint afterwards: TaskVector.between(open_weights(BASE), open_weights(CHECKPOINT))."
        )
    return state


def _stage_1_or_2(name: str, parameter: nn.Parameter, everywhere: list[Mapping[str, Any]]) -> tuple[Tensor, bool]:
    held = [(*held[name], rank) for rank, held in enumerate(everywhere) if held.get(name) is not None]
    layout, end, complete = [], 0, True
    for start, count, rank in sorted(held):
        complete &= start == end
        layout.append((rank, torch.Size([count])))
        end = start + count

    def local() -> Tensor:
        mapping = parameter._hp_mapping
        return torch.empty(0) if mapping is None else mapping.get_hp_fragment().float()

    partition = Partition(layout, local)
    return partition.stand_in(torch.float32, parameter.shape), complete and end == parameter.numel()


def _stage_3(parameter: nn.Parameter) -> tuple[Tensor, bool]:
    import deepspeed
    from deepspeed.utils import safe_get_local_fp32_param

    world, shape, count = dist.get_world_size(), torch.Size(parameter.ds_shape), parameter.ds_numel
    if not (parameter.requires_grad and hasattr(parameter, "_z3_optimizer")):  # no optimizer holds it: gather this one
        partition = Partition(gathered=lambda: deepspeed.zero.GatheredParameters([parameter]), whole=parameter)
        return partition.stand_in(parameter.dtype, shape), True
    each = -(-count // world)
    layout = [(rank, torch.Size([max(0, min(each, count - rank * each))])) for rank in range(world)]
    mine = layout[dist.get_rank()][1].numel()

    def local() -> Tensor:  # a copy: DeepSpeed may have read it into a buffer that the next one takes
        return safe_get_local_fp32_param(parameter)[:mine].to(torch.float32, copy=True)

    partition = Partition(layout, local)
    return partition.stand_in(torch.float32, shape), dist.get_world_size(parameter.ds_process_group) == world
