"""The log of all evaluations: JSON lines from which the next run takes results instead of evaluating again."""

import base64
import contextlib
import functools
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import xxhash

from tva.checkpoints.atomic import locked
from tva.checkpoints.foreign import ForeignFileError, parse_json
from tva.evaluation.result import Evaluation


class EvaluationLog:
    """Evaluations by what they depend on, kept in a file that any number of processes append to.

    Args:
        path: JSON lines; made when the first evaluation is written. None keeps nothing.
        trainer: Its processes evaluate together: the first reads and writes the file, and all find the same.

    Attributes:
        num_reused: Evaluations that were found there.

    Raises:
        ValueError: There is another file at ``path``.
    """

    def __init__(self, path: str | os.PathLike[str] | None, trainer: L.Trainer | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.num_reused = 0
        self._trainer = trainer
        self._writes = trainer is None or trainer.is_global_zero
        if self._writes and self.path is not None:
            _check_log(self.path)

    @functools.cached_property
    def _found(self) -> dict[str, dict[str, Any]]:
        """Read the file at first use: only then do all processes run."""
        found = {}
        if self._writes and self.path is not None and self.path.exists():
            for line in self.path.read_bytes().splitlines():
                try:
                    entry = parse_json(line, str(self.path), _FORM)
                except ForeignFileError:  # a process was stopped while it wrote this line, or it is damaged
                    continue
                if entry.keys() >= _FORM.keys():
                    found[entry["key"]] = entry
        return found if self._trainer is None else self._trainer.strategy.broadcast(found)

    def get(self, facts: Mapping[str, Any]) -> Evaluation | None:
        """Look up an evaluation by all that it depends on."""
        entry = self._found.get(_key(facts))
        if entry is None:
            return None
        self.num_reused += 1
        scores = {name: decode(packed) for name, packed in entry["scores"].items()}
        predicted = entry.get("predicted")
        return Evaluation(
            entry["metrics"],
            entry["num_examples"],
            scores,
            entry["higher_is_better"],
            predicted=None if predicted is None else decode(predicted),
        )

    def add(self, facts: Mapping[str, Any], evaluation: Evaluation) -> None:
        """Append an evaluation, under a lock, so that lines of several processes do not mix."""
        if self.path is None:
            return
        entry = {
            "key": _key(facts),
            **facts,
            "metrics": dict(evaluation.metrics),
            "num_examples": evaluation.num_examples,
            "higher_is_better": dict(evaluation.higher_is_better),
            "scores": {name: encode(scores) for name, scores in evaluation.scores.items()},
            **({} if evaluation.predicted is None else {"predicted": encode(evaluation.predicted)}),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        self._found[entry["key"]] = entry
        if not self._writes:
            return
        self._append(entry)

    def _append(self, entry: Mapping[str, Any]) -> None:
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        with locked(self.path), open(self.path, "ab+", buffering=0) as file:  # a buffer would write in parts
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
            else:
                torn = False
            line = memoryview((b"\n" if torn else b"") + json.dumps(entry).encode() + b"\n")
            while line:  # a system may take a part only, between which other processes wait
                line = line[file.write(line) or 0 :]

    def decide(self, parts: Mapping[str, str], edit: Mapping[str, Any]) -> dict[str, int]:
        """Note that test parts decide an edit; return by task how many different edits each has decided, this one too.

        Counted are the decisions in this log and in those beside it, whose names end alike, so that edits of one folder
        know of each other.

        Args:
            parts: By task the hash of its test part.
            edit: Identifies this edit among others.
        """
        if self.path is None:
            return {}
        found = self._count(parts, _key(edit)) if self._writes else {}
        return found if self._trainer is None else self._trainer.strategy.broadcast(found)

    def _count(self, parts: Mapping[str, str], edit: str) -> dict[str, int]:
        assert self.path is not None
        suffix = "".join(self.path.suffixes[-2:]) or self.path.name
        edits: dict[str, set[str]] = {part: set() for part in parts.values()}
        for file in {self.path, *self.path.parent.glob(f"*{suffix}")}:
            if not file.is_file():
                continue
            with open(file, "rb") as lines:
                for line in (line for line in lines if line.startswith(_DECISION)):
                    with contextlib.suppress(ForeignFileError, KeyError, TypeError):
                        entry = parse_json(line, str(file), {"decision": [str], "edit": str})
                        for part in edits.keys() & set(entry["decision"]):
                            edits[part].add(entry["edit"])
        decides = sorted(part for part in edits if edit not in edits[part])
        if decides:
            self._append({"decision": decides, "edit": edit, "key": f"decision {edit}"})
        return {task: len(edits[part] | {edit}) for task, part in parts.items()}


_SCORES = {"dtype": str, "num": int, "data": str}
_FORM = {
    "key": str,
    "metrics": {str: float},
    "num_examples": int,
    "scores": {str: _SCORES},
    "higher_is_better": {str: bool},
}
_DECISION, _EVALUATION = b'{"decision"', b'{"key"'


def _check_log(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb") if path.is_file() else open(os.devnull, "rb") as file:
        start = file.read(len(_DECISION))
    if not path.is_file() or (start and not start.startswith((_DECISION, _EVALUATION))):
        raise ValueError(f"The log of evaluations would be appended to {path}, which is not one. Give another log.")


def _key(facts: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())


def digest_of(evaluation: Evaluation) -> str:
    """Hash an evaluation's numbers: another digest of the base means that other code or data made it."""
    digest = xxhash.xxh3_128(json.dumps(dict(evaluation.metrics), sort_keys=True).encode())
    for name in sorted(evaluation.scores):
        digest.update(name.encode() + np.ascontiguousarray(evaluation.scores[name]).tobytes())
    return digest.hexdigest()


def encode(scores: np.ndarray) -> dict[str, Any]:
    """Write scores by example for the log: bits where they are right or wrong, in base 64."""
    packed = np.packbits(scores) if scores.dtype == np.bool_ else scores
    return {
        "dtype": str(scores.dtype),
        "num": len(scores),
        "data": base64.b64encode(np.ascontiguousarray(packed).tobytes()).decode(),
    }


def decode(packed: Mapping[str, Any]) -> np.ndarray:
    """Read scores by example from an entry of the log."""
    raw = base64.b64decode(packed["data"])
    if packed["dtype"] == "bool":
        return np.unpackbits(np.frombuffer(raw, np.uint8), count=packed["num"]).astype(bool)
    return np.frombuffer(raw, packed["dtype"]).copy()
