"""The page of an edit: what it says, its schema and card, and how it looks in a browser without a network."""

import html
import itertools
import json
import math
import re
import warnings
from dataclasses import fields, replace
from importlib import resources
from pathlib import Path

import jsonschema
import pytest
from chromium import DESKTOP, PHONE, browser
from small_edit import Task, edit

from tva.report.edit_report import EditReport, read_report
from tva.report.model_card import MADE_BY, model_card, with_base_model
from tva.report.page import comparison_page, edit_page
from tva.search import Grid

DRAWN = "document.readyState == 'complete' && !document.querySelector('[data-spec]:not(.drawn)')"
KINDS = {
    "searched": {
        "subject_to": ["other/accuracy >= 0.5 * base", "b/accuracy >= 0.1 * base"],
        "confidence": 0.95,
        "diagnostics": ["cosine", "signs", "norms", "linearity", "disentanglement", "blame"],
        "baselines": ["average", "endpoints"],
    },
    "given": {"scaling_coef": 0.5, "controls": {}, "recipe": "a", "targets": {"a": Task(1)}, "random_seed": None},
    "refused": {"scaling_coef": 0.5, "subject_to": ["other/accuracy >= 2"]},
    "infeasible": {"subject_to": ["other/accuracy >= 2"]},
    "two coefficients": {"recipe": "s*a + l*b", "search": Grid(num=3, ranges={"s": [0, 1], "l": [0, 2]})},
    "shared": {"recipe": "s*a + l*b", "search": Grid(num=3, ranges={"s": [0, 1], "l": [0, 1]}, shared=True)},
    "two metrics": {"maximize": None, "minimize": "a/loss", "controls": {}},
}


@pytest.fixture(scope="module")
def runs(vectors, tmp_path_factory):
    """One edit of every kind: folder by name."""
    folders = {}
    for kind, changes in KINDS.items():
        folder = tmp_path_factory.mktemp("run")
        with warnings.catch_warnings():  # the base is wrong nearly always: these edits pass because they gain
            warnings.filterwarnings("ignore", message=".*can be shown to keep.*")
            edit(vectors, **changes, folder=folder)
        folders[kind] = folder / "out"
    return folders


def words(page):
    """What a page says, without its scripts and pictures."""
    page = re.sub(r"<(script|style|svg)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return html.unescape(" ".join(re.sub(r"<[^>]+>", " ", page).split()))


# --- edit.json


@pytest.fixture(scope="module")
def schema():
    return json.loads((resources.files("tva.report") / "edit.schema.json").read_text())


def test_edit_json_is_what_its_schema_says(runs, schema):
    jsonschema.Draft202012Validator.check_schema(schema)
    for folder in runs.values():
        jsonschema.validate(read_report(folder), schema)


def test_the_schema_describes_every_field_and_refuses_others_values(runs, schema):
    assert {field.name for field in fields(EditReport)} | {"verdict"} == schema["properties"].keys()
    assert {*schema["required"], "audits", "means"} == schema["properties"].keys()  # which older reports lack
    content = read_report(runs["searched"])
    for broken in (
        {"holds": "yes"},
        {"rule": "widest"},
        {"evaluations": []},
        {"base": {"path": None, "fingerprint": "7dcf"}},
        {"tasks": {"a": {}}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**content, **broken}, schema)


def test_numbers_that_are_none_are_null_and_the_page_shows_a_dash(vectors, schema):
    report = edit(vectors, scaling_coef=0.5)
    task = report.tasks["a"]
    odd = {**task.scores, "edited": replace(task.scores["edited"], value=math.nan, low=-math.inf, high=math.inf)}
    content = replace(report, tasks={**report.tasks, "a": replace(task, scores=odd)}).to_json()
    assert content["tasks"]["a"]["edited"] == {"value": None, "low": None, "high": None}
    assert json.loads(json.dumps(content, allow_nan=False))["tasks"]["a"]["edited"]["value"] is None
    jsonschema.validate(content, schema)
    assert re.search(r"→ – ", words(edit_page(content)))


# --- what the page says


def test_a_page_and_a_card_say_the_numbers_of_edit_json(runs):
    for kind, folder in runs.items():
        content = read_report(folder)
        html = (folder / "report.html").read_text()
        assert re.search(r"<small>\[[^\]<]*\]\n(p = |chance )", html), kind  # in a line of its own: the table fits
        page = words(html)
        texts = [page] if kind in ("refused", "infeasible") else [page, (folder / "README.md").read_text()]
        for text in texts:
            assert content["recipe"] in text
            assert content["command"] in text
            assert content["base"]["fingerprint"] in text
            for task, entry in content["tasks"].items():
                assert task in text
                share = entry["metric"] == "accuracy"
                for label in {"base", "edited", "finetuned", "random"} & entry.keys():
                    score = entry[label]
                    known = [key for key in ("value", "low", "high") if score[key] is not None]
                    value, *ends = [f"{score[key]:.1%}" if share else f"{score[key]:.4g}" for key in known]
                    within = rf"\s+\[{', '.join(ends)}\]" if ends else ""
                    assert re.search(re.escape(value) + within, text), (kind, task, label)
            for vector in content["vectors"].values():
                assert vector["fingerprint"] in text
        assert all(digest in page for splits in content["data"].values() for digest in splits.values())


def test_the_verdict_is_in_words(runs):
    said = {kind: words((folder / "report.html").read_text()) for kind, folder in runs.items()}
    assert "✓ Holds all constraints hold on test data with 95% confidence" in said["searched"]
    assert "✕ Refused FAILS on test data: other/accuracy >= 2" in said["refused"]
    assert "○ Not checked no constraint was set" in said["given"]
    assert "λ = 0.5 was given, so nothing was searched" in said["given"]
    assert "There is no control task" in said["given"]
    assert "9 choices of s and l were tried" in said["two coefficients"]
    assert "goes from" in said["shared"]
    for kind in ("refused", "infeasible"):
        assert sorted(file.name for file in runs[kind].iterdir()) == ["edit.json", "report.html"]


def test_a_page_without_a_feasible_coefficient_says_so_and_shows_the_closest(runs):
    content = read_report(runs["infeasible"])
    closest = content["coefficients"]["scaling_coef"]
    assert content["edited"] is None
    assert {entry["split"] for entry in content["tasks"].values()} == {"val"}
    assert {split for splits in content["data"].values() for split in splits} == {"val"}
    page = words((runs["infeasible"] / "report.html").read_text())
    assert "No edit; what follows is of the closest coefficient" in page
    verdict = (
        f"none of the 4 coefficients tried meets 'other/accuracy >= 2' on validation data; the closest is {closest:g}"
    )
    assert f"✕ No feasible coefficient NO EDIT: {verdict}" in page
    assert "other/accuracy >= 2: fails" in page
    spec = (runs["infeasible"] / "report.html").read_text()
    assert f"closest: λ = {closest:g}" in spec
    assert "chosen: λ" not in spec
    assert "diamond" not in page
    both = words(comparison_page({kind: read_report(runs[kind]) for kind in ("searched", "infeasible")}))
    assert "No coefficient met the constraints of infeasible: those numbers are of the closest, on validation" in both


def test_every_chart_is_drawn_without_scripts_and_has_its_numbers_in_words(runs):
    counts = {}
    for kind, folder in runs.items():
        page = (folder / "report.html").read_text()
        figures = re.findall(r'<figure class="chart".*?</figure>', page, re.DOTALL)
        counts[kind] = len(figures)
        for figure in figures:
            assert len(re.search(r'aria-label="([^"]*)"', figure)[1]) > 30
            assert "<svg" in figure
            assert figure.count("<tr>") > 1
    # dots, curve, plane, three matrices; "two metrics" has a chart for each of them
    assert counts == {
        "searched": 6,
        "given": 1,
        "refused": 2,
        "infeasible": 3,
        "two coefficients": 3,
        "shared": 3,
        "two metrics": 3,
    }


def test_a_page_is_one_file_without_addresses_and_small(runs):
    page = (runs["searched"] / "report.html").read_text()
    assert len(page.encode()) < 1.5e6
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)""", re.sub(r"<script>.*?</script>", "", page, flags=re.S))
    assert "connect-src" not in page
    assert "default-src 'none'" in page


def test_names_are_shown_and_never_run(runs):
    bad = "<script>window.caught = 1</script><img src=x onerror=window.caught=1>"
    content = json.loads(json.dumps(read_report(runs["searched"])).replace('"a"', json.dumps(bad)))
    content |= {"recipe": bad, "reason": bad, "command": bad}
    page = edit_page(content, [bad])
    assert bad not in page
    assert bad in words(page)


def test_a_screen_reader_gets_captions_headers_and_names(runs):
    for folder in runs.values():
        page = re.sub(r"<(script|style|svg)\b.*?</\1>", " ", (folder / "report.html").read_text(), flags=re.DOTALL)
        tables = re.findall(r"<table.*?</table>", page, flags=re.DOTALL)
        assert len(tables) >= 4
        for table in tables:
            assert re.search(r"<caption[^>]*>[^<]{4,}</caption>", table)
            assert not re.search(r"<th(?! scope=)[ >]", table)
            assert not re.search(r"<th[^>]*></th>", table)
            for row in re.findall(r"<tr>.*?</tr>", table.partition("<tbody>")[2], flags=re.DOTALL):
                assert row.startswith('<tr><th scope="row">')
        assert page.count('<div class="wide" role="group" tabindex="0" aria-label="') == len(tables)
        assert page.count("<h1>") == page.count("<main>") == 1
        headings = [int(level) for level in re.findall(r"<h(\d)", page)]
        assert all(after - before <= 1 for before, after in itertools.pairwise(headings))


# --- in a browser


@pytest.fixture(scope="module")
def tab():
    with browser() as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_browser_draws_every_chart_and_asks_for_nothing(runs, tab, size):
    for kind, folder in runs.items():
        tab.open((folder / "report.html").as_uri(), size, dark=size == PHONE, until=DRAWN)
        assert tab.complaints == [], kind
        assert tab.requests == [], kind
        assert tab.evaluate("document.documentElement.scrollWidth") <= size[0], kind
        count = "document.querySelectorAll('.live svg').length"
        assert tab.evaluate(count) == (folder / "report.html").read_text().count('<figure class="chart"'), kind
        marks = "[...document.querySelectorAll('.live svg')].map(s => s.querySelectorAll('[class*=mark-] path').length)"
        assert min(tab.evaluate(marks)) > 1, kind
        wide = "Math.max(...[...document.querySelectorAll('.live svg')].map(s => s.getBoundingClientRect().right))"
        assert tab.evaluate(wide) <= size[0], kind


@pytest.mark.slow
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_verdicts_and_legends_are_on_the_screen(runs, tab, size):
    for kind, folder in runs.items():
        tab.open((folder / "report.html").as_uri(), size, until=DRAWN)
        verdicts = (
            "[...document.querySelectorAll('td > .passes, td > .fails')].map(e => e.getBoundingClientRect().right)"
        )
        found = tab.evaluate(verdicts)
        assert len(found) == len(read_report(folder)["constraints"]), kind
        assert max(found, default=0) <= size[0], kind
        legend = "[...document.querySelectorAll('.live .role-legend text')].map(e => e.getBoundingClientRect().right)"
        assert max(tab.evaluate(legend)) <= size[0], kind


@pytest.mark.slow
def test_a_browser_runs_no_script_that_is_not_the_pages_and_prints(runs, tab):
    content = read_report(runs["searched"])
    page = Path("page.html").absolute()
    page.write_text(edit_page({**content, "recipe": "</script><script>window.caught = 1</script>"}))
    tab.open(page.as_uri(), until=DRAWN)
    assert tab.evaluate("window.caught") is None
    assert tab.complaints == []
    # the page forbids itself what a foreign script would need
    assert tab.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')") == "refused"
    assert any("Content Security Policy" in complaint for complaint in tab.complaints)
    tab.print(Path("page.pdf"))
    assert Path("page.pdf").stat().st_size > 20_000


@pytest.mark.slow
def test_a_comparison_is_drawn_and_says_in_what_the_runs_differ(runs, tab):
    contents = {kind: read_report(folder) for kind, folder in runs.items()}
    assert "different bases" not in comparison_page(contents)
    other = {**contents["given"], "base": {"path": None, "fingerprint": "f" * 32}}
    page = comparison_page({**contents, "given": other}, [f"{'folder/' * 12}a.tv.safetensors has changed"])
    assert "start from different bases" in page
    assert "a is measured by accuracy and loss" in page
    assert "a was not evaluated on the same test data" not in page
    for size in (DESKTOP, PHONE):
        Path("page.html").write_text(page)
        tab.open(Path("page.html").absolute().as_uri(), size, until=DRAWN)
        assert tab.complaints == []
        assert tab.evaluate("document.documentElement.scrollWidth") <= size[0]


# --- the card


def test_a_card_is_what_the_hub_reads(runs):
    from huggingface_hub import ModelCard

    content = read_report(runs["searched"])
    card = ModelCard((runs["searched"] / "README.md").read_text())
    assert "task-arithmetic" in card.data.tags
    assert card.data.base_model is None  # it was not a repository, and a path on this machine means nothing to others
    results = {result.dataset_name: result for result in card.data.eval_results}
    assert results.keys() == content["tasks"].keys()
    for task, result in results.items():
        edited = content["tasks"][task]["edited"]
        assert result.metric_value == edited["value"]
        assert (result.metric_args["low"], result.metric_args["high"]) == (edited["low"], edited["high"])
    for limit in ("Only 'other' was watched", "not for other data or another fine-tuning run"):
        assert limit in card.text
    named = ModelCard(
        model_card({**content, "base": {**content["base"], "path": "hf://owner/base@main/x.safetensors"}})
    )
    assert (named.data.base_model, named.data.base_model_relation) == ("owner/base", "merge")
    renamed = ModelCard(with_base_model(str(card), "owner/other"))
    assert renamed.data.base_model == "owner/other"
    assert renamed.text == card.text


def test_a_readme_that_tva_did_not_write_is_not_overwritten(vectors):
    Path("out").mkdir()
    Path("out/README.md").write_text("mine")
    with pytest.raises(ValueError, match="README.md, which tva did not write. Move it"):
        edit(vectors, scaling_coef=0.5)
    Path("out/README.md").write_text(f"{MADE_BY} old")
    edit(vectors, scaling_coef=0.5)
    assert "## What it did" in Path("out/README.md").read_text()
