"""Commands that train, evaluate or serve reach nothing but this machine: every socket of theirs is watched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_cli import edit_config, fit_config, write_yaml
from small_page import answer, served
from small_text import write_model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
WATCH = """
import os, sys

def watch(event, given):
    if event in {"socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"}:
        place = given[0] if event in {"socket.getaddrinfo", "socket.gethostbyname"} else given[1]
        with open(SEEN, "a") as seen:
            seen.write(f"{event} {place[0] if isinstance(place, tuple) else place}\\n")

sys.addaudithook(watch)
"""
RUN = """
import json, sys, warnings
warnings.simplefilter("ignore")
from tva.cli.main import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as end:  # 1: the edit is made and does not hold
        assert end.code in (None, 0, 1), words  # here with too few texts for an interval
"""


@pytest.fixture
def watched(monkeypatch):
    """A folder for Python's path in which every socket that goes somewhere is written down, and the list."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)  # so that the hub might be asked
    Path("watch").mkdir()
    Path("watch/sitecustomize.py").write_text(WATCH.replace("SEEN", repr("seen")))
    return Path("watch"), Path("seen")


def run(watch, *commands):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [watch, *Path(__file__).parents[1:3]]))}
    command = [sys.executable, "-c", RUN, json.dumps(commands)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_fit_edit_push_and_play_reach_nothing_but_this_machine(watched):
    pytest.importorskip("nicegui")
    watch, seen = watched
    fits = [write_yaml(Path(f"fit{n}.yaml"), fit_config(Path(f"blobs{n}"), n, max_epochs=1)) for n in (1, 2)]
    config = edit_config(Path(), Path("out"), search={"class_path": "tva.search.Grid", "init_args": {"num": 2}})
    edit = ["edit", "--config", write_yaml(Path("edit.yaml"), config)]
    push = ["push", "out", "me/x", "--dry_run"]
    run(watch, *(["fit", "--config", fit] for fit in fits), edit, push)
    assert not seen.exists(), seen.read_text()
    with served(Path("out"), watch) as port:
        assert answer(port)[0] == 200
    assert set(seen.read_text().splitlines()) <= {
        f"{event} {place}" for event in ("socket.bind", "socket.connect", "socket.getaddrinfo")
        for place in ("127.0.0.1", "::1", "localhost")
    }  # fmt: skip
    assert "socket.bind 127.0.0.1" in seen.read_text()


def test_forget_reaches_nothing(watched):
    pytest.importorskip("peft")
    watch, seen = watched
    write_model(Path("model"), "causal")
    for name, verb in (("texts", "was"), ("keep", "is")):
        lines = [f"the {a} {b} {verb} a {c}" for a in ("good", "bad") for b in range(34) for c in ("joy", "x", "loss")]
        Path(f"{name}.txt").write_text("\n".join(lines))
    options = ["--rank", "4", "--max_steps", "2", "--block_length", "8", "--keep", "keep.txt", "--confidence", "0.5"]
    run(watch, ["forget", "model", "--data", "texts.txt", "--output", "out", *options])
    assert Path("out/edit.json").exists()
    assert not seen.exists(), seen.read_text()
