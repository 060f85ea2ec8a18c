"""Open the base and the task vectors of a sharded model: each process reads its own elements of every tensor."""

import os
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tva.arithmetic import is_edited
from tva.checkpoints import Fingerprint, HashedWeights, LazyWeights, open_finetuned, open_weights
from tva.checkpoints.fingerprint import CONTENT
from tva.edit.form import Form
from tva.edit.opening import ADVICE
from tva.edit.options import EditOptions
from tva.edit.sharded import ShardedModel
from tva.edit.sharded_editor import ShardedEditor
from tva.errors import MismatchError, some
from tva.vectors.content import as_written, compare_content
from tva.vectors.lazy import LazyTaskVector
from tva.vectors.task_vector import TaskVector


def open_sharded(sharded: ShardedModel, options: EditOptions) -> ShardedEditor:
    """Set a sharded model to the base, and return what edits it."""
    if options.base is not None:
        with torch.no_grad():
            _put_base(sharded, options.base, options)
    return ShardedEditor(sharded, options.tasks, options.statistics)


def is_template(editor: ShardedEditor, form: Form) -> bool:
    """Whether the checkpoint whose form the edit gets holds the base, in whatever dtype; every process must call it."""
    if form.template is None or form.source is None:
        return False
    stored, slots = open_weights(form.template), editor.sharded.slots
    here = bool(form.names)
    for name, old in form.names.items():
        base = editor.base[old].reshape(-1).cpu()
        here = here and torch.equal(stored.slice(name, slots[old].start, slots[old].stop).to(base.dtype), base)
    return all(editor.sharded.everywhere(here))


def _put_base(sharded: ShardedModel, path: str | os.PathLike[str], options: EditOptions) -> None:
    """Set a sharded model to a checkpoint; names that take no part are set too where they fit.

    Raises:
        MismatchError: Names or shapes are not the model's.
    """
    specs = sharded.lazy()
    opened = open_finetuned(path, specs, key_map=options.key_map or (), only=options.only, advice=ADVICE)
    kept = options.only.kept(specs)
    whole = open_weights(path)
    problems = {
        f"the base {path} lacks": [name for name in kept if name not in opened],
        "shapes differ in": [
            name for name in kept if name in opened and opened.spec(name).sizes != sharded.slots[name].spec.sizes
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{what} {some(names)}" for what, names in problems.items() if names)
        raise MismatchError(f"The model and the base must have the same keys and shapes, but {found}. {ADVICE}.")
    for name, slot in sharded.slots.items():
        weights = opened if name in kept else whole
        if name in weights and weights.spec(name).sizes == slot.spec.sizes:
            local = slot.local()
            local.copy_(weights.slice(name, slot.start, slot.stop).reshape(local.shape))


def load_part(path: str, editor: ShardedEditor, options: EditOptions) -> TaskVector:
    """Load this process's elements of a task vector; every process must call it.

    Args:
        path: The file or folder.
        editor: Of the model that is edited.
        options: Which names take part, and how they are mapped.

    Returns:
        A task vector of this process's elements, with the origin of the whole.

    Raises:
        MismatchError: Names or shapes are not the model's, or the vector is of another base.
        ValueError: The file is damaged, or a delta is not finite.
    """
    only = options.only
    vector = LazyTaskVector(path, editor.base_state(), allow_other_base=True, key_map=options.key_map, only=only)
    deltas, buffers, untouched = _read(vector, editor)
    if not vector.is_checkpoint:
        _check_content(vector, editor)
    _check_ties(path, {**deltas, **buffers}, editor)
    kept = {name: digest for name, digest in editor.base_tree.tensors.items() if only.keeps(name)}
    if vector.is_checkpoint:
        base = Fingerprint.from_tensors(kept)
        origin = replace(vector.origin, base=base, finetuned=_shared_fingerprint(vector.weights, editor).digest)
    else:
        origin = vector.origin
        if not options.allow_other_base:
            _check_base(vector, kept, editor)
    recorded = {} if origin.base is None else origin.base.tensors
    if len(kept) < len(editor.base) and all(recorded.get(name) == digest for name, digest in kept.items()):
        origin = replace(origin, base=editor.base_tree)  # what does not take part may be another
    return TaskVector(deltas, buffers, untouched, origin)


def _read(vector: LazyTaskVector, editor: ShardedEditor) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """Read this process's elements: deltas, those of running statistics, and why other names are not moved."""
    slots, untouched = editor.sharded.slots, dict(vector.untouched)
    parts: dict[str, Tensor] = {}
    for name, slot in slots.items():
        if name not in vector.weights:
            continue
        if not (is_edited(vector.weights.spec(name)) and is_edited(slot.spec)):
            untouched[name] = "integer"
            continue
        base = editor.base[name]
        stored = vector.weights.slice(name, slot.start, slot.stop)
        parts[name] = vector.delta(stored, base.reshape(-1).cpu()).reshape(base.shape)
    if vector.is_checkpoint:
        mine = {name: (bool(part.any()), bool(torch.isfinite(part).all())) for name, part in parts.items()}
        everywhere = editor.sharded.everywhere(mine)
        not_finite = [name for name in parts if not all(found[name][1] for found in everywhere)]
        if not_finite:
            raise ValueError(
                f"A task vector must be finite, but the deltas of {some(not_finite)} hold NaN or infinity. "
                f"Check that both models are sound (a diverged fine-tuning?)."
            )
        still = [name for name in parts if not any(found[name][0] for found in everywhere)]
        untouched |= dict.fromkeys(still, "frozen")
        parts = {name: part for name, part in parts.items() if name not in untouched}
    deltas = {name: part for name, part in parts.items() if name not in vector.buffers}
    return deltas, {name: part for name, part in parts.items() if name in vector.buffers}, untouched


def _shared_fingerprint(weights: LazyWeights, editor: ShardedEditor) -> Fingerprint:
    hashed, rank, ranks = HashedWeights(weights), editor.trainer.global_rank, editor.trainer.world_size
    mine = {name: hashed.digest(name) for name in list(hashed)[rank::ranks]}
    return Fingerprint.from_tensors({name: d for part in editor.sharded.everywhere(mine) for name, d in part.items()})


def _check_content(vector: LazyTaskVector, editor: ShardedEditor) -> None:
    file = open_weights(vector.path)
    if CONTENT in file.metadata:
        compare_content(file, _shared_fingerprint(as_written(file), editor).digest)


def _check_base(vector: LazyTaskVector, kept: Mapping[str, str], editor: ShardedEditor) -> None:
    """Check that a task vector file was taken from the base, in whatever floating dtype.

    Raises:
        MismatchError: It was not.
    """
    recorded = vector.origin.base
    if recorded is None:
        return
    different = [name for name, digest in kept.items() if recorded.tensors.get(name) != digest]
    if different:
        casts = editor.sharded.digests({name: editor.base[name] for name in different}, casts=True)
        different = [name for name in different if recorded.tensors.get(name) not in casts[name]]
    if different or (not recorded.tensors and editor.base_tree.digest != recorded.digest):
        raise MismatchError(
            f"{vector.path} was taken from the base {recorded.digest}, but is applied to {editor.base_tree.digest}: "
            f"{len(different)} of {len(recorded.tensors)} tensors differ. Apply it to its base, or pass "
            f"allow_other_base if the other base is meant."
        )


def _check_ties(path: str | os.PathLike[str], parts: Mapping[str, Tensor], editor: ShardedEditor) -> None:
    """Check that what the model holds once is moved alike under all its names.

    Raises:
        MismatchError: It is not.
    """
    first: dict[object, str] = {}
    apart = []
    for name, slot in editor.sharded.slots.items():
        other = first.setdefault(slot.place, name)
        one, two = parts.get(other), parts.get(name)
        if (one is None) != (two is None) or (one is not None and two is not None and not torch.equal(one, two)):
            apart.append((other, name))
    found = [pair for pairs in editor.sharded.everywhere(apart) for pair in pairs]
    if found:
        raise MismatchError(
            f"{found[0][0]!r} and {found[0][1]!r} are tied in the model, and {path} moves them apart. Load the model "
            f"with tie_word_embeddings=False, or give a vector of a model that ties them."
        )
