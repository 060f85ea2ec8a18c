"""The one rule by which names of weights are matched, and what wrappers add to names.

Names match when they are equal, else when one prefix, the same for all, turns one side into the other: stripped, added,
or one wrapper exchanged for another. Anything else needs a ``key_map``. Every match has a line that says what was done.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tva._torch import Tensor
from tva.errors import MismatchError, some

KeyMap = Mapping[str, str] | Sequence[str]

# The attribute or wrapper that holds the model, in front of every name; only these may be exchanged for one another.
WRAPPERS = ("model.", "module.", "encoder.", "net.", "network.", "backbone.", "base_model.", "_forward_module.")


def canonical_names(names: list[str]) -> dict[str, str]:
    """Map canonical names to the given ones, dropping what wrappers add.

    ``torch.compile`` adds ``_orig_mod`` anywhere in a name; ``DistributedDataParallel`` adds ``module.`` in front of
    every name.

    Example:
        >>> canonical_names(["module.net._orig_mod.weight"])
        {'net.weight': 'module.net._orig_mod.weight'}
    """
    wrapped = bool(names) and all(name.startswith("module.") for name in names)
    canonical = {}
    for name in names:
        short = name.removeprefix("module.") if wrapped else name
        short = ".".join(part for part in short.split(".") if part != "_orig_mod")
        _put(canonical, short, name)
    return canonical


def canonical_state_dict(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename a module's state dict as `open_weights` would, and keep its tensors alone (no extra state)."""
    state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return {new: state[old] for new, old in canonical_names(list(state)).items()}


def _put(names: dict[str, str], new: str, old: str) -> None:
    if new in names:
        raise ValueError(f"{names[new]!r} and {old!r} would both be called {new!r}; rename one of them.")
    names[new] = old


def map_names(names: Iterable[str], key_map: KeyMap) -> dict[str, str]:
    r"""Rename by regular expressions.

    Args:
        names: Present names.
        key_map: Regular expressions and what replaces every match in every name, in order: a mapping, or a list of
            ``regex=replacement`` (split at the last ``=``).

    Returns:
        New names to present ones.

    Raises:
        ValueError: An expression is none, matches no name, or two names fall together.

    Example:
        >>> map_names(["visual.proj", "logit_scale"], [r"^visual\.=encoder."])
        {'encoder.proj': 'visual.proj', 'logit_scale': 'logit_scale'}
    """
    pairs = _pairs(key_map)
    used = dict.fromkeys((pattern.pattern for pattern, _ in pairs), 0)
    renamed: dict[str, str] = {}
    for name in names:
        new = name
        for pattern, replacement in pairs:
            try:
                new, count = pattern.subn(replacement, new)
            except (re.error, IndexError) as error:
                raise ValueError(
                    f"key_map replaces {pattern.pattern!r} by {replacement!r}, which does not work: {error}."
                ) from error
            used[pattern.pattern] += count
        _put(renamed, new, name)
    unused = [pattern for pattern, count in used.items() if count == 0]
    if unused:
        raise ValueError(
            f"key_map holds {some(unused)}, which matches none of the names {some(renamed.values())}. Correct or "
            f"remove it."
        )
    return renamed


def _pairs(key_map: KeyMap) -> list[tuple[re.Pattern[str], str]]:
    if isinstance(key_map, str):
        raise ValueError(f"key_map must be a list of 'regex=replacement' or a mapping, not one string: [{key_map!r}].")
    pairs = []
    for item in key_map.items() if isinstance(key_map, Mapping) else key_map:
        pattern, equals, replacement = (item[0], "=", item[1]) if isinstance(item, tuple) else item.rpartition("=")
        if not equals:
            raise ValueError(f"key_map holds {item!r}; write regex=replacement.")
        try:
            pairs.append((re.compile(pattern), replacement))
        except re.error as error:
            raise ValueError(f"key_map holds {pattern!r}, which is no regular expression: {error}.") from error
    return pairs


@dataclass(frozen=True)
class NameMatch:
    """How names were matched.

    Attributes:
        names: The base's names to the names of the weights, in the base's order.
        text: What was done, in one line.
    """

    names: Mapping[str, str]
    text: str

    def __str__(self) -> str:
        return self.text


def match_names(
    names: Iterable[str], base_names: Iterable[str], key_map: KeyMap = (), *, subset: bool = False
) -> NameMatch:
    """Match the names of weights to those of a base by one visible rule.

    Args:
        names: Names of the weights.
        base_names: Names of the base.
        key_map: Regular expressions and replacements that are applied to ``names`` first; see `map_names`.
        subset: The weights may be a part of the base, as an adapter's are.

    Returns:
        The match: the names as they are if they are equal, else with one prefix stripped, added or exchanged.

    Raises:
        MismatchError: No prefix, or more than one, makes the names match.
        ValueError: ``key_map`` cannot be used.

    Example:
        >>> match = match_names(["model.a.w", "model.b.w"], ["a.w", "b.w"])
        >>> match.text
        "stripped 'model.' from 2 of 2 names"
        >>> match.names["a.w"]
        'model.a.w'
    """
    present = list(names)
    mapped = map_names(present, key_map) if key_map else {name: name for name in present}
    base = dict.fromkeys(base_names)
    if not mapped or not base:
        raise MismatchError(f"There are {len(mapped)} names to match to {len(base)} of the base; neither may be 0.")
    done = sum(new != old for new, old in mapped.items())
    texts = [f"key_map renamed {done} of {len(mapped)} names"] if key_map else []
    fits = {
        change: new
        for change in [("", ""), *_changes(list(mapped), list(base), subset)]
        if (new := _changed(mapped, *change)) is not None
        and (base.keys() >= new.keys() if subset else base.keys() == new.keys())
    }
    if ("", "") in fits:  # names that are equal need no prefix, whatever else would do
        fits = {("", ""): fits["", ""]}
    if len(fits) != 1:
        raise MismatchError(_no_match(list(mapped), base, list(fits), subset))
    ((old, new), matched), *_ = fits.items()
    total = f"{len(mapped)} of {len(mapped)} names"
    if old and new:
        texts.append(f"exchanged {old!r} for {new!r} in {total}")
    elif old or new:
        texts.append(f"stripped {old!r} from {total}" if old else f"added {new!r} to {total}")
    order = [name for name in base if name in matched]
    return NameMatch({name: matched[name] for name in order}, "; ".join(texts) or f"{total} match as they are")


def _changed(names: Mapping[str, str], old: str, new: str) -> dict[str, str] | None:
    if not all(name.startswith(old) for name in names):
        return None
    return {new + name[len(old) :]: present for name, present in names.items()}


def _changes(names: list[str], base: list[str], subset: bool) -> list[tuple[str, str]]:
    """List the prefixes to try, as (to strip, to add)."""
    strips, adds = _common_prefixes(names), _common_prefixes(base)
    if subset:  # a part of the base may be anywhere in it
        ends = "." + names[0]
        adds = [name.removesuffix(names[0]) for name in base if name.endswith(ends)]
    exchanges = [(old, new) for old in strips for new in adds if _is_wrapper(old) and _is_wrapper(new) and old != new]
    return list(dict.fromkeys([*((old, "") for old in strips), *(("", new) for new in adds), *exchanges]))


def _common_prefixes(names: list[str]) -> list[str]:
    """List the dotted prefixes that all names have.

    Example:
        >>> _common_prefixes(["model.encoder.a", "model.encoder.b"])
        ['model.', 'model.encoder.']
    """
    parts = names[0].split(".")[:-1]
    prefixes = [".".join(parts[: n + 1]) + "." for n in range(len(parts))]
    return [prefix for prefix in prefixes if all(name.startswith(prefix) for name in names)]


def _is_wrapper(prefix: str) -> bool:
    return all(part + "." in WRAPPERS for part in prefix.split(".")[:-1])


def _no_match(names: list[str], base: Mapping[str, None], fits: list[tuple[str, str]], subset: bool) -> str:
    if fits:
        ways = some([f"strip {old!r}" if old else f"add {new!r}" for old, new in fits])
        return f"The names match the base's in more than one way: {ways}. Say which by key_map."
    extra = [name for name in names if name not in base]
    missing = [] if subset else [name for name in base if name not in set(names)]
    parts = [f"{len(extra)} of {len(names)} names are not the base's: {some(extra)}"] if extra else []
    if missing:
        parts.append(f"{len(missing)} of the base's {len(base)} names are not there: {some(missing)}")
    tops = {name[: -len(known)] for name in names for known in [next(iter(base))] if name.endswith("." + known)}
    hint = next((top for top in tops if base.keys() <= {n[len(top) :] for n in names if n.startswith(top)}), None)
    advice = f"All of the base's are there under {hint!r}: pass prefix={hint!r}" if hint else "Map the rest by key_map"
    return f"No one prefix makes the names match: {'; '.join(parts)}. {advice}."
