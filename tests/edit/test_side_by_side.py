"""Processes side by side: edits of one folder take turns, and searches on one log lose no evaluation."""

import importlib
import io
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from tva.edit.folder import FILES, replacing
from tva.evaluation.log import EvaluationLog
from tva.evaluation.result import Evaluation

log_module = importlib.import_module("tva.evaluation.log")
FORK = multiprocessing.get_context("fork")


def together(count, work, *given):
    """Run a function in several processes that begin at once, and check that each ends well."""
    begin = FORK.Barrier(count)

    def one(number):
        begin.wait(300)
        work(number, *given)

    processes = [FORK.Process(target=one, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0


def _edit(number, folder, rounds):
    for turn in range(rounds):
        with replacing(folder) as staging:
            for name in FILES:
                (staging / name).write_text(f"{number} {turn}")


def test_two_edits_that_make_one_folder_take_turns(monkeypatch):
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (time.sleep(0.2), replace(*paths)))  # the other looks meanwhile
    together(2, _edit, Path("new"), 1)
    assert len({Path(f"new/{name}").read_text() for name in FILES}) == 1
    assert os.listdir(".") == ["new"]


def test_edits_of_one_folder_take_turns_and_keep_what_is_not_theirs():
    out = Path("out")
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    together(3, _edit, out, 15)
    assert len({(out / name).read_text() for name in FILES}) == 1
    assert (out / "notes.txt").read_text() == "mine"
    assert os.listdir(".") == ["out"]


def _evaluate(number, path, rounds):
    log = EvaluationLog(path)
    for turn in range(rounds):
        scores = np.full(3000, float(turn))  # a line longer than any buffer
        log.add({"process": number, "turn": turn}, Evaluation({"accuracy": 0.5}, 3000, {"accuracy": scores}, {}))


class Short(io.FileIO):
    """A file of a system that takes a part of what is written at a time, as a network disk may."""

    def write(self, data):
        time.sleep(0.0002)  # in which another process may write
        return super().write(data[:4000])


@pytest.mark.parametrize("in_parts", [False, True])
def test_searches_on_one_log_lose_no_evaluation(monkeypatch, in_parts):
    if in_parts:
        monkeypatch.setattr(log_module, "open", lambda path, mode, buffering: Short(path, "a+"), raising=False)
    path = Path("evaluations.jsonl")
    together(3, _evaluate, path, 40)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert {(entry["process"], entry["turn"]) for entry in entries} == {(p, t) for p in range(3) for t in range(40)}
    log = EvaluationLog(path)
    assert all(log.get({"process": 0, "turn": turn}).num_examples == 3000 for turn in range(40))
