"""Open the inputs of an edit: the base and the vectors, made of slices of the inputs where that is asked for."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tva.checkpoints import LazyWeights, NameFilter, find, model_folder
from tva.checkpoints.tokenizers import check_same_ids
from tva.checkpoints.with_adapter import open_model, parts_of
from tva.compose.slices import Slice, parse_slices, stack
from tva.compose.syntax import BASE
from tva.vectors.header import is_vector_file
from tva.vectors.lazy import LazyTaskVector
from tva.vectors.new_rows import NewRows

Slices = Mapping[str, Sequence[str]]
ADVICE = (
    "Take models of one tokenizer; if these tokens stand for the same, as where reserved ones were renamed, pass "
    "allow_other_tokenizer."
)


def renamed(names: Iterable[str], change: Sequence[str] | None) -> dict[str, str]:
    """Return names with one prefix exchanged for another, to the present ones; those without it stay.

    Example:
        >>> renamed(["bert.w", "head.w"], ("bert.", "encoder."))
        {'encoder.w': 'bert.w', 'head.w': 'head.w'}
    """
    strip, add = change or ("", "")
    return {add + name[len(strip) :] if name.startswith(strip) else name: name for name in names}


def input_names(vectors: Mapping[str, Any], slices: Slices | None) -> list[str]:
    """Return the names that a recipe may use: of the vectors, and of what is made of slices."""
    return list(dict.fromkeys([*vectors, *(name for name in slices or {} if name != BASE)]))


def used_inputs(names: Iterable[str], slices: Slices | None, vectors: Mapping[str, str]) -> list[str]:
    """Return which vectors are read for the names in a recipe, and for slices of the base."""
    parts = parse_slices(slices or {}, {**vectors, BASE: ""})
    wanted = [part.name for part in parts.get(BASE, ()) if part.name != BASE]
    wanted += [part.name for name in names for part in parts.get(name, [Slice(name, 0, 0)])]
    return [name for name in dict.fromkeys(wanted) if name in vectors]


def open_inputs(
    base: str,
    vectors: Mapping[str, str],
    names: Sequence[str],
    slices: Slices | None,
    only: NameFilter,
    new_rows: NewRows = "error",
    allow_other_tokenizer: bool = False,
    change: Sequence[str] | None = None,
    **options: Any,
) -> tuple[LazyWeights, dict[str, LazyTaskVector]]:
    """Open the base, and the vectors that a recipe names; no tensor is read yet.

    Args:
        base: Path of the base.
        vectors: Paths of the vectors by name.
        names: Those in the recipe.
        slices: What is made of slices, and of which; see `tva.compose.slices`.
        only: Which tensors take part.
        new_rows: See `tva.compose.apply.compose`.
        allow_other_tokenizer: Likewise.
        change: What is stripped from and added to the base's names, for an edit that computed under others.
        options: For `LazyTaskVector`.

    Raises:
        MismatchError: Names, shapes, bases or tokenizers differ.
        ValueError: An input cannot be read.
    """
    given = {**vectors, BASE: base}
    parts = parse_slices(slices or {}, given)
    sliced = [*names, BASE]
    wanted = {part.name for name in sliced for part in parts.get(name, ())}
    for name in wanted:
        if len(parts_of(given[name])) == 1 and is_vector_file(given[name]):
            raise ValueError(f"{given[name]} is a task vector file; slices are of models. Give its fine-tuned model.")
    inputs = {name: open_model(given[name]) for name in wanted}
    weights = stack(BASE, parts[BASE], inputs) if BASE in parts else open_model(base)
    weights = weights.renamed(renamed(weights, change)) if change else weights
    sources = {}
    for name in names:
        opened, path = None, vectors.get(name, "")
        if name in parts:
            opened = stack(name, parts[name], inputs)
            opened = opened.renamed({kept: kept for kept in only.kept(opened)}, *only.note(opened, ""))
            path = path or given[parts[name][0].name]
        sources[name] = LazyTaskVector(path, weights, name=name, only=only, new_rows=new_rows, opened=opened, **options)
    if not allow_other_tokenizer:
        _check_tokenizers(base, [given[key] for key in used_inputs(names, slices, vectors)])
    return weights, sources


def _check_tokenizers(base: str, paths: Sequence[str]) -> None:
    """Check that no input's tokenizer gives other ids to the base's tokens."""
    mine = model_folder(find(parts_of(base)[0]))
    for path in paths if mine is not None else ():
        theirs = model_folder(find(parts_of(path)[0]))
        if theirs is not None:
            check_same_ids(mine, theirs, ADVICE)
