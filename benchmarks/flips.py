"""Flip one bit of a file at a time, and count which commands notice.

    python -m benchmarks run flips --seeds 0 [--flips 500]

Half of the flips are in data, half in headers. One that nothing notices is counted by the field that it is in. Only
such are allowed as change no number, name or fingerprint: those of spaces behind the header, and of fields that are not
tva's.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import random
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from benchmarks.attacks import good, trial
from benchmarks.ledger import markdown
from tva.cli.main import main as tva

OPTIONS = {"flips": 500}
DEPENDS = ("benchmarks/flips.py", "tva/checkpoints", "tva/compose", "tva/vectors")
PLAN = {  # file: commands of which one must notice; the last is given what it may write
    "a.tv.safetensors": [["verify", "a.tv.safetensors"], ["inspect", "a.tv.safetensors"]],
    "int8.tv.safetensors": [["verify", "int8.tv.safetensors"]],
    "edited.safetensors": [["verify", "edited.safetensors"]],
    "edited.undo.safetensors": [["revert", "edited.safetensors", "--output", "back.safetensors"]],
}


def status_of(words: list[str]) -> int:
    """Run a command; return its exit status, or 99 for an exception."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            tva(words)
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else 0
        except BaseException:
            return 99
    return 0


def place_of(data: bytes, position: int) -> str:
    """Return the part of a file that a byte is in."""
    (length,) = struct.unpack("<Q", data[:8])
    if not 8 <= position < 8 + length:
        return "length" if position < 8 else "data"
    text = data[8 : 8 + length].decode()
    if position - 8 >= len(text.rstrip()):
        return "spaces behind the header"
    for key, value in json.loads(text).get("__metadata__", {}).items():
        written = f"{json.dumps(key)}:{json.dumps(value)}"
        start = text.find(written)
        if start >= 0 and start <= position - 8 < start + len(written):
            return key
    return "header"


def is_base(path: str) -> bool:
    """Whether a file holds the base, bit for bit."""
    found, base = load_file(path), load_file("base.safetensors")
    return found.keys() == base.keys() and all(found[name].tobytes() == base[name].tobytes() for name in base)


def flip(file: str, commands: list[list[str]], rng: random.Random, in_header: bool) -> tuple[str, str]:
    """Flip one bit, run the commands, and put it back; return what happened, and where it was."""
    path = Path(file)
    good = path.read_bytes()
    header = 8 + struct.unpack("<Q", good[:8])[0]
    position = rng.randrange(header) if in_header else rng.randrange(header, len(good))
    changed = bytearray(good)
    changed[position] ^= 1 << rng.randrange(8)
    path.write_bytes(changed)
    try:
        found = [status_of(words) for words in commands]
        if Path("back.safetensors").exists():
            restored = is_base("back.safetensors")
            os.unlink("back.safetensors")
            return ("restored the base" if restored and found == [0] else "WRONG BASE"), place_of(good, position)
    finally:
        path.write_bytes(good)
    if set(found) - {0, 1, 2}:
        return "BUG", place_of(good, position)
    return ("noticed" if max(found) > 0 else "not noticed"), place_of(good, position)


def measure(seed: int, flips: int) -> dict[str, Any]:
    """Return what happened by file and part, and the places of flips that nothing noticed."""
    rng = random.Random(seed)
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    missed: collections.Counter = collections.Counter()
    with trial.workplace() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            good.make_good(folder / "good")
        for number in range(flips):
            file = list(PLAN)[number % len(PLAN)]
            in_header = bool(number // len(PLAN) % 2)
            happened, place = flip(file, PLAN[file], rng, in_header)
            counts[f"{file}, {'header' if in_header else 'data'}"][happened] += 1
            if happened not in ("noticed", "restored the base"):
                missed[f"{happened}: {file}: {place}"] += 1
    return {"counts": {name: dict(found) for name, found in counts.items()}, "missed": dict(missed)}


def tables(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, str]:
    """Return the counts of all seeds, and the list of what nothing noticed."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    missed: collections.Counter = collections.Counter()
    for run in runs.values():
        missed.update(run["missed"])
        for name, found in run["counts"].items():
            counts[name].update(found)
    shown = sorted({name for found in counts.values() for name in found})
    rows = [[name, *(str(found[each]) for each in shown)] for name, found in counts.items()]
    listed = "; ".join(f"{name} ({count})" for name, count in missed.most_common()) or "none"
    return {"flips": markdown(["file and part", *shown], rows), "missed": f"Neither noticed nor harmless: {listed}."}
