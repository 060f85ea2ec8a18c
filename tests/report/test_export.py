"""Reports as CSV, LaTeX and data frames: the same numbers as in edit.json."""

import csv
import io
import json
import multiprocessing
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy
import pytest
import small_edit
import vl_convert
from PIL import Image
from small_edit import edit

from tva import EditReport
from tva.cli.main import main
from tva.report.chart_files import chart_files
from tva.report.page import charts_of
from tva.report.render import VERSION, draw, draw_png


@pytest.fixture(scope="module")
def run_folder(vectors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    edit(vectors, subject_to=["other/accuracy >= 0"], folder=folder)
    fit = folder / "fit"
    fit.mkdir()
    (fit / "last.ckpt").touch()
    return folder


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_an_output_that_ends_in_csv_is_csv_and_nothing_else(run_folder, capsys):
    page = (run_folder / "out/report.html").stat().st_mtime_ns
    main(["report", str(run_folder / "out"), "--output", "x.csv"])
    tasks = json.loads((run_folder / "out/edit.json").read_text())["tasks"]
    rows = rows_of(Path("x.csv").read_text())
    assert [row["task"] for row in rows] == list(tasks)
    for row in rows:
        for model in ("base", "edited", "random"):
            assert float(row[model]) == tasks[row["task"]][model]["value"]
            assert float(row[f"{model}_low"]) == tasks[row["task"]][model]["low"]
    assert (run_folder / "out/report.html").stat().st_mtime_ns == page


def test_latex_escapes_what_latex_reads(run_folder, capsys):
    main(["report", str(run_folder / "out"), "--latex", "x.tex"])
    text = Path("x.tex").read_text()
    assert text.count(r" \\") == 4
    assert r"\%" in text
    assert "% " not in text.replace(r"\%", "")


def test_folders_of_fits_are_left_out_and_named(run_folder, capsys):
    main(["report", str(run_folder / "out"), str(run_folder / "fit")])
    assert f"left out, since they hold no edit: '{run_folder / 'fit'}'" in capsys.readouterr().out.replace("\n", " ")
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


@pytest.mark.parametrize(("format", "start"), [("png", b"\x89PNG"), ("svg", b"<svg"), ("pdf", b"%PDF")])
def test_every_chart_of_the_page_is_drawn_into_a_file_of_its_own(run_folder, capsys, format, start):
    main(["report", str(run_folder / "out"), "--charts", "figures", "--format", format])
    page = (run_folder / "out/report.html").read_text()
    names = re.findall(r'<figure class="chart" id="([^"]+)"', page)
    files = {file.name: file.read_bytes() for file in Path("figures").iterdir()}
    assert files.keys() == {f"{name}.{format}" for name in names}
    assert all(content.startswith(start) and len(content) > 2000 for content in files.values())
    assert f"drew {len(names)} charts in figures" in capsys.readouterr().out.replace("\n", "")


def test_a_drawing_says_what_it_shows_and_is_black_on_white(run_folder):
    content = EditReport.load(run_folder / "out").to_json()
    drawings = dict(chart_files({"a/b": content, "c": content}, "svg"))
    assert {name.partition("-curve")[0] for name in drawings} >= {"a-b", "c"}
    assert any(name.startswith("comparison-") for name in drawings)
    for drawing in drawings.values():
        root = ElementTree.fromstring(drawing)
        title, described = root[0], root[1]
        assert root.get("role") == "img"
        assert title.tag.endswith("}title")
        assert len(described.text) > 30
        assert b'fill="white"' in drawing


def test_a_shortened_drawing_shows_the_same_pixels(run_folder):
    drawn = []
    for chart in charts_of(EditReport.load(run_folder / "out").to_json()):
        spec = {**chart.spec, "config": {**chart.spec["config"], "background": "white"}}
        whole = vl_convert.vegalite_to_svg({**spec, "width": 620}, vl_version=VERSION)
        short = draw(spec, chart.name)
        assert len(short) < 0.6 * len(whole)
        pictures = [Image.open(io.BytesIO(vl_convert.svg_to_png(svg))).convert("RGB") for svg in (whole, short)]
        before, after = (numpy.asarray(picture).astype(int) for picture in pictures)
        assert abs(after - before).max() < 128  # edges only: a circle is drawn as one, and coordinates are rounded
        drawn.append(chart.name)
    assert drawn


@pytest.mark.parametrize("option", ["--output", "--csv", "--latex", "--charts"])
def test_nothing_of_a_report_replaces_a_file_of_somebody_else(run_folder, tmp_path, capsys, option):
    name = {"--output": "mine.html", "--csv": "mine.csv", "--latex": "mine.tex", "--charts": "tradeoff.png"}[option]
    drawn = [name for name, _ in chart_files({"run": json.loads((run_folder / "out/edit.json").read_text())})]
    name = drawn[-1] if option == "--charts" else name
    Path(name).write_text("mine")
    given = tmp_path if option == "--charts" else tmp_path / name
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(run_folder / "out"), option, str(given)])
    assert f"{name} is there already" in " ".join(capsys.readouterr().err.split())
    assert [file.name for file in Path().iterdir()] == [name]
    assert Path(name).read_text() == "mine"
    Path(name).unlink()
    for _ in range(2):
        main(["report", str(run_folder / "out"), option, str(given)])


def test_a_report_whose_numbers_are_texts_is_refused_by_name(run_folder, capsys):
    content = json.loads((run_folder / "out/edit.json").read_text())
    for wrong in ({**content, "coefficients": {"scaling_coef": "x"}}, True, {**content, "seed": "BIG"}):
        Path("edit.json").write_text(json.dumps(wrong).replace('"BIG"', "9" * 3000))
        with pytest.raises(SystemExit, match="2"):
            main(["report", "."])
        assert "edit.json is not an edit report" in " ".join(capsys.readouterr().err.split())


def drawn(spec):
    return draw(spec, "chart"), draw_png(spec)


def test_a_process_forked_from_one_that_drew_draws_the_same():
    spec = {"data": {"values": [{"x": 0, "y": 1}, {"x": 1, "y": 3}]}, "mark": "line",
            "encoding": {axis: {"field": axis, "type": "quantitative"} for axis in "xy"}}  # fmt: skip
    here = drawn(spec)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(drawn, (spec,)).get(timeout=300) == here
    assert "<path" in here[0]
