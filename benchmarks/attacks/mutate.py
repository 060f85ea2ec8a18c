"""Damage bytes, JSON, pickles, objects and text at random, from a seed."""

import copy
import io
import json
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from tva.checkpoints.fingerprint import HEADER, header_digest
from tva.compose.record import RECORD, Record

DEEP = "[" * 3000 + "]" * 3000
TEXTS = [
    "",
    " ",
    "x",
    "..",
    ".",
    "../given",
    "/dev/zero",
    "/etc/hostname",
    "a\0b",
    "\x1b]0;t\x07\x1b[2J",
    "[/b]x",
    "a\nb",
]
TEXTS += ["<img src=x onerror=alert(1)>", "\u202eabc", "x" * 5000, "9" * 400, "hf://nobody/nothing", "(a|a|aa)+b", "∞"]
TEXTS += ["ties(a)", "0.5*a", "__class__", "os.system", "nan", "1e999", "[]", "null", DEEP, "float32", "given"]
NUMBERS = [0, -1, 1, 1.5, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), 10**400, 1e308, float("inf"), float("nan")]
ODD = [None, True, False, *NUMBERS, *TEXTS, [], {}, [[]], {"a": {}}, [None] * 3, {"": 1}, ["x"] * 100]


def mutate_bytes(data: bytes, rng: Random) -> bytes:
    """Flip, overwrite, cut, remove, insert or copy bytes, one to three times."""
    changed = bytearray(data or b"\0")
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        at = rng.randrange(len(changed)) if rng.random() < 0.6 else rng.randrange(min(len(changed), 1500))
        how = rng.randrange(8)
        if how == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            changed[at : at + 16] = rng.randbytes(16)
        elif how == 2 and at:
            del changed[at:]
        elif how == 3:
            del changed[at : at + rng.randrange(1, 64)]
        elif how == 4:
            changed[at:at] = rng.randbytes(rng.randrange(1, 64))
        elif how == 5:
            changed[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**64 - 1]))
        elif how == 6:
            source = rng.randrange(len(changed))
            changed[at : at + 40] = changed[source : source + 40]
        else:
            changed[-min(len(changed), rng.randrange(1, 200))] = rng.randrange(256)
        if not changed:
            break
    return bytes(changed)


def _slots(value: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    """Return every container and key in a value."""
    items: Any = ()
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    elif hasattr(value, "__dict__") and type(value).__module__.startswith("torch.distributed"):
        items = list(vars(value).items())
    found = [(value, key) for key, _ in items]
    if depth < 12:
        for _, item in items:
            found += _slots(item, depth + 1)
    return found


def mutate_object(value: Any, rng: Random, odd: list[Any] = ODD) -> Any:
    """Replace, remove, rename or exchange one part of a nested value, in a copy."""
    value = copy.deepcopy(value)
    slots = _slots(value)
    if not slots or rng.random() < 0.03:
        return rng.choice(odd)
    container, key = rng.choice(slots)
    if not isinstance(container, dict | list):
        setattr(container, key, rng.choice(odd))
        return value
    how = rng.randrange(5)
    if how == 0:
        del container[key]
    elif how == 1 and isinstance(container, dict):
        container[rng.choice(TEXTS)] = container.pop(key)
    elif how == 2:
        other, theirs = rng.choice(slots)
        taken = getattr(other, theirs) if not isinstance(other, dict | list) else other[theirs]
        container[key] = copy.deepcopy(taken)
    else:
        container[key] = rng.choice(odd)
    return value


def mutate_json(value: Any, rng: Random) -> str:
    """Mutate a value and write it as JSON; text that is JSON itself is mutated inside half of the time."""
    slots = [(c, k) for c, k in _slots(value) if isinstance(c, dict) and isinstance(c[k], str) and c[k][:1] in "[{"]
    if slots and rng.random() < 0.5:
        value = copy.deepcopy(value)
        container, key = rng.choice(
            [(c, k) for c, k in _slots(value) if isinstance(c, dict) and isinstance(c[k], str) and c[k][:1] in "[{"]
        )
        try:
            container[key] = json.dumps(mutate_object(json.loads(container[key]), rng))
        except ValueError:
            container[key] = rng.choice(TEXTS)
    else:
        value = mutate_object(value, rng)
    text = json.dumps(value)
    if rng.random() < 0.03:
        text = text.replace('"', rng.choice(["'", '\\"', ""]), rng.randrange(1, 9))
    return text.replace(json.dumps(DEEP), DEEP) if rng.random() < 0.5 else text


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header and the tensors' bytes of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_safetensors(path: Path, header: str | dict[str, Any], body: bytes = b"") -> None:
    """Write a file with any header."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def reseal(header: str) -> str:
    """Write the fingerprints that a header has of itself anew, as somebody who means harm would."""
    try:
        parsed = json.loads(header)
        metadata = parsed["__metadata__"]
        if RECORD in metadata:
            own = {f"tva.{name}" for name in Record.__dataclass_fields__}
            metadata[RECORD] = header_digest({key: value for key, value in metadata.items() if key in own})
        if HEADER in metadata:
            metadata[HEADER] = header_digest(metadata)
        return json.dumps(parsed)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return header


def opcodes(data: bytes) -> list[bytes]:
    """Return the opcodes of a pickle with their arguments."""
    starts = [position for _, _, position in pickletools.genops(data)]
    return [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]


def mutate_pickle(data: bytes, rng: Random, snippets: list[bytes]) -> bytes:
    """Remove, double, exchange and insert opcodes."""
    parts = opcodes(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(1, len(parts))
        how = rng.randrange(5)
        if how == 0 and len(parts) > 3:
            del parts[at]
        elif how == 1:
            parts.insert(at, rng.choice(parts))
        elif how == 2:
            other = rng.randrange(1, len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        else:
            parts.insert(at, rng.choice(snippets))
    return b"".join(parts)


def change_archive(source: Path, target: Path, change: Callable[[bytes], bytes], **options: Any) -> None:
    """Write a zip archive again with another ``data.pkl``."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        for info in old.infolist():
            data = old.read(info)
            new.writestr(info.filename, change(data) if info.filename.endswith("/data.pkl") else data)


def archive(pickled: bytes, compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    """Return the archive that ``torch.save`` would write of a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as made:
        made.writestr("m/data.pkl", pickled)
        for name, data in {"byteorder": b"little", "version": b"3", **members}.items():
            made.writestr(f"m/{name.replace('__', '/')}", data)
    return buffer.getvalue()


def unpickled(path: Path) -> Any:
    """Load a sound pickle."""
    return pickle.loads(path.read_bytes())
