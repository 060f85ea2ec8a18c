"""The pages on editing any model, table and project: their blocks run, one after the other, in one folder."""

import re
from pathlib import Path

import torch

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
