"""What a notebook shows of vectors, comparisons, composed checkpoints and edits."""

import html
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_edit import Net, Task, edit

from tva import EditReport, TaskVector, edit_model, save_weights
from tva.compose.apply import compose
from tva.edit.trainer import Trainer
from tva.report.edit_report import read_report
from tva.vectors.compare import compare
from tva.vectors.inspect import inspect


def words(cell):
    """What a cell says, without its style and pictures."""
    cell = re.sub(r"<(style|svg)\b.*?</\1>", " ", cell, flags=re.DOTALL)
    return html.unescape(" ".join(re.sub(r"<[^>]+>", " ", cell).split()))


def check_cell(cell, most):
    """A notebook stores every cell: it is small, and asks for nothing from anywhere."""
    assert len(cell.encode()) < most
    assert not re.search(r"<script|https?://(?!www\.w3\.org/)|\bon\w+=", cell)
    assert all(len(label) > 30 for label in re.findall(r'<div role="img" aria-label="([^"]*)"', cell))
    assert cell.count("<svg") == cell.count('<div role="img"')


@pytest.fixture(scope="module")
def report(vectors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return edit(vectors, subject_to=["other/accuracy >= 0.1 * base"], folder=folder), folder / "out"


def test_a_vector_shows_its_norms_by_block_and_they_make_up_the_whole(vectors):
    vector = TaskVector.load(vectors["a"])
    cell = vector._repr_html_()
    check_cell(cell, 10_000)
    text = words(cell)
    assert vector.origin.base.digest in text
    assert f"norm {vector.norm():.4g}" in text
    norms = [float(found) for found in re.findall(r"net\.\d+ [\d,]+ ([\d.]+)", text)]
    assert len(norms) == 2
    assert sum(norm**2 for norm in norms) == pytest.approx(vector.norm() ** 2, rel=1e-3)
    longest = max(float(width) for width in re.findall(r"width: ([\d.]+)%", cell))
    assert longest == 100


def test_a_vector_of_many_layers_is_shown_in_bounded_space_and_without_its_paths():
    base = {f"layers.{i}.w": torch.zeros(3) for i in range(200)}
    vector = TaskVector.between(base, {name: tensor + 1 for name, tensor in base.items()})
    check_cell(vector._repr_html_(), 20_000)
    assert "and 177 more blocks 531 23.04" in words(vector._repr_html_())
    nothing = TaskVector.between(base, base)
    assert "200 frozen" in words(nothing._repr_html_())
    named = TaskVector(vector.deltas, origin=replace(vector.origin, task="<script>alert(1)</script>"))
    assert "<script" not in named._repr_html_()


def test_a_comparison_shows_every_cosine(vectors):
    found = compare(list(vectors.values()))
    cell = found._repr_html_()
    check_cell(cell, 80_000)
    assert f"a and b {found.whole.cosines[0][1]:.4g}" in html.unescape(cell)
    assert repr(found) == f"Compared(2 vectors; cosines a, b {found.whole.cosines[0][1]:.3g})"
    paths = [f"{i}.tv.safetensors" for i in range(22)]
    for path in paths:
        TaskVector.load(vectors["a"]).save(path)
    many = compare(paths)
    assert "The matrices of 22 vectors are not drawn" in words(many._repr_html_())
    assert repr(many).endswith(" …)")


def compose_two_layers(**options):
    save_weights({"h.0.w": torch.ones(4), "h.1.w": torch.ones(4)}, "base.safetensors")
    save_weights({"h.0.w": torch.full((4,), 2.0), "h.1.w": torch.ones(4)}, "a.safetensors")
    return compose("base.safetensors", {"a": "a.safetensors"}, "a", "edited.safetensors", **options)


def test_a_composed_checkpoint_shows_the_change_by_group():
    done = compose_two_layers()
    cell = done._repr_html_()
    check_cell(cell, 10_000)
    assert "Checkpoint edited.safetensors" in words(cell)
    assert done.edited.digest in words(cell)
    assert "h.0 1 1 1.00e+00 " in words(cell)
    assert repr(done).startswith("ComposeReport(edited.safetensors, ")


def test_an_inspection_and_a_plan_show_the_rows_of_the_terminal(vectors):
    found = inspect(vectors["a"])
    cell = found._repr_html_()
    check_cell(cell, 10_000)
    assert f"net.0 {found.groups['net.0'].tensors} {found.groups['net.0'].elements:,}" in words(cell)
    assert f"norm {found.whole.norm:.4g}" in repr(found)
    plan = compose_two_layers(scaling_coef=0.5, plan=True)
    cell = plan._repr_html_()
    check_cell(cell, 10_000)
    assert "Plan base + 0.5 · (a)" in words(cell)
    assert "tensors number a shape dtype h.*.w 2 0.5 [4] float32" in words(cell)
    assert "8 parameters; would read 64 B in 1 pass, write 32 B," in plan.summary()
    assert "Nothing was written." in words(cell)
    compose_two_layers()
    assert all(text and "= ," not in text for text in inspect("edited.safetensors").fact_texts().values())


def test_an_edit_shows_the_numbers_of_edit_json_and_its_curve(report):
    found, folder = report
    content = read_report(folder)
    cell = found._repr_html_()
    check_cell(cell, 150_000)
    text = words(cell)
    assert f"✓ Holds {content['verdict']}" in text
    for task, entry in content["tasks"].items():
        assert f"{task} {entry['role']}, accuracy {entry['base']['value']:.1%}" in text
        assert f"{entry['edited']['value']:.1%}" in text
    assert "accuracy against λ" in text
    assert "goes from" in cell
    assert repr(found).startswith(f"EditReport(base + {found.coefficients['scaling_coef']:g} · (a + b); holds; on test")
    assert len(repr(found)) < 250


def test_an_edit_is_read_from_its_folder_as_it_was(report):
    found, folder = report
    again = EditReport.load(folder)
    assert again.to_json() == found.to_json() == read_report(folder)
    assert again._repr_html_() == found._repr_html_()
    content = read_report(folder)
    content["tasks"]["a"]["edited"]["value"] = None  # what was no number
    Path("edit.json").write_text(json.dumps(content))
    assert EditReport.load(".").to_json()["tasks"]["a"]["edited"]["value"] is None
    del content["statistics"]
    Path("edit.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is of another version of tva: it differs in 'statistics'. Make the edit"):
        EditReport.load(".")


def test_outside_a_notebook_an_edit_shows_itself_in_the_terminal(report, capsys):
    report[0].show()
    printed = capsys.readouterr().out
    assert "holds: all constraints hold on test data" in printed
    assert "λ from 0 to 1 on validation data" in printed


def test_in_a_notebook_an_edit_is_shown_once(report, vectors, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr("tva.report.edit_report.in_notebook", lambda: True)
    monkeypatch.setattr("tva.edit.trainer.in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", shown.append)
    report[0].show()
    assert shown == [report[0]]
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    tasks = {"targets": {"a": Task(1)}, "output": "out"}
    assert trainer.edit(Net(), vectors=vectors, recipe="a", scaling_coef=0.5, **tasks).holds
    assert capsys.readouterr().out == ""


def test_an_edit_takes_one_call_from_python_and_says_what_made_it(vectors, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "--seed", "1"])
    options = {"vectors": vectors, "recipe": "a", "targets": {"a": Task(1)}, "scaling_coef": 0.5}
    made = edit_model(Net(), output="out", **options)
    assert capsys.readouterr().out == ""
    assert made.command == "python train.py --seed 1"
    monkeypatch.setattr("sys.argv", ["/somewhere/ipykernel_launcher.py", "-f", "/somewhere/kernel.json"])
    assert "somewhere" not in edit_model(Net(), output="out", **options).command
