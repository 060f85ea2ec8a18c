"""Reports as CSV, LaTeX and data frames: the same numbers as in edit.json."""

import csv
import io
import json

import pytest
import small_edit
from small_edit import edit

from tva import EditReport
from tva.cli.main import main


@pytest.fixture(scope="module")
def run_folder(vectors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    edit(vectors, folder, subject_to=["other/accuracy >= 0"])
    fit = folder / "fit"
    fit.mkdir()
    (fit / "last.ckpt").touch()
    return folder


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_an_output_that_ends_in_csv_is_csv_and_nothing_else(run_folder, tmp_path, capsys):
    page = (run_folder / "out/report.html").stat().st_mtime_ns
    main(["report", str(run_folder / "out"), "--output", str(tmp_path / "x.csv")])
    tasks = json.loads((run_folder / "out/edit.json").read_text())["tasks"]
    rows = rows_of((tmp_path / "x.csv").read_text())
    assert [row["task"] for row in rows] == list(tasks)
    for row in rows:
        for model in ("base", "edited", "random"):
            assert float(row[model]) == tasks[row["task"]][model]["value"]
            assert float(row[f"{model}_low"]) == tasks[row["task"]][model]["low"]
    assert (run_folder / "out/report.html").stat().st_mtime_ns == page


def test_latex_escapes_what_latex_reads(run_folder, tmp_path, capsys):
    main(["report", str(run_folder / "out"), "--latex", str(tmp_path / "x.tex")])
    text = (tmp_path / "x.tex").read_text()
    assert text.count(r" \\") == 4
    assert r"\%" in text
    assert "% " not in text.replace(r"\%", "")


def test_folders_of_fits_are_left_out_and_named(run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["report", str(run_folder / "out"), str(run_folder / "fit")])
    assert f"left out, for they hold no edit: '{run_folder / 'fit'}'" in capsys.readouterr().out.replace("\n", " ")
    with pytest.raises(SystemExit):
        main(["report", str(run_folder / "fit")])
    assert "No report at" in capsys.readouterr().err


def test_another_ending_is_an_error(run_folder, capsys):
    with pytest.raises(SystemExit):
        main(["report", str(run_folder / "out"), "--output", "x.pdf"])
    assert "--output must end in .html for a page, .csv or .tex for a table; found 'x.pdf'" in capsys.readouterr().err


def test_frames_have_the_numbers_of_the_report(run_folder):
    report = EditReport.load(run_folder / "out")
    frame = report.to_frame()
    assert frame.set_index("task").loc["a", "edited"] == report.tasks["a"].scores["edited"].value
    assert len(report.to_frame("evaluations")) == len(report.evaluations)
    assert list(report.to_frame("constraints")["holds"]) == [True]


vectors = small_edit.vectors  # a fixture
