"""Finished edits opened again: pages rebuilt from edit.json alone, side by side, and what has changed since."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_edit import Net, edit

from tva import TaskVector
from tva.cli.main import main
from tva.edit.runs import changed_inputs, revisit
from tva.report.edit_report import read_report


@pytest.fixture
def run(vectors):
    """An edit with inputs of its own."""
    own = {name: str(shutil.copy2(path, f"{name}.tv.safetensors")) for name, path in vectors.items()}
    base = {name.removeprefix("net."): value for name, value in Net().state_dict().items()}
    for path in own.values():  # with the network's own names, which the model's begin with "net."
        moved = {name.removeprefix("net."): delta for name, delta in TaskVector.load(path).deltas.items()}
        TaskVector.between(base, {name: value + moved[name] for name, value in base.items()}).save(path)
    edit(own, scaling_coef=0.5)
    return Path("out")


def test_a_rebuilt_page_is_the_one_that_the_edit_wrote(run):
    before = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    for given in (run, run / "edit.json"):
        assert revisit([str(given)]).pages == [run / "report.html"]
        assert (run / "report.html").read_bytes() == before
    assert revisit([str(run)], "elsewhere.html").pages == [Path("elsewhere.html")]


def test_inputs_that_changed_since_are_said_at_the_top(run):
    path = Path("a.tv.safetensors")
    vector, content = TaskVector.load(path), read_report(run)
    os.utime(path, (1, 1))
    assert changed_inputs(content) == []  # another time, but the same contents
    (2 * vector).save(path)
    (notice,) = changed_inputs(content)
    assert notice.startswith(f"The vector a has changed since this edit: {path} is now ")
    assert f"was {content['vectors']['a']['content']}" in notice
    assert revisit([str(run)]).notices == {"out": [notice]}
    page = (run / "report.html").read_text()
    assert page.index('role="alert"') < page.index(notice.split(":")[0]) < page.index('class="formula"')
    path.unlink()
    assert changed_inputs(content) == []  # it is not here, so nothing is known


def test_several_runs_lie_side_by_side(run, capsys):
    other = shutil.copytree(run, Path("other"))
    content = read_report(other)
    content["base"]["fingerprint"] = "f" * 32
    (other / "edit.json").write_text(json.dumps(content))
    main(["report", str(run), str(other), "--output", "both.html"])
    said = capsys.readouterr().out
    assert "note: These edits start from different bases (out: " in said
    assert "wrote both.html" in said
    assert "start from different bases" in Path("both.html").read_text()
    main(["report", str(run), str(other), "--output", "both.html", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["runs"]["other"] == content
    assert found["pages"][-1] == "both.html"


def test_mistakes_are_reported(run, capsys):
    with pytest.raises(FileNotFoundError, match="No report at .*nowhere: a run's folder, or its edit.json"):
        revisit(["nowhere"])
    with pytest.raises(FileNotFoundError, match="No report at .*The runs below it are .*out"):
        revisit(["."])
    Path("begun").mkdir()
    Path("begun.evaluations.jsonl").touch()
    with pytest.raises(FileNotFoundError, match="Its edit did not finish; the same command resumes from"):
        revisit(["begun"])
    with pytest.raises(ValueError, match="A run is given twice"):
        revisit([str(run), str(run)])
    odd = Path("odd.json")
    odd.write_text("no")
    with pytest.raises(ValueError, match="is not an edit report: .*is not valid JSON"):
        revisit([str(odd)])
    odd.write_text('{"recipe": "a"}')
    with pytest.raises(ValueError, match="it lacks 'tasks', 'evaluations', 'holds', or has .* Give a run that `tva"):
        revisit([str(odd)])
    for text in ("null", "[]", "3", "[" * 100_000, '{"recipe": 1, "tasks": [], "evaluations": {}, "holds": "yes"}'):
        odd.write_text(text)
        with pytest.raises(ValueError, match="odd.json is not an edit report"):
            revisit([str(odd)])
    odd.write_text(json.dumps({**read_report(run), "evaluations": []}))
    with pytest.raises(ValueError, match="odd.json holds no evaluations, so there is nothing to draw"):
        revisit([str(odd)])
    with pytest.raises(SystemExit):
        main(["report", "nowhere"])
    assert "tva: error: No report at" in capsys.readouterr().err


@pytest.mark.slow
def test_rebuilding_needs_neither_lightning_nor_the_model(run):
    code = (
        "import sys; from tva.cli.main import main; main(sys.argv[1:]);"
        "print(*{'lightning', 'open_clip', 'scipy.stats', 'datasets'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code, "report", str(run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"wrote {run / 'report.html'}\n\n")
