"""Where something takes a path, it takes a str and any os.PathLike, with the same result."""

import itertools
import os
from dataclasses import asdict, is_dataclass
from pathlib import Path

import pytest
import torch
from small_models import Blobs, LinearNet

from tva import EditReport, TaskVector, edit_model, fingerprint, open_weights, save_weights
from tva.checkpoints import open_finetuned
from tva.cli.commands.play import open_run
from tva.cli.lightning import open_edit
from tva.compose.apply import compose
from tva.compose.revert import revert
from tva.compose.verify import verify
from tva.edit.push import push
from tva.edit.runs import revisit
from tva.vectors.compare import compare
from tva.vectors.compress import compress
from tva.vectors.extract import extract
from tva.vectors.inspect import inspect
from tva.vectors.listing import list_vectors
from tva.vectors.match import match

BASE, TUNED, VECTOR, EDITED = "base.safetensors", "tuned.safetensors", "a.tv.safetensors", "edited.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, a fine-tuned model, its vector, an edit of files and an edit of a model."""
    folder = tmp_path_factory.mktemp("paths")
    torch.manual_seed(0)
    base = LinearNet().state_dict()
    tuned = {name: value + 0.1 * torch.randn_like(value) for name, value in base.items()}
    before = Path.cwd()
    os.chdir(folder)
    try:
        save_weights(base, BASE)
        save_weights(tuned, TUNED)
        TaskVector.between(base, tuned).save(VECTOR)
        compose(BASE, {"a": VECTOR}, "a", EDITED, keep_undo=True)
        edit(lambda path: path)
        (folder / "edit.yaml").write_text(CONFIG)
    finally:
        os.chdir(before)
    return folder


def edit(path):
    model = LinearNet()
    model.load_state_dict(dict(open_weights(BASE)))
    return edit_model(
        model,
        vectors={"a": path(VECTOR)},
        recipe="a",
        base=path(BASE),
        output=path("run"),
        log=path("log.jsonl"),
        joint=path(TUNED),
        baselines=["joint"],
        scaling_coef=0.5,
        targets={"a": Blobs(1)},
    )


CONFIG = f"""
model: {{class_path: small_models.LinearNet}}
vectors: {{a: {VECTOR}}}
recipe: a
scaling_coef: 0.5
output: run
targets: {{a: {{class_path: small_models.Blobs, init_args: {{seed: 1}}}}}}
"""
COUNT = itertools.count()
CALLS = {
    "open_weights": lambda path: fingerprint(open_weights(path(BASE))),
    "open_finetuned": lambda path: sorted(open_finetuned(path(TUNED), open_weights(BASE))),
    "save_weights": lambda path: save_weights({"w": torch.ones(2)}, path("saved.safetensors")),
    "TaskVector.save": lambda path: TaskVector.load(VECTOR).save(path("saved.tv.safetensors")),
    "TaskVector.load": lambda path: TaskVector.load(path(VECTOR)).norm(),
    "extract": lambda path: extract(path(BASE), path(TUNED), path("made.tv.safetensors")),
    "inspect": lambda path: inspect(path(VECTOR)),
    "inspect a checkpoint": lambda path: inspect(path(BASE)),
    "compare": lambda path: compare([path(VECTOR), path(TUNED)], base=path(BASE)),
    "match": lambda path: match(path(EDITED), [path(VECTOR)], base=path(BASE)),
    "match a folder": lambda path: match(path(EDITED), [path(".")], base=path(BASE)),
    "list_vectors": lambda path: list_vectors(path(".")).bases.keys(),
    "compress": lambda path: compress(path(VECTOR), path("small.tv.safetensors"), encoding="int8"),
    "plan": lambda path: compose(path(BASE), {"a": path(VECTOR)}, "a", path("planned"), plan=True).rows,
    "compose": lambda path: compose(path(BASE), {"a": path(VECTOR)}, "a", path("again.safetensors")),
    "compose to a folder": lambda path: compose(
        path(BASE), {"a": path(TUNED)}, "a", path(f"to-{next(COUNT)}")
    ).num_bytes,
    "verify": lambda path: verify(path(EDITED), base=path(BASE), vectors={"a": path(VECTOR)}),
    "revert": lambda path: revert(
        path(EDITED), output=path(f"back-{next(COUNT)}.safetensors"), undo=path("edited.undo.safetensors")
    ).num_bytes,
    "edit_model": lambda path: edit(path).to_json()["tasks"],
    "EditReport.load": lambda path: EditReport.load(path("run")).to_json(),
    "revisit": lambda path: revisit([path("run")], output=path("page.html")).to_json(),
    "push": lambda path: push(path("run"), "me/x", dry_run=True),
    "open_edit": lambda path: open_edit(path("edit.yaml"))["vectors"],
    "open_run": lambda path: open_run(path("run"), path("edit.yaml")).sliders,
}


def plain(value):
    """What does not depend on when it was computed."""
    fields = asdict(value) if is_dataclass(value) else value
    return {k: v for k, v in fields.items() if k != "seconds"} if isinstance(fields, dict) else fields


@pytest.mark.parametrize("name", CALLS)
def test_a_path_may_be_a_str_or_any_path_like(made, monkeypatch, name):
    class Other:
        """A path that is neither."""

        def __init__(self, text):
            self.text = text

        def __fspath__(self):
            return self.text

    monkeypatch.chdir(made)
    expected = plain(CALLS[name](str))
    for kind in (Path, Other):
        found = plain(CALLS[name](kind))
        assert repr(found) == repr(expected)
