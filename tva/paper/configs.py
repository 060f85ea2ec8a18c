"""Merge configs and fill in their placeholders."""

from collections.abc import Mapping
from typing import Any


def nested(change: Mapping[str, Any]) -> dict[str, Any]:
    """Write keys with dots as mappings within mappings.

    Example:
        >>> nested({"a.b": 1, "a": {"c": 2}})
        {'a': {'b': 1, 'c': 2}}
    """
    found: dict[str, Any] = {}
    for key, value in change.items():
        for part in reversed(str(key).split(".")):
            value = {part: value}
        found = merge(found, value)
    return found


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two configs: mappings are merged, any other value is replaced by the second.

    Another ``class_path`` drops the ``init_args`` of the one before, as in LightningCLI.

    Example:
        >>> merge({"a": {"b": 1, "c": [1]}}, {"a": {"c": [2]}})
        {'a': {'b': 1, 'c': [2]}}
    """
    merged = dict(below)
    if merged.get("class_path") != above.get("class_path", merged.get("class_path")):
        merged.pop("init_args", None)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def fill(value: Any, words: Mapping[str, Any]) -> Any:
    """Replace placeholders in all strings of a config; a string that is only a placeholder becomes its value.

    Example:
        >>> fill({"path": "{root}/{task}-{split}", "seed": "{seed}"}, {"{root}": "data", "{task}": "a", "{seed}": 3})
        {'path': 'data/a-{split}', 'seed': 3}
    """
    if isinstance(value, Mapping):
        return {fill(key, words): fill(item, words) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [fill(item, words) for item in value]
    if isinstance(value, str):
        if value in words:
            return words[value]
        for word, text in words.items():
            value = value.replace(word, str(text))
    return value
