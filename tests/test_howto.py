"""The pages on editing any model, table and project: their blocks run, one after the other, in one folder."""

import json
import re
import shlex
import sys
from pathlib import Path

import pandas
import pytest
import torch
from small_text import reviews, write_classifier

from tva.cli.main import main

PAGES = Path(__file__).parents[1] / "docs/howto"


def blocks(page, *languages):
    found = re.findall(r"```(\w+)\n(.*?)```", (PAGES / page).read_text(), flags=re.DOTALL)
    return [text for language, text in found if language in languages]


def test_any_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope = {}
    for text in blocks("any-model.md", "python"):
        exec(text, scope)
    assert scope["report"].verdict.endswith("'size': one number, for which no interval is claimed")
    assert scope["report"].tasks["task"].scores["edited"].low is not None
    assert (tmp_path / "edited/edit.json").exists()


def run_page(page, folder, monkeypatch):
    """Write the files of a page that begin with their name, and run its commands."""
    monkeypatch.chdir(folder)
    for text in blocks(page, "python", "yaml"):
        name = re.match(r"# (\S+)\n", text)[1]
        (folder / name).write_text(text)
    for line in "".join(blocks(page, "bash")).splitlines():
        main(shlex.split(line)[1:])


def test_own_project(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    run_page("../tutorials/own-project.md", tmp_path, monkeypatch)
    sys.modules.pop("my_project", None)
    report = json.loads((tmp_path / "edited/edit.json").read_text())
    tasks = report["tasks"]
    assert tasks["side"]["edited"]["value"] > tasks["side"]["base"]["value"] + 0.1
    assert tasks["side"]["edited"]["low"] is not None
    assert report["holds"] == all(constraint["holds"] for constraint in report["constraints"])
    assert report["model"] == "my_project.Net"


@pytest.mark.slow
def test_any_table(tmp_path, monkeypatch, capsys):
    write_classifier(tmp_path / "bert")
    found = reviews(60)
    names = ["negative", "positive"]
    columns = {"review": found["text"], "sentiment": [names[label] for label in found["label"]]}
    columns["part"] = ["train"] * 30 + ["val"] * 15 + ["test"] * 15
    pandas.DataFrame(columns).to_csv(tmp_path / "reviews.csv", index=False)
    text = (PAGES / "any-table.md").read_text().replace("max_epochs: 3", "max_epochs: 1\n  accelerator: cpu")
    (tmp_path / "any-table.md").write_text(
        text.replace("output: edited", "output: edited\nallow_shared_examples: true")
    )
    monkeypatch.setattr(sys.modules[__name__], "PAGES", tmp_path)
    run_page("any-table.md", tmp_path, monkeypatch)
    report = json.loads((tmp_path / "edited/edit.json").read_text())
    assert report["vectors"]["reviews"]["path"] == "runs/reviews/last.tv.safetensors"
    assert {entry["metric"] for entry in report["evaluations"]} == {"accuracy", "loss", "f1_score"}


def test_edit_hugging_face(tmp_path, monkeypatch, capsys):
    found = reviews(60)
    columns = {"review": found["text"], "sentiment": [["negative", "positive"][label] for label in found["label"]]}
    columns["part"] = ["train"] * 20 + ["val"] * 20 + ["test"] * 20
    pandas.DataFrame(columns).to_csv(tmp_path / "reviews.csv", index=False)
    write_classifier(tmp_path / "base")
    write_classifier(tmp_path / "toxic", moved=0.1)
    monkeypatch.chdir(tmp_path)
    (yaml,) = blocks("edit-hugging-face.md", "yaml")
    (tmp_path / "edit.yaml").write_text(yaml + "allow_shared_examples: true\ntrainer: {accelerator: cpu}\n")
    for line in "".join(blocks("edit-hugging-face.md", "bash")).splitlines():
        main(shlex.split(line)[1:])
    scope = {}
    for text in blocks("edit-hugging-face.md", "python"):
        exec(text, scope)
    assert scope["tokenizer"]("good film")["input_ids"]
    files = {path.name for path in (tmp_path / "edited").iterdir()}
    assert files >= {"config.json", "tokenizer.json", "model.safetensors", "edit.json", "README.md"}
    assert (tmp_path / "calmer/config.json").exists()
