"""State dicts of odd tensors."""

import inspect

import torch
import torch.distributed.checkpoint as dcp

SHAPES = {"l.0.w": (40, 30), "l.1.w": (25, 40), "scalar": (), "one": (1,), "empty": (0, 3), "bias": (25,)}


def state(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    wide = {"wide": torch.randn(7, generator=generator, dtype=torch.float64)}
    fixed = {"still": torch.ones(4, dtype=dtype), "steps": torch.tensor(seed)}
    return {**tensors, **wide, **fixed, "bn.running_mean": torch.randn(3, generator=generator)}


def plain_state(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"l.0.w": (40, 30), "l.1.w": (25, 40), "scalar": (), "empty": (0, 3), "bias": (25,)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return {**tensors, "bn.running_mean": torch.randn(3, generator=generator), "steps": torch.tensor(seed)}


def save_distributed(content, folder):
    """Write a folder of torch.distributed.checkpoint in one process; torch 2.6 has no option to say so."""
    alone = {"no_dist": True} if "no_dist" in inspect.signature(dcp.save).parameters else {}
    dcp.save(content, checkpoint_id=folder, **alone)
    return folder
