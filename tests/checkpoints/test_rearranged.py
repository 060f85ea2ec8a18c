"""Folders of several ranks whose parts are moved, dropped, doubled or cut: the right bits, or an error naming them."""

import collections
import itertools
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from small_zero import FULL, save_zero
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from tva import open_weights

SIZES = {"a": (6, 4), "b": (5,), "c": (4, 3, 2)}


def cuts(rng, size):
    """Cut one dimension at random places."""
    places = sorted({0, size, *(rng.randrange(size + 1) for _ in range(2))})
    return list(itertools.pairwise(places))


def boxes_of(rng, size):
    """Cut a tensor into boxes that fill it: (offsets, sizes)."""
    grid = itertools.product(*(cuts(rng, length) for length in size))
    return [(tuple(a for a, _ in box), tuple(b - a for a, b in box)) for box in grid]


def save_boxes(folder, rng):
    """Save tensors in random boxes and files, by hand; return the tensors and what the metadata will say."""
    folder.mkdir()
    tensors = {name: torch.randn(size, generator=torch.Generator().manual_seed(0)) for name, size in SIZES.items()}
    listed, places = {}, {}
    for name, tensor in tensors.items():
        listed[name] = boxes_of(rng, tensor.shape)
        for offsets, sizes in listed[name]:
            file = folder / f"__{rng.randrange(3)}_0.distcp"
            start = file.stat().st_size if file.exists() else 0
            with file.open("ab") as out:
                box = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
                torch.save(tensor[box].clone(), out)
            places[name, offsets] = [file.name, start, file.stat().st_size - start]
    return tensors, listed, places


def write_metadata(folder, listed, places):
    described = {
        name: TensorStorageMetadata(
            TensorProperties(dtype=torch.float32),
            torch.Size(SIZES[name]),
            [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in boxes],
        )
        for name, boxes in listed.items()
    }
    stored = {MetadataIndex(name, torch.Size(at)): _StorageInfo(*place) for (name, at), place in places.items()}
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(described, storage_data=stored)))


def moved(values, rng):
    """Add one to a value, or take one from it."""
    values, place = list(values), rng.randrange(len(values))
    values[place] += rng.choice((-1, 1))
    return tuple(values)


def rearrange(kind, rng, folder, listed, places):
    """Change what the metadata says, or the files."""
    name = rng.choice(sorted(listed))
    place = rng.randrange(len(listed[name]))
    offsets, sizes = listed[name][place]
    if kind == "order":
        rng.shuffle(listed[name])
    elif kind == "drop":
        del listed[name][place]
    elif kind == "double":
        listed[name].append(listed[name][place])
    elif kind == "shift":
        shifted = moved(offsets, rng)
        places[name, shifted] = places[name, offsets]
        listed[name][place] = shifted, sizes
    elif kind == "size":
        listed[name][place] = offsets, moved(sizes, rng)
    elif kind == "place":
        places[name, offsets][rng.choice((1, 2))] += rng.choice((-8, 8))
    elif kind == "cut":
        file = folder / places[name, offsets][0]
        file.write_bytes(file.read_bytes()[: -rng.randrange(1, 400)])
    else:  # two files change places
        one, two = (folder / f"__{rank}_0.distcp" for rank in rng.sample(range(3), 2))
        if one.exists() and two.exists():
            first = one.read_bytes()
            one.write_bytes(two.read_bytes())
            two.write_bytes(first)


KINDS = ("order", "drop", "double", "shift", "size", "place", "cut", "swap")


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_of_a_distributed_tensor_are_right_or_refused(kind):
    ended = collections.Counter()
    for seed in range(16):
        rng, folder = random.Random(f"{kind} {seed}"), Path(f"dcp{seed}")
        tensors, listed, places = save_boxes(folder, rng)
        rearrange(kind, rng, folder, listed, places)
        write_metadata(folder, listed, places)
        ended[read(folder, tensors)] += 1
    assert ended["right"] == 16 if kind == "order" else ended["refused"] >= 8, ended


def read(folder, tensors):
    """Read a folder: the right bits, or an error that names it; anything else fails."""
    error = None
    try:
        found = dict(open_weights(folder))
    except (ValueError, FileNotFoundError) as caught:
        error = str(caught)
    if error is not None:
        assert str(folder) in error, error
        return "refused"
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name
    return "right"


@pytest.mark.parametrize("kind", ["shorter", "longer", "shape", "lost", "count", "stage"])
def test_partitions_of_zero_add_up_or_are_refused(kind, tmp_path):
    ended = collections.Counter()
    for number, (stage, world) in enumerate(itertools.product((1, 2, 3), (2, 3, 4, 5))):
        rng, folder = random.Random(number), save_zero(tmp_path / str(number), stage, world)
        inner = folder / "global_step3"
        path = inner / f"zero_pp_rank_{rng.randrange(world)}_mp_rank_00_optim_states.pt"
        content = torch.load(path, weights_only=False)
        optimizer = content["optimizer_state_dict"]
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        if kind in ("shorter", "longer"):
            group = optimizer[key][0]
            optimizer[key][0] = group[:-1] if kind == "shorter" else torch.cat([group, torch.ones(40)])
        elif kind == "lost":
            del optimizer[key][-1]
        elif kind == "count":
            optimizer["partition_count"] = world + 1 if stage == 3 else [world + 1] * 2
        elif kind == "stage":
            optimizer["zero_stage"] = 9
        torch.save(content, path)
        if kind == "shape":
            for model in inner.glob("*model_states.pt"):
                content = torch.load(model, weights_only=False)
                shapes = content["param_shapes"][0]
                name = next(iter(shapes))
                shapes[name] = torch.Size([shapes[name][0] + 50, *shapes[name][1:]])
                torch.save(content, model)
        ended[read(folder, FULL)] += 1
        shutil.rmtree(folder)
    assert ended["refused"] == 12 or kind in ("shorter", "count", "stage"), (
        ended
    )  # padding, and what nothing depends on
    assert ended["refused"] >= 4, ended
