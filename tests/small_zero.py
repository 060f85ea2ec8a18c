"""A folder as DeepSpeed ZeRO writes it, by hand, of a few tiny tensors."""

import collections
import enum

import torch


class Stage(enum.IntEnum):  # DeepSpeed stores an enum of its own
    ONE, TWO, THREE = 1, 2, 3


PARAMETERS = [  # two groups
    {"a.w": torch.arange(15.0).reshape(5, 3), "c.w": torch.arange(7.0) + 50},
    {"a.b": torch.arange(5.0) + 20, "one": torch.tensor(9.0)},
]
BUFFERS = {"bn.mean": torch.ones(2), "bn.n": torch.tensor(3)}
FROZEN = {"frozen": torch.arange(3.0) + 70}
FULL = {**PARAMETERS[0], **PARAMETERS[1], **BUFFERS, **FROZEN, "tied": PARAMETERS[0]["a.w"]}


def padded(flat, multiple):
    return torch.cat([flat, torch.zeros(-len(flat) % multiple)])


def save_zero(folder, stage, world=2):
    tagged = folder / "global_step3"
    tagged.mkdir(parents=True)
    (folder / "latest").write_text("global_step3")
    shapes = [{name: tensor.shape for name, tensor in group.items()} for group in PARAMETERS]
    for rank in range(world):
        if stage == 3:

            def part(tensor, rank=rank):
                return padded(tensor.reshape(-1), world).chunk(world)[rank]

            everything = torch.cat([part(tensor) for group in PARAMETERS for tensor in group.values()])
            groups = {"fp32_flat_groups": list(everything.split(5))}  # sub-groups cut anywhere
            frozen = {"frozen_param_fragments": {name: part(tensor) for name, tensor in FROZEN.items()}}
        else:
            flat = [padded(torch.cat([t.reshape(-1) for t in group.values()]), 2 * world) for group in PARAMETERS]
            groups = {"single_partition_of_fp32_groups": [group.chunk(world)[rank] for group in flat]}
            frozen = {"frozen_param_fragments": FROZEN if stage == 2 else None}
        frozen["frozen_param_shapes"] = {name: t.shape for name, t in FROZEN.items()} if stage > 1 else None
        optimizer = {"zero_stage": Stage(stage), "partition_count": world if stage == 3 else [world] * 2, **groups}
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": optimizer}, tagged / name)
        full = {
            name: tensor.half() if name in FULL and name not in BUFFERS else tensor for name, tensor in FULL.items()
        }
        full |= FROZEN if stage < 3 else {}
        model = {
            "module": full,
            "buffer_names": list(BUFFERS),
            "param_shapes": shapes,
            "shared_params": {"tied": "a.w"},
        }
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
        torch.save(collections.OrderedDict(model, **frozen), tagged / name)
    return folder
