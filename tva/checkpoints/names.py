"""The one rule by which names of weights are matched, what wrappers add to names, and which names are left out.

Names match when they are equal, else when one prefix, the same for all, turns one side into the other: stripped, added,
or exchanged for another where one of the two is a wrapper's. Two ways that lead to the same mapping are one. Anything
else needs a ``key_map``, or names that are left out by a `NameFilter`. Every match has a line that says what was done.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tva._torch import Tensor
from tva.errors import MismatchError, some
from tva.patterns import Pattern

KeyMap = Mapping[str, str] | Sequence[str]
Patterns = Sequence[str] | str | None
CopyOf = Callable[[str, Iterable[str]], str | None]  # a name, and others: the first of them with an equal tensor

MOST_TIED = 8  # names that only one side has, of which each may be a copy of another tensor
ADVICE = "Map the rest by key_map, or leave it out by exclude"
# The attribute or wrapper that holds the model, in front of every name; only these may be exchanged for others.
WRAPPERS = ("model.", "module.", "encoder.", "net.", "network.", "backbone.", "base_model.", "_forward_module.")

WITHIN = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # parts that wrappers add to a name


def canonical_names(names: list[str]) -> dict[str, str]:
    """Map canonical names to the given ones, dropping what wrappers add.

    ``torch.compile`` adds ``_orig_mod`` anywhere in a name, FSDP ``_fsdp_wrapped_module`` and activation checkpointing
    ``_checkpoint_wrapped_module``; ``DistributedDataParallel`` adds ``module.`` in front of every name.

    Example:
        >>> canonical_names(["module.net._orig_mod.weight"])
        {'net.weight': 'module.net._orig_mod.weight'}
    """
    wrapped = bool(names) and all(name.startswith("module.") for name in names)
    canonical = {}
    for name in names:
        short = name.removeprefix("module.") if wrapped else name
        short = ".".join(part for part in short.split(".") if part not in WITHIN)
        _put(canonical, short, name)
    return canonical


def canonical_state_dict(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename a module's state dict as `open_weights` would, and keep only its tensors (no extra state)."""
    state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return {new: state[old] for new, old in canonical_names(list(state)).items()}


def _put(names: dict[str, str], new: str, old: str, by: str = "") -> None:
    if new in names:
        raise ValueError(f"{names[new]!r} and {old!r} would both be called {new!r}{by}; rename one of them.")
    names[new] = old


def map_names(names: Iterable[str], key_map: KeyMap) -> dict[str, str]:
    r"""Rename by regular expressions.

    Args:
        names: Present names.
        key_map: Regular expressions and what replaces every match in every name, in order: a mapping, or a list of
            ``regex=replacement`` (split at the last ``=``).

    Returns:
        New names to the present ones.

    Raises:
        ValueError: An expression is not valid or matches no name, or two names become one.

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
        _put(renamed, new, name, " by key_map")
    unused = [pattern for pattern, count in used.items() if count == 0]
    if unused:
        raise ValueError(
            f"key_map holds {some(unused)}, which matches none of the names {some(renamed.values())}. Correct or "
            f"remove it."
        )
    return renamed


def _pairs(key_map: KeyMap) -> list[tuple[Pattern, str]]:
    if isinstance(key_map, str):
        raise ValueError(f"key_map must be a list of 'regex=replacement' or a mapping, not one string: [{key_map!r}].")
    pairs = []
    for item in key_map.items() if isinstance(key_map, Mapping) else key_map:
        pattern, equals, replacement = (item[0], "=", item[1]) if isinstance(item, tuple) else item.rpartition("=")
        if not equals:
            raise ValueError(f"key_map holds {item!r}; write regex=replacement.")
        pairs.append((Pattern(pattern, "key_map"), replacement))
    return pairs


class NameFilter:
    r"""Which names take part in a command: those that ``include`` finds, if it is given, without those of ``exclude``.

    Args:
        include: Regular expressions, or one, that are searched for in names.
        exclude: Regular expressions of names to leave out, on the side of the base as on that of a vector.

    Raises:
        ValueError: An expression cannot be used.

    Example:
        >>> only = NameFilter(exclude=[r"^criterion\.", "inv_freq"])
        >>> only.kept(["a.w", "criterion.weight"])
        ['a.w']
        >>> only.check_used()
        Traceback (most recent call last):
        ValueError: exclude holds 'inv_freq', which matches no name of the base or a vector. Correct or remove it.
    """

    def __init__(self, include: Patterns = None, exclude: Patterns = None) -> None:
        given = {"include": include, "exclude": exclude}
        self.options = {key: [each] if isinstance(each, str) else list(each) for key, each in given.items() if each}
        self._patterns = {
            option: [Pattern(pattern, option) for pattern in given] for option, given in self.options.items()
        }
        self._unused = {(option, pattern) for option, given in self.options.items() for pattern in given}

    def keeps(self, name: str) -> bool:
        """Return whether a name takes part."""
        found = {}
        for option, patterns in self._patterns.items():
            matching = [pattern.pattern for pattern in patterns if pattern.search(name)]
            self._unused.difference_update((option, pattern) for pattern in matching)
            found[option] = bool(matching)
        return found.get("include", True) and not found.get("exclude", False)

    def kept(self, names: Iterable[str]) -> list[str]:
        """Return the names that take part."""
        return [name for name in names if self.keeps(name)]

    def note(self, names: Iterable[str], whose: str) -> list[str]:
        """Return one line that says how many names are left out, or none."""
        names = list(names)
        left_out = [name for name in names if not self.keeps(name)]
        text = (
            f"left out {len(left_out)} of {len(names)} names{whose} by {' and '.join(self.options)}: {some(left_out)}"
        )
        return [text] if left_out else []

    def check_used(self) -> None:
        """Check, when all names were seen, that every expression was found in one.

        Raises:
            ValueError: An expression was found in none.
        """
        for option, given in self.options.items():
            unused = [pattern for pattern in given if (option, pattern) in self._unused]
            if unused:
                raise ValueError(
                    f"{option} holds {some(unused)}, which matches no name of the base or a vector. Correct or remove "
                    f"it."
                )


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
    names: Iterable[str],
    base_names: Iterable[str],
    key_map: KeyMap = (),
    *,
    subset: bool = False,
    copies: tuple[CopyOf, CopyOf] | None = None,
    advice: str = ADVICE,
) -> NameMatch:
    """Match the names of weights to those of a base by one visible rule.

    Args:
        names: Names of the weights.
        base_names: Names of the base.
        key_map: Regular expressions and replacements that are applied to ``names`` first; see `map_names`.
        subset: The weights may be a part of the base, as an adapter's are.
        copies: How equal tensors are found, among the weights and in the base. A tied tensor may be stored once on one
            side and under both its names on the other: a few names that only one side has match if they are copies.
        advice: What to do about names that do not match.

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
    tried = {
        change: new
        for change in [("", ""), *_changes(list(mapped), list(base), subset)]
        if (new := _changed(mapped, *change)) is not None
    }
    fits = {
        change: new
        for change, new in tried.items()
        if new.keys() == base.keys() or (subset and new.keys() <= base.keys())
    }
    if ("", "") in fits:  # names that are equal need no prefix, whatever else would do
        fits = {("", ""): fits["", ""]}
    fits = {change: new for change, new in fits.items() if new not in _before(fits, change)}
    notes: list[str] = []
    if not fits and copies is not None and not subset:
        for change, new in tried.items():
            if (found := _tied(new, base, *copies)) is not None:
                fits[change], notes = found
                break
    if len(fits) != 1:
        raise MismatchError(_no_match(list(mapped), base, list(fits), subset, advice))
    ((old, new), matched), *_ = fits.items()
    total = f"{len(mapped)} of {len(mapped)} names"
    if old or new:
        texts.append(_described("stripped", "added", "exchanged", old, new, total))
    texts += notes
    order = [name for name in base if name in matched]
    return NameMatch({name: matched[name] for name in order}, "; ".join(texts) or f"{total} match as they are")


def matched(names: Collection[str], base: Collection[str]) -> Mapping[str, str]:
    """Return the base's names to the present ones, if one mapping fits; else the present ones to themselves."""
    try:
        return match_names(names, base).names
    except MismatchError:
        return {name: name for name in names}


def match_state(state: Mapping[str, Tensor], base: Collection[str]) -> Mapping[str, Tensor]:
    """Return a state dict under a base's names, if one mapping fits; else as it is, for a check to refuse."""
    if state.keys() == set(base):
        return state
    names = matched(state, base)
    return state.renamed(names) if hasattr(state, "renamed") else {new: state[old] for new, old in names.items()}


def _before(fits: Mapping[tuple[str, str], Mapping[str, str]], change: tuple[str, str]) -> list[Mapping[str, str]]:
    """Return the mappings of the changes before this one, which are simpler."""
    return [fits[other] for other in itertools.takewhile(lambda other: other != change, fits)]


def _described(strip: str, add: str, exchange: str, old: str, new: str, what: str = "") -> str:
    if old and new:
        text = f"{exchange} {old!r} for {new!r}{' in ' * bool(what)}"
    else:
        text = f"{strip} {old!r}{' from ' * bool(what)}" if old else f"{add} {new!r}{' to ' * bool(what)}"
    return text + what


def _tied(
    names: Mapping[str, str], base: Mapping[str, None], copy_of: CopyOf, base_copy_of: CopyOf
) -> tuple[dict[str, str], list[str]] | None:
    """Match names that differ by copies of tied tensors only; return the mapping and what was done, or None."""
    extra = [name for name in names if name not in base]
    missing = [name for name in base if name not in names]
    common = [name for name in names if name in base]
    if not common or len(extra) + len(missing) > MOST_TIED:
        return None
    matched, notes = {name: names[name] for name in common}, []
    for name in extra:
        if copy_of(names[name], [names[other] for other in common]) is None:
            return None
        notes.append(f"left out {names[name]!r}, a copy of a tied tensor that the base holds once")
    for name in missing:
        kept = base_copy_of(name, common)
        if kept is None:
            return None
        matched[name] = names[kept]
        notes.append(f"took {names[kept]!r} for {name!r} too, which is a copy of {kept!r} in the base")
    return matched, notes


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
    exchanges = [(old, new) for old in strips for new in adds if (_is_wrapper(old) or _is_wrapper(new)) and old != new]
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


def _tops(names: list[str]) -> list[str]:
    parts = (name.split(".")[:-1] for name in names)
    return list(dict.fromkeys(".".join(part[: n + 1]) + "." for part in parts for n in range(min(2, len(part)))))


def _is_wrapper(prefix: str) -> bool:
    return all(part + "." in WRAPPERS for part in prefix.split(".")[:-1])


def _no_match(
    names: list[str], base: Mapping[str, None], fits: list[tuple[str, str]], subset: bool, advice: str
) -> str:
    if fits:
        ways = "; ".join(_described("strip", "add", "exchange", *change) for change in fits[:3])
        return f"The names match the base's in more than one way: {ways}. Choose one by key_map."
    extra = [name for name in names if name not in base]
    present = set(names)
    missing = [name for name in base if name not in present]
    known = next(iter(base))
    tops = {name[: -len(known)] for name in names if name.endswith("." + known)}
    top = next((top for top in tops if base.keys() <= {n[len(top) :] for n in names if n.startswith(top)}), None)
    if top is not None:  # all is there, and the other names are too many
        rest = [name for name in names if not name.startswith(top) or name[len(top) :] not in base]
        example = _example(rest, [name for name in names if name not in rest], advice)
        return (
            f"No single prefix makes the names match: all of the base's {len(base)} are there under {top!r}, and "
            f"{len(rest)} of {len(names)} are not the base's: {some(rest)}. {advice}{example}."
        )
    parts = [f"{len(extra)} of {len(names)} names are not the base's: {some(extra)}"] if extra else []
    if missing and not subset:
        parts.append(f"{len(missing)} of the base's {len(base)} names are not there: {some(missing)}")
    agreeing = [name for name in base if name not in missing]
    example = _example(extra if subset else extra + missing, agreeing, advice) if agreeing else ""
    return f"No single prefix makes the names match: {'; '.join(parts)}. {_shared(names, base)} {advice}{example}."


def _shared(names: list[str], base: Mapping[str, None]) -> str:
    """Return a sentence that says how many names are shared, by the prefix that makes most of them equal."""
    strips, adds = _tops(names), _tops(list(base))
    tops = [("", ""), *((old, "") for old in strips), *(("", new) for new in adds)]

    def count(change: tuple[str, str]) -> int:
        old, new = change
        return sum(new + name[len(old) :] in base for name in names if name.startswith(old))

    best = max(tops, key=count)
    number, fewer = count(best), min(len(names), len(base))
    how = f" under {best[0] or best[1]!r}" if any(best) else ""
    if 2 * number < fewer:
        return f"They share {number or 'none'} of {fewer} names{how}: these are different architectures."
    return f"They share {number} of {fewer} names{how}."


def _example(names: list[str], others: list[str], advice: str) -> str:
    """Return what ``exclude`` would be for a few names and none of the others, if that is advised."""
    patterns: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        tops = (".".join(parts[: n + 1]) + "." for n in range(len(parts) - 1))
        top = next((top for top in tops if not any(other.startswith(top) for other in others)), None)
        patterns["^" + (top or name).replace(".", "[.]") + "$" * (top is None)] = None
    return f", as in exclude={list(patterns)}" if 0 < len(patterns) <= 3 and "exclude" in advice else ""
