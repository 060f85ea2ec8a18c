"""Open a base and fine-tuned models for a model in memory, under the names that its weights have there."""

from collections.abc import Mapping
from dataclasses import replace

import lightning as L
import torch
from torch import Tensor

from tva.arithmetic import check_same
from tva.checkpoints import canonical_state_dict, fingerprint, match_names, open_finetuned, open_weights
from tva.checkpoints.wrappers import network_of
from tva.edit.options import EditOptions
from tva.errors import MismatchError
from tva.models.network import POOLER, own_state
from tva.vectors.header import Origin, is_vector_file
from tva.vectors.kind import KEY
from tva.vectors.task_vector import TaskVector

ADVICE = "Map the rest by key_map, or leave it out by exclude"


def open_base(
    path: str, model: L.LightningModule, live: Mapping[str, Tensor], options: EditOptions
) -> Mapping[str, Tensor]:
    """Open the base that is put into a model.

    Args:
        path: The file or folder.
        model: The model.
        live: Its weights.
        options: Which names take part; those of others are put into the model too where they fit.

    Returns:
        The model's names to tensors.

    Raises:
        MismatchError: Names or shapes are not the model's.
    """
    opened = _open(path, model, live, options)
    kept = {name: live[name] for name in options.only.kept(live)}
    found = {name: opened[name] for name in opened if name in kept}
    check_same(kept, found, "the model", f"the base {path}")
    whole = open_weights(path) if len(kept) < len(live) else {}
    rest = (name for name in live if name not in kept and name in whole)
    return {**found, **{name: whole[name] for name in rest if whole[name].shape == live[name].shape}}


def load_vector(
    path: str | TaskVector, model: L.LightningModule, base: Mapping[str, Tensor], options: EditOptions
) -> TaskVector:
    """Load a task vector file, or take the vector of a fine-tuned checkpoint.

    Args:
        path: The file or folder, or a vector in memory.
        model: The model that is edited.
        base: Weights of the base, under the model's names.
        options: Which names take part, and how they are mapped; the vector does not move the others.
    """
    only = options.only
    kept = {name: base[name] for name in only.kept(base)}
    excluded = {name: "excluded" for name in base if not only.keeps(name)}
    if isinstance(path, TaskVector) or is_vector_file(path):
        vector = path if isinstance(path, TaskVector) else TaskVector.load(path)
        deltas, buffers, untouched = (
            {name: part[name] for name in only.kept(part)} for part in (vector.deltas, vector.buffers, vector.untouched)
        )
        vector = TaskVector(deltas, buffers, untouched, vector.origin)
        try:
            vector = vector.named_for(kept, options.key_map or ())
        except MismatchError as error:
            raise MismatchError(f"{'the vector' if isinstance(path, TaskVector) else path}: {error}") from error
    else:
        opened = _open(path, model, base, options)
        vector = TaskVector.between(
            kept, {name: opened[name] for name in opened if name in kept}, origin=Origin(kind=_kind(opened))
        )
    _check_ties(path, vector, base, model)
    origin = vector.origin
    if excluded and origin.base is not None:
        whole = fingerprint(base)
        if all(origin.base.tensors.get(name) == whole.tensors[name] for name in kept):
            origin = replace(origin, base=whole)  # what does not take part may be another
    return TaskVector(vector.deltas, vector.buffers, vector.untouched | excluded, origin)


def _kind(opened: Mapping[str, Tensor]) -> str | None:
    return getattr(opened, "metadata", {}).get(KEY)


def _open(
    path: str, model: L.LightningModule, live: Mapping[str, Tensor], options: EditOptions
) -> Mapping[str, Tensor]:
    only = options.only
    try:
        return open_finetuned(path, live, key_map=options.key_map or (), only=only, advice=ADVICE)
    except MismatchError:
        # transformers has other names in memory than in some of its folders, and loads a part of a model from them
        state = None if options.key_map else own_state(model, path)
        if state is None:
            raise
        poolers = (POOLER, network_of(model)[0] + POOLER)
        rest = {}
        if not any(name.startswith(POOLER) for name in state):
            rest = {name: live[name] for name in only.kept(live) if name.startswith(poolers)}
        names = match_names(only.kept(state), [name for name in only.kept(live) if name not in rest]).names
        return {**{name: state[old] for name, old in names.items()}, **rest}


def _check_ties(
    path: str | TaskVector, vector: TaskVector, base: Mapping[str, Tensor], model: L.LightningModule
) -> None:
    """Check that what the model holds once is moved alike under all its names.

    Raises:
        MismatchError: It is not.
    """
    places: dict[int, str] = {}
    for name, tensor in canonical_state_dict(model.state_dict()).items():
        first = places.setdefault(tensor.data_ptr(), name) if tensor.numel() else name
        if first == name or base[first].shape != base[name].shape:
            continue
        one, other = vector.deltas.get(first), vector.deltas.get(name)
        if (one is None) != (other is None) or (one is not None and other is not None and not torch.equal(one, other)):
            what = "the vector" if isinstance(path, TaskVector) else path
            raise MismatchError(
                f"{first!r} and {name!r} are tied in the model, and {what} moves them apart. Load the model with "
                f"tie_word_embeddings=False, or give a vector of a model that ties them."
            )
