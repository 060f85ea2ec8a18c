"""Which message and exit status an exception ends a command with."""

from __future__ import annotations

import re
import sys
import traceback
from pathlib import Path

WRONG, BUG = 2, 3  # exit status: of something wrong in the input, and of a bug in tva
HINT = "\n(TVA_DEBUG=1 shows where this comes from.)"
EXTRAS = {"transformers": "text", "peft": "lora", "optuna": "optuna", "sentence_transformers": "sentence"}  # by package
NO_MEMORY = r"DefaultCPUAllocator|Cannot allocate memory|can't start new thread|can't allocate memory"
_ROOTS = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "callbacks")]
_LIBRARIES = {sys.prefix, sys.base_prefix, str(Path(traceback.__file__).parent)}


def describe(error: Exception) -> tuple[str, int]:
    """Return what to say of an exception, and the exit status.

    Exceptions that tva raises on purpose, and those of the operating system, explain themselves. What a user's own code
    raises is shown with its place in that code. What Lightning or torch raise about a user's settings is shown in
    their words. Everything else is a bug in tva.
    """
    frames = traceback.extract_tb(error.__traceback__)
    owners = [_owner(frame.filename) for frame in frames]
    text = _shortened(str(error)).strip() or type(error).__name__
    kind = type(error).__name__
    theirs = [frame for frame, owner in zip(frames, owners, strict=True) if owner == "user"]
    if theirs and "tva" not in owners[max(at for at, owner in enumerate(owners) if owner == "user") :]:
        shown = "".join(traceback.format_list(theirs[-3:])).rstrip()
        return f"{kind} in your code: {text}\n{shown}{HINT}", WRONG
    if isinstance(error, MemoryError) or re.search(NO_MEMORY, str(error)):
        found = "" if text == kind else f" ({text})"
        advice = "Free some, raise the limit (ulimit -v), or give --max_memory where the command has it."
        return f"{kind}: the system gave this process no more memory or threads{found}. {advice}{HINT}", WRONG
    if isinstance(error, ModuleNotFoundError) and (package := (error.name or "").partition(".")[0]) in EXTRAS:
        return f"This needs {package}, which is not installed: pip install 'tva[{EXTRAS[package]}]'.", WRONG
    if isinstance(error, ValueError | OSError) or _is_deliberate(error, frames, owners):
        return f"{text}{HINT}" if owners[-1:] != ["tva"] else text, WRONG
    inner = next((frame for frame, owner in zip(frames[::-1], owners[::-1], strict=True) if owner == "tva"), None)
    if _is_about_settings(error, owners, inner):
        return f"{kind}: {text}{HINT}", WRONG
    where = f" ({Path(inner.filename).name}, line {inner.lineno}, in {inner.name})" if inner else ""
    report = "Please report it with the command you ran; TVA_DEBUG=1 shows the traceback."
    return f"this is a bug in tva: {kind}: {text}{where}. {report}", BUG


def _owner(filename: str) -> str:
    """Return whose code a file is: ``tva``, a ``library`` or the ``user``."""
    if any(filename.startswith(root) for root in _ROOTS):
        return "tva"
    if filename.startswith("<") or any(filename.startswith(prefix) for prefix in _LIBRARIES):
        return "library"
    return "library" if "site-packages" in filename or "dist-packages" in filename else "user"


def _is_deliberate(error: Exception, frames: list[traceback.FrameSummary], owners: list[str]) -> bool:
    """Whether tva raised it itself, in words meant for the user."""
    kinds = (TypeError, RuntimeError, ImportError)
    raised = bool(frames) and owners[-1] == "tva" and (frames[-1].line or "").startswith("raise ")
    return isinstance(error, ModuleNotFoundError) or (isinstance(error, kinds) and raised)


def _is_about_settings(error: Exception, owners: list[str], inner: traceback.FrameSummary | None) -> bool:
    """Whether a library raised it while it ran what the user configured."""
    if type(error).__name__ == "OutOfMemoryError":
        return True
    trains = "lightning" in sys.modules and owners[-1:] == ["library"]
    at_edge = inner is not None and Path(inner.filename).stem in ("lightning", "trainer")
    return trains and (at_edge or (isinstance(error, RuntimeError) and not isinstance(error, RecursionError)))


def _shortened(text: str) -> str:
    """Cut long words, which are values from files."""
    return re.sub(r"\S{400,}", lambda found: f"{found[0][:80]}… ({len(found[0]):,} characters)", text)
