"""Groups of tensors by their names, and coefficients by group: one for names that match a pattern, or a ramp."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from tva.errors import some
from tva.patterns import pattern_of

_NUMBERED = re.compile(r"(.*?(?<![^.])(?:\w*?(?:layer|block|stage)s?_?)?)(\d+)(?![^.])")  # stack, number

Coefficient = float | Mapping[str, float | Sequence[float]]


def coefs_by_tensor(
    coef: str, groups: Mapping[str, float | Sequence[float]], names: Collection[str]
) -> dict[str, float]:
    """Resolve a coefficient that is given by group of tensors.

    Args:
        coef: The coefficient's name, for errors.
        groups: Regular expressions, searched for in tensor names, to a number or to ``[first, …, last]``: numbers at
            equal distances over the layers, linear in between. ``layer`` stands for all names with a layer's number.
        names: Names of all tensors of the model.

    Returns:
        A number for every name: that of the first group that it is in.

    Raises:
        ValueError: A name is in no group, a group has none, or has a ramp where a name has no layer.

    Example:
        >>> coefs_by_tensor("s", {"layer": [0.0, 1.0], ".*": 0.5}, ["emb", "h.0.w", "h.1.w", "h.2.w"])
        {'emb': 0.5, 'h.0.w': 0.0, 'h.1.w': 0.5, 'h.2.w': 1.0}
    """
    layers = layers_of(names)
    found: dict[str, float] = {}
    used = set()
    for name in names:
        for pattern, value in groups.items():
            if name not in layers if pattern == "layer" else not pattern_of(pattern, f"coefs.{coef}").search(name):
                continue
            if not isinstance(value, int | float):
                if name not in layers or len(value) < 2:
                    raise ValueError(
                        f"The coefficient {coef!r} gives {pattern!r} the ramp {list(value)}, which needs two numbers "
                        f"or more and tensors with a layer's number; {name!r} is one of them. Give it one number."
                    )
                value = _along(value, *layers[name])
            found[name] = float(value)
            used.add(pattern)
            break
    lacking = [name for name in names if name not in found]
    if lacking:
        raise ValueError(
            f"The coefficient {coef!r} has groups {some(groups)}, and {len(lacking)} tensors are in none of them: "
            f"{some(sorted(lacking))}. Add a last group '.*' with the number for all others."
        )
    if groups.keys() - used:
        raise ValueError(
            f"The coefficient {coef!r} has groups that no tensor is in, or only such as earlier groups took: "
            f"{some(sorted(groups.keys() - used))}. Names are such as {some(sorted(names))}."
        )
    return found


def layers_of(names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Read layers from names: the first number counts that stands between dots, or after layer, block or stage.

    A stack is the names that share what is before the number.

    Returns:
        For each name that has a number its layer, from 0, and how many layers there are.

    Example:
        >>> layers_of(["emb.w", "h.0.w", "h.1.w"])
        {'h.0.w': (0, 2), 'h.1.w': (1, 2)}
        >>> layers_of(["layer1.0.w", "layer1.1.w", "layer2.0.w"])
        {'layer1.0.w': (0, 2), 'layer1.1.w': (0, 2), 'layer2.0.w': (1, 2)}
    """
    found = {name: match for name in names if (match := _NUMBERED.match(name))}
    numbers: dict[str, set[int]] = {}
    for match in found.values():
        numbers.setdefault(match[1], set()).add(int(match[2]))
    ranks = {prefix: {number: i for i, number in enumerate(sorted(seen))} for prefix, seen in numbers.items()}
    return {name: (ranks[match[1]][int(match[2])], len(ranks[match[1]])) for name, match in found.items()}


def layer_of(name: str) -> tuple[str, int, str] | None:
    """Return what is before the number of a name's layer, that number, and what is after it; None without a layer.

    Example:
        >>> layer_of("model.layers.3.mlp.w"), layer_of("emb.w")
        (('model.layers.', 3, '.mlp.w'), None)
    """
    match = _NUMBERED.match(name)
    return (match[1], int(match[2]), name[match.end() :]) if match else None


def label_of(name: str) -> str:
    """Return a name with ``*`` in place of its layer's number, if it has one.

    Example:
        >>> label_of("h.0.w"), label_of("layer1.1.w"), label_of("emb.w")
        ('h.*.w', 'layer*.1.w', 'emb.w')
    """
    match = _NUMBERED.match(name)
    return f"{match[1]}*{name[match.end() :]}" if match else name


def _along(values: Sequence[float], layer: int, num_layers: int) -> float:
    position = layer * (len(values) - 1) / max(1, num_layers - 1)
    left = min(int(position), len(values) - 2)
    return values[left] + (values[left + 1] - values[left]) * (position - left)


def block_of(name: str) -> str:
    """Return the block of layers that a tensor is in: its name up to the first number, else its module.

    Example:
        >>> block_of("encoder.blocks.3.attn.weight"), block_of("encoder.proj.weight"), block_of("scale")
        ('encoder.blocks.3', 'encoder.proj', 'scale')
    """
    numbered = re.match(r"(.*?(?:^|\.)\d+)(?:\.|$)", name)
    return numbered[1] if numbered else name.rpartition(".")[0] or name


def in_layer_order(names: Iterable[str]) -> list[str]:
    """Put names of layers in the order of their numbers, where the first of them stands; files sort them as text.

    Example:
        >>> in_layer_order(["emb", "h.0", "h.1", "h.10", "h.2", "norm"])
        ['emb', 'h.0', 'h.1', 'h.2', 'h.10', 'norm']
    """
    first: dict[str, int] = {}

    def place(name: str) -> tuple[int, int]:
        numbered = re.match(r"(.*?)(?<![^.])(\d+)(?![^.])", name)
        start, number = (numbered[1], int(numbered[2])) if numbered else (name, 0)
        return first.setdefault(start, len(first)), number

    return sorted(names, key=place)
