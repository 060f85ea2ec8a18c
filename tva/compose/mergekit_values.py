"""Parameters of a mergekit configuration in each tensor, and as tva's coefficients by group."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tva.compose.mergekit import MergekitFile, Place, Scope, walk
from tva.layers import coefs_by_tensor, layers_of

Values = dict[str, float]  # by the name of the output's tensor
_MISSING = object()
_WORDS = {"true": 1.0, "yes": 1.0, "on": 1.0, "false": 0.0, "no": 0.0, "off": 0.0}


@dataclass
class Tensor:
    """One tensor of the output.

    Attributes:
        slice: Which slice it is of.
        depth: Where in the slice its layer is, from 0 to 1; 0 outside of layers.
        names: Its name in each source of the slice.
    """

    slice: int
    depth: float
    names: Sequence[str]


class Parameters:
    """Resolves parameters: those nearest to a model count first, then those of the slice and of the file.

    Args:
        file: The configuration.
        tensors: The output's tensors by name.
    """

    def __init__(self, file: MergekitFile, tensors: Mapping[str, Tensor]) -> None:
        self._file, self.tensors = file, tensors

    def numbers(self, name: str, slot: int | None = None, default: Any = _MISSING) -> Values:
        """Return a parameter's value in every tensor.

        Args:
            name: The parameter.
            slot: The source it belongs to, in each slice; None for one that all sources share.
            default: Where it is not given; without it that is noted as a problem, as is a value that is not a number.
        """
        found: Values = {}
        for tensor, where in self.tensors.items():
            value = self._value(name, tensor, where, slot)
            if value is None and default is _MISSING:
                place: Place = ("merge_method",)
                if slot is not None:
                    source = self._file.slices[where.slice].sources[slot]
                    place, name = source.place, f"{source.model}: {name}"
                self._file.problem(place, f"{name} must be given here; {self._file.method} needs it for {tensor!r}")
                return dict.fromkeys(self.tensors, 1.0)
            found[tensor] = default if value is None else value
        return found

    def flag(self, name: str, default: bool) -> bool:
        """Return a parameter that is true or false, the same in all tensors."""
        values = set(self.numbers(name, default=float(default)).values())
        if len(values) > 1 or not values <= {0.0, 1.0}:
            self._file.problem(self._place(name), "must be true or false, the same in all tensors")
        return bool(values and max(values))

    def settings(self, name: str, slot: int | None, number: int) -> list[tuple[Place, Any]]:
        """Return what is said of a parameter in one slice, what counts first in front."""
        part = self._file.slices[number]
        scopes: list[Scope] = [part.sources[slot].parameters] if slot is not None else []
        scopes += [part.parameters, self._file.parameters]
        return [((*scope.place, name), scope.values[name]) for scope in scopes if name in scope.values]

    def _value(self, name: str, tensor: str, where: Tensor, slot: int | None) -> float | None:
        filtered = tensor if slot is None else where.names[slot]
        for place, setting in self.settings(name, slot, where.slice):
            value = self._evaluate(setting, filtered, where.depth, place)
            if value is not None:
                return value
        return None

    def _evaluate(self, setting: Any, tensor: str, depth: float, place: Place) -> float | None:
        if isinstance(setting, dict):
            setting = [setting]
        if not isinstance(setting, list):
            return self._number(setting, place)
        if any(isinstance(part, dict) for part in setting):
            for part in setting:
                text = part.get("filter") if isinstance(part, dict) else None
                if text in (None, "*") or str(text) in tensor:
                    value = part.get("value") if isinstance(part, dict) else part
                    return self._evaluate(value, tensor, depth, place)
            return None
        values = [self._number(part, place) for part in setting]
        if not values:
            return None
        position = depth * (len(values) - 1)
        left = min(int(position), len(values) - 1)
        right, share = min(left + 1, len(values) - 1), position - left
        if all(isinstance(part, bool | str) for part in setting):
            share = 0.0
        return (1 - share) * values[left] + share * values[right]

    def _number(self, value: Any, place: Place) -> float:
        if isinstance(value, str) and value.lower() in _WORDS:
            return _WORDS[value.lower()]
        try:
            return float(value)
        except (TypeError, ValueError):
            self._file.problem(
                place, f"must be a number, a list of numbers over the layers, or filters; found {value!r}"
            )
            return 1.0

    def _place(self, name: str) -> Place:
        found = self.settings(name, None, 0)
        return found[0][0] if found else ("merge_method",)


class Coefficients:
    """Names values of parameters, so that a recipe can say them: a number where they are equal, else a coefficient.

    Args:
        parameters: From which they come.

    Attributes:
        coefs: By name, the groups of `tva.layers.coefs_by_tensor`.
    """

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self.coefs: dict[str, dict[str, Any]] = {}

    def text(self, name: str, values: Values, setting: Any = None) -> str:
        """Return how a recipe says values.

        Args:
            name: A coefficient's name, if it needs one.
            values: In each tensor.
            setting: What they were given as, from which short groups can be made.
        """
        if len(set(values.values())) <= 1:
            return _shown(next(iter(values.values()), 0.0))
        groups = self._groups(values, setting) or _by_name(values)
        for known, other in self.coefs.items():
            if other == groups:
                return known
        while name in self.coefs:
            name += "_"
        self.coefs[name] = groups
        return name

    def _groups(self, values: Values, setting: Any) -> dict[str, Any] | None:
        if setting is None or not all(type(part) in (int, float) for part in walk(setting)):
            return None
        layers, left = layers_of(values), set(values)
        groups: dict[str, Any] = {}
        conditions = setting if isinstance(setting, list) and any(isinstance(p, dict) for p in setting) else [setting]
        for condition in conditions:
            text, value = (
                (condition.get("filter"), condition.get("value")) if isinstance(condition, dict) else (None, condition)
            )
            pattern = ".*" if text in (None, "*") else re.escape(str(text))
            taken = {name for name in left if re.search(pattern, name)}
            inside = {name for name in taken if name in layers}
            if isinstance(value, list) and len(value) > 1:
                if pattern == ".*":
                    groups |= {"layer": value} if inside else {}
                    groups |= {".*": value[0]} if taken - inside else {}
                else:
                    groups |= {f"^{re.escape(name)}$": value[0] for name in sorted(taken - inside)}
                    groups |= {pattern: value} if inside else {}
            elif taken:
                groups[pattern] = value[0] if isinstance(value, list) else value
            left -= taken
        try:
            found = coefs_by_tensor("", groups, list(values))
        except ValueError:
            return None
        return groups if all(abs(found[name] - value) <= 1e-12 for name, value in values.items()) else None


def _by_name(values: Values) -> dict[str, float]:
    """Return groups that say every tensor's value: by layer where it is the same in all of a layer, else by name."""
    common = max(set(values.values()), key=list(values.values()).count)
    groups: dict[str, float] = {}
    layers: dict[str, set[float]] = {}
    for name, value in values.items():
        if match := re.match(r".*?\.\d+\.", name):
            layers.setdefault(match[0], set()).add(value)
    for name, value in values.items():
        match = re.match(r".*?\.\d+\.", name)
        alike = match is not None and len(layers[match[0]]) == 1
        pattern = f"^{re.escape(match[0])}" if match is not None and alike else f"^{re.escape(name)}$"
        if value != common:
            groups[pattern] = value
    return {**groups, ".*": common}


def _shown(value: float) -> str:
    text = repr(float(value))
    return text[:-2] if text.endswith(".0") else text


def combine(function: Any, *values: Values) -> Values:
    """Compute values from others, tensor by tensor."""
    return {name: function(*(part[name] for part in values)) for name in values[0]}


def differing(values: Iterable[Values]) -> bool:
    """Return whether values of any parameter differ from tensor to tensor, or from one to the other."""
    return len({value for part in values for value in part.values()}) > 1
