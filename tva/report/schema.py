"""Check JSON against ``edit.schema.json``; only the schema keywords used there are implemented."""

import functools
import json
import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

from tva.checkpoints.foreign import shown

_TYPES: dict[str, Any] = {"object": dict, "array": list, "string": str, "null": type(None), "boolean": bool}
Problem = tuple[str, str]  # where, and what is wrong there


@functools.lru_cache(maxsize=1)
def _schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(files("tva.report").joinpath("edit.schema.json").read_text(encoding="utf-8"))
    return found


def problems(content: Any) -> Iterator[Problem]:
    """Yield the places where a report does not match the schema; at its first level only the inputs are required."""
    yield from _problems(content, {**_schema(), "required": ["base", "vectors"]}, "")


def _problems(value: Any, schema: Mapping[str, Any], where: str) -> Iterator[Problem]:
    if "$ref" in schema:
        yield from _problems(value, _schema()["$defs"][schema["$ref"].rpartition("/")[2]], where)
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        yield where, f"must be {' or '.join(kinds)}; it is {shown(value)}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield where, f"must be one of {', '.join(map(str, schema['enum']))}; it is {shown(value)}"
    if "anyOf" in schema and all(any(_problems(value, each, where)) for each in schema["anyOf"]):
        yield from _problems(value, schema["anyOf"][0], where)
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        yield where, f"must match {schema['pattern']}; it is {shown(value)}"
    if _is(value, "number") and value < schema.get("minimum", value):
        yield where, f"must be at least {schema['minimum']}; it is {shown(value)}"
    if isinstance(value, dict):
        yield from _of_object(value, schema, where)
    elif isinstance(value, list):
        least = (
            schema.get("minItems", 0) if where.count("/") > 1 else 0
        )  # one without evaluations has an error of its own
        if not least <= len(value) <= schema.get("maxItems", len(value)):
            yield where, f"must have {least} items or more; it has {len(value)}"
        first = schema.get("prefixItems", [])
        for at, item in enumerate(value):
            yield from _problems(item, first[at] if at < len(first) else schema.get("items", {}), f"{where}/{at}")


def _of_object(value: Mapping[str, Any], schema: Mapping[str, Any], where: str) -> Iterator[Problem]:
    for key in schema.get("required", ()):
        if key not in value:
            yield where, f"lacks {key}"
    if len(value) < schema.get("minProperties", 0):
        yield where, "is empty"
    others = schema.get("additionalProperties", {})
    for key, item in value.items():
        inside = schema.get("properties", {}).get(key, others)
        if inside is False:
            yield where, f"has {shown(key)}, which no version of tva writes"
        elif inside is not True:
            yield from _problems(item, inside, f"{where}/{key if len(key) < 80 else key[:79] + '…'}")


def _is(value: Any, kind: str) -> bool:
    if kind in ("number", "integer"):
        return isinstance(value, int if kind == "integer" else int | float) and not isinstance(value, bool)
    return isinstance(value, _TYPES[kind])
