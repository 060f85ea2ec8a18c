"""Models made of layers of other models: ``base[0:16]`` and ``a[8:24]`` one after the other are 32 layers."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tva.checkpoints import Entry, Info, LazyWeights
from tva.checkpoints.folder import model_config
from tva.checkpoints.prefix import Prefix
from tva.errors import MismatchError, some
from tva.layers import layer_of

_SLICE = re.compile(r"\s*(\w+)\s*\[\s*(\d{1,6})\s*:\s*(\d{1,6})\s*\]\s*")
_BEFORE = re.compile(r"embed(?!_out)|(^|\.)w[tp]e\.", re.IGNORECASE)  # tensors before the layers; all others are behind
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
ONE_A_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers")  # lists in configurations
NUMBERS_OF_LAYERS = ("mlp_only_layers",)


class Slice(NamedTuple):
    """Layers ``first`` to ``stop - 1`` of the input ``name``."""

    name: str
    first: int
    stop: int


def parse_slices(slices: Mapping[str, Sequence[str]], known: Mapping[str, Any]) -> dict[str, list[Slice]]:
    """Read slices as they are written, such as ``{"base": ["base[0:16]", "a[8:24]"]}``.

    Args:
        slices: Name of what is made, to its slices in order.
        known: The inputs by name.

    Raises:
        ValueError: One cannot be read, or names an input that is not given.
    """
    found: dict[str, list[Slice]] = {}
    for made, texts in slices.items():
        for text in [texts] if isinstance(texts, str) else texts:
            match = _SLICE.fullmatch(text)
            if match is None or match[1] not in known or int(match[2]) >= int(match[3]):
                raise ValueError(
                    f"A slice of {made!r} must be an input and a range of its layers, such as 'base[0:16]', where the "
                    f"inputs are {some(known)}; found {text!r}."
                )
            found.setdefault(made, []).append(Slice(match[1], int(match[2]), int(match[3])))
    return found


def is_before(name: str) -> bool:
    """Return whether a tensor outside of layers is before them, as embeddings are, rather than behind."""
    return _BEFORE.search(name) is not None


def layers_in(weights: LazyWeights) -> tuple[str, dict[int, list[str]]]:
    """Return what is before the layers' numbers in a model's names, and the names after the number, by layer.

    Raises:
        ValueError: It has none, or several stacks of them.
    """
    found: dict[str, dict[int, list[str]]] = {}
    for name in weights:
        if place := layer_of(name):
            found.setdefault(place[0], {}).setdefault(place[1], []).append(place[2])
    if len(found) != 1:
        raise ValueError(
            f"Slices need a model with one stack of layers, whose tensors are such as 'model.layers.0.mlp.weight'; "
            f"{weights.path} has {len(found)}: {some(found) or 'no numbered layers'}."
        )
    return next(iter(found.items()))


def stack(made: str, slices: Sequence[Slice], inputs: Mapping[str, LazyWeights]) -> LazyWeights:
    """Return a model whose layers are those of slices, one after the other.

    Embeddings are those of the first slice's input, and what is behind the layers is of the last one's.

    Args:
        made: What it is called in errors.
        slices: In order.
        inputs: The opened models by name.

    Raises:
        ValueError: An input has fewer layers.
        MismatchError: The layers of two inputs have other names or shapes.
    """
    entries: dict[str, Entry] = {}
    used: set[tuple[str, str]] = set()
    stacks = {part.name: layers_in(inputs[part.name]) for part in slices}
    _check_alike(made, stacks, inputs)
    prefix, count = stacks[slices[0].name][0], 0
    for name, first, stop in slices:
        own, layers = stacks[name]
        for number in range(first, stop):
            if number not in layers:
                raise ValueError(
                    f"{made}: {name}[{first}:{stop}] needs layers up to {stop - 1}, and {inputs[name].path} has "
                    f"{len(layers)}, from {min(layers)}. Give a range within them."
                )
            for rest in layers[number]:
                old = f"{own}{number}{rest}"
                entry = inputs[name].entry(old)
                again = (name, old) in used
                entries[f"{prefix}{count}{rest}"] = Prefix(entry, entry.spec, copied=True) if again else entry
                used.add((name, old))
            count += 1
    for side, part in (("before", slices[0]), ("behind", slices[-1])):
        for name in inputs[part.name]:
            if layer_of(name) is None and is_before(name) == (side == "before"):
                entries[name] = inputs[part.name].entry(name)
    shown = ", ".join(f"{part.name}[{part.first}:{part.stop}]" for part in slices)
    info = Info(inputs[slices[0].name].path, f"{count} layers: {shown}")
    return LazyWeights(info, entries)


def _check_alike(made: str, stacks: Mapping[str, tuple[str, dict[int, list[str]]]], inputs: Mapping[str, Any]) -> None:
    """Check that the layers of all inputs have the same names and shapes, as far as they are in more than one."""
    shapes: dict[str, dict[str, set[tuple[int, ...]]]] = {}
    for name, (prefix, layers) in stacks.items():
        shapes[name] = {}
        for number, rests in layers.items():
            for rest in rests:
                shapes[name].setdefault(rest, set()).add(inputs[name].spec(f"{prefix}{number}{rest}").sizes)
    first, *others = shapes
    for other in others:
        mine, theirs = shapes[first], shapes[other]
        differing = [rest for rest in mine | theirs if mine.get(rest) != theirs.get(rest)]
        if differing:
            raise MismatchError(
                f"{made} is made of layers of {inputs[first].path} and {inputs[other].path}, whose names or shapes "
                f"differ: {some(sorted(differing))}. Take layers of models of one architecture and width."
            )


def layer_config(config: Mapping[str, Any], slices: Sequence[Slice], folders: Mapping[str, Path]) -> dict[str, Any]:
    """Return what changes in a ``config.json`` for other layers: their number, and lists of one value per layer.

    Args:
        config: That of the base.
        slices: Which layers the base is made of.
        folders: The inputs' folders by name.

    Raises:
        ValueError: It does not say how many layers there are.
    """
    changed: dict[str, Any] = {}
    for key, part in config.items():
        if isinstance(part, dict) and any(count in part for count in LAYER_COUNTS):
            configs = {name: model_config(folder)[key] for name, folder in folders.items()}
            changed[key] = part | _layer_values(part, slices, configs)
    if not changed:
        changed = _layer_values(config, slices, {name: model_config(folder) for name, folder in folders.items()})
    if not changed:
        raise ValueError(
            f"config.json must say how many layers there are, by one of {', '.join(LAYER_COUNTS)}; it has "
            f"{some(sorted(config))}."
        )
    return changed


def _layer_values(
    config: Mapping[str, Any], slices: Sequence[Slice], configs: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    key = next((key for key in LAYER_COUNTS if key in config), None)
    if key is None:
        return {}
    count = sum(part.stop - part.first for part in slices)
    changed: dict[str, Any] = {key: count}
    places = [(configs[part.name], at) for part in slices for at in range(part.first, part.stop)]
    for name in ONE_A_LAYER:
        if isinstance(config.get(name), list):
            changed[name] = [own[name][at] for own, at in places]
    for name in NUMBERS_OF_LAYERS:
        if config.get(name):
            changed[name] = [new for new, (own, at) in enumerate(places) if at in own[name]]
    return changed
