"""A finished edit opened again: what any coefficient does, and the page where sliders set it, in a browser."""

import importlib.util
import re
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from chromium import DESKTOP, PHONE, browser
from small_edit import Net, Task, edit, make_trainer
from small_page import MARKUP, answer, served

from tva.cli.commands import play
from tva.cli.commands.play import open_run
from tva.cli.main import main
from tva.edit.options import EditOptions
from tva.edit.play.model import Example, Playground, Row, View
from tva.edit.play.page import Page, examples_html, heading_html, proof_html, table_html
from tva.edit.play.server import check_port
from tva.report.edit_report import ConstraintReport, read_report
from tva.search import Grid
from tva.vectors.task_vector import TaskVector

RECIPE = "s*a + b"


def options(vectors, **changes):
    return {
        "output": "out",
        "vectors": vectors,
        "maximize": "mean(accuracy)",
        "recipe": RECIPE,
        "targets": {"a": Task(1), "b": Task(2)},
        "controls": {"other": Task(3)},
        "search": Grid(num=3, ranges={"s": [0.0, 1.5]}),
        "subject_to": ["other/accuracy >= 0.2 * base"],
        **changes,
    }


@pytest.fixture(scope="module")
def content(vectors, tmp_path_factory):
    """The ``edit.json`` of an edit with a coefficient of its own."""
    folder = tmp_path_factory.mktemp("edit")
    changes = {name: value for name, value in options(vectors).items() if name not in ("vectors", "output")}
    edit(vectors, **changes, folder=folder)
    return read_report(folder / "out")


@pytest.fixture(scope="module")
def playground(vectors, content):
    return Playground(make_trainer(), Net(), content, EditOptions(**options(vectors)), num_examples=40)


@pytest.fixture(scope="module")
def run(vectors, tmp_path_factory):
    """A run that `tva edit` left."""
    folder = tmp_path_factory.mktemp("run")
    blobs = {name: {"class_path": "small_models.Blobs", "init_args": {"seed": seed}} for seed, name in enumerate("ab")}
    config = {
        "trainer": {"accelerator": "cpu"},
        "model": {"class_path": "small_edit.Net"},
        "vectors": vectors,
        "recipe": "a + b",
        "output": str(folder / "out"),
        "scaling_coef": 0.5,
        "targets": {"a": blobs["a"]},
        "controls": {"b": blobs["b"]},
    }
    (folder / "edit.yaml").write_text(yaml.safe_dump(config))
    main(["edit", "--config", str(folder / "edit.yaml")])
    return folder / "out"


# --- coefficients to metrics


def test_every_setting_scores_as_the_same_model_edited_by_hand(playground, vectors):
    size = 40
    view = playground.at({"scaling_coef": 0.7, "s": 0.3})
    model, loaded = Net(), {name: TaskVector.load(path) for name, path in vectors.items()}
    model.load_state_dict((0.3 * loaded["a"] + loaded["b"]).apply_to(model.state_dict(), 0.7))
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:size]
    for row, seed in zip(view.rows, (1, 2, 3), strict=True):
        inputs, labels = Task(seed).val_dataloader().dataset.dataset[order]
        expected = (model(inputs).argmax(-1) == labels).double().mean().item()
        assert (row.live, row.num_examples, row.metric) == (pytest.approx(expected), size, "accuracy")


def test_a_glance_is_of_the_first_examples_of_the_same_order(playground, vectors, monkeypatch):
    monkeypatch.setattr("tva.edit.play.model.NUM_GLANCED", 16)
    setting = {"scaling_coef": 0.7, "s": 0.4}
    view, whole = playground.glance(setting), playground.at(setting)
    model, loaded = Net(), {name: TaskVector.load(path) for name, path in vectors.items()}
    model.load_state_dict((0.4 * loaded["a"] + loaded["b"]).apply_to(model.state_dict(), 0.7))
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:16]
    for row, seed in zip(view.rows, (1, 2, 3), strict=True):
        inputs, labels = Task(seed).val_dataloader().dataset.dataset[order]
        assert row.live == pytest.approx((model(inputs).argmax(-1) == labels).double().mean().item())
        assert row.num_examples == 16
    assert (view.rough, view.constraints, view.examples) == (True, [], [])
    assert [row.edited for row in view.rows] == [row.edited for row in whole.rows]
    assert "≈ " in table_html(view)
    assert "≈ " not in table_html(whole)
    with pytest.raises(ValueError, match="There is no coefficient 'z' to set"):
        playground.glance({"z": 1.0})


def test_the_base_and_the_chosen_point_are_what_their_settings_score(playground, content):
    chosen, base = playground.at(), playground.at({"scaling_coef": 0.0})
    assert {slider.name: slider.chosen for slider in playground.sliders} == content["coefficients"]
    assert [row.live for row in chosen.rows] == [row.edited for row in chosen.rows]
    assert [row.live for row in base.rows] == [row.base for row in base.rows]
    assert [example.live for example in base.examples] == [example.base for example in base.examples]
    assert [row.live for row in chosen.rows] != [row.live for row in base.rows]


def test_a_constraint_is_checked_at_every_setting(playground, vectors, content):
    strict = options(vectors, subject_to=["a/accuracy >= base + 0.05"])
    played = Playground(make_trainer(), Net(), content, EditOptions(**strict), num_examples=200)
    said = {coef: table_html(played.at({"scaling_coef": coef})) for coef in (0.0, 1.0)}
    assert "FAILS" in said[0.0]
    assert "FAILS" not in said[1.0]
    assert "a/accuracy &gt;= base + 0.05 holds" in said[1.0]


def test_examples_are_named_and_drawn_in_words(playground):
    view = playground.at()
    assert [example.task for example in view.examples] == ["a"] * 6 + ["b"] * 6 + ["other"] * 6
    assert all(example.label in ("0", "1") and example.image is None for example in view.examples)
    assert any(example.base != example.edited for example in view.examples)
    assert examples_html(view).count("<figure>") == 18


def test_settings_from_several_threads_do_not_mix(playground):
    settings = [step / 10 for step in range(10)]
    alone = {coef: playground.at({"scaling_coef": coef}).rows for coef in settings}
    found = {}
    threads = [
        threading.Thread(target=lambda coef=coef: found.update({coef: playground.at({"scaling_coef": coef}).rows}))
        for coef in settings
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_a_run_is_opened_by_what_tva_edit_left_beside_it(run):
    view = open_run(str(run)).at()
    recorded = read_report(run)["tasks"]
    assert [(row.task, row.role) for row in view.rows] == [(task, entry["role"]) for task, entry in recorded.items()]
    assert view.coefs == {"scaling_coef": 0.5}


# --- errors


def test_what_cannot_be_opened_is_said(run, vectors, content):
    with pytest.raises(ValueError, match="There is no coefficient 't' to set; there are scaling_coef, s"):
        Playground(make_trainer(), Net(), content, EditOptions(**options(vectors))).at({"t": 1.0})
    with pytest.raises(ValueError, match="The configuration is of another edit: it has the recipe 'a' "):
        Playground(make_trainer(), Net(), content, EditOptions(**options(vectors, recipe="a")))
    with pytest.raises(ValueError, match="The vector a is not what the run was made with: its fingerprint is "):
        Playground(make_trainer(), Net(), content, EditOptions(**options(vectors | {"a": vectors["b"]})))
    with pytest.raises(ValueError, match="were learned, one for each group of tensors, and no slider sets those"):
        Playground(
            make_trainer(), Net(), content | {"search": {"strategy": "Learned"}}, EditOptions(**options(vectors))
        )
    with pytest.raises(ValueError, match="At least 1 example per task is needed; found num_examples=0"):
        Playground(make_trainer(), Net(), content, EditOptions(**options(vectors)), 0)
    with pytest.raises(FileNotFoundError, match="No report at .*nothing"):
        open_run("nothing")
    Path("edit.json").write_bytes((run / "edit.json").read_bytes())
    with pytest.raises(
        FileNotFoundError, match="config.yaml does not exist: .* Give them with --edit_config, or make the"
    ):
        open_run(".")
    empty = re.sub(r'"evaluations": \[.*?\n \]', '"evaluations": []', (run / "edit.json").read_text(), flags=re.DOTALL)
    Path("edit.json").write_text(empty)
    with pytest.raises(ValueError, match="holds no evaluations, so there is nothing to compare with. Make the edit"):
        open_run(".")


def test_a_port_in_use_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            ValueError, match=f"Port {port} on 127.0.0.1 cannot be taken .*address already in use.*--port"
        ):
            check_port(port)
    with pytest.raises(ValueError, match="A port is a number from 1 to 65535; found 0"):
        check_port(0)


def test_a_missing_library_is_named(run, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("tva.cli.commands.play.find_spec", lambda name: None if name == "nicegui" else found(name))
    with pytest.raises(ValueError, match=r"NiceGUI, which is not installed: pip install 'tva\[play\]'"):
        play.run(str(run))


# --- what others may do


def test_every_string_is_escaped(playground):
    constraint = ConstraintReport(MARKUP, MARKUP, 0.5, 0.4, 0.3, True, MARKUP, True, None)
    row, example = Row(MARKUP, MARKUP, MARKUP, 10, 0.1, 0.2, 0.3), Example(*[MARKUP, None, *[MARKUP] * 4])
    view = View({}, [row], [constraint], [example, replace(example, image=b"png")], 0.1)
    content = {**playground.content, "recipe": MARKUP, "verdict": MARKUP}
    content["coefficients"] = {MARKUP: 1.0}
    stranger = SimpleNamespace(content=content, at=lambda: SimpleNamespace(rows=[row]))
    page = Page(stranger, MARKUP, 1)
    parts = [table_html(view), examples_html(view), heading_html(page), proof_html(content, MARKUP)]
    for part in parts:
        assert "&lt;img" in part
        assert "<img src=x" not in part
        assert not re.findall(r"""=(?:"[^"]*)onerror='""", part)


SOCKET = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}


@pytest.mark.slow
def test_only_pages_of_this_machine_are_answered(run):
    with served(run) as port:
        own, socket_path = f"127.0.0.1:{port}", "/_nicegui_ws/socket.io/?EIO=4&transport="
        status, headers, body = answer(port)
        assert (status, headers["x-frame-options"]) == (200, "DENY")
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; ")
        assert "http:" not in policy
        assert b"cached validation examples" in body
        assert answer(port, Host=f"localhost:{port}")[0] == 200
        assert answer(port, Origin=f"http://{own}")[0] == 200
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1.evil.example:{port}"):
            status, headers, body = answer(port, Host=host)
            assert (status, body) == (403, b"This page is for this machine only.\n")
        for path in ("/", f"{socket_path}polling"):
            for origin in ("http://evil.example", f"https://{own}", "null", "http://127.0.0.1"):
                status, headers, _ = answer(port, path, Origin=origin)
                assert status == 403
                assert "access-control-allow-origin" not in headers
        key = {**SOCKET, "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}
        assert answer(port, f"{socket_path}websocket", Origin="http://evil.example", **key)[0] == 403


# --- in a browser


@pytest.mark.slow
def test_a_slider_in_a_browser_changes_the_numbers_and_nothing_leaves_this_machine(run):
    with browser() as tab, served(run) as port:
        for size in (DESKTOP, PHONE):
            live = "document.querySelector('.live-value')"
            tab.open(f"http://127.0.0.1:{port}/", size, until=live)
            before = tab.evaluate(f"{live}.textContent")
            base = tab.evaluate(f"{live}.parentElement.querySelector('td').textContent")
            assert "cached validation examples" in tab.evaluate("document.body.innerText")
            tab.evaluate("document.querySelector('.q-slider [tabindex], .q-slider[tabindex]').focus()")
            until = time.monotonic() + 300  # a busy page may undo a press while the one before is still answered
            while tab.evaluate(f"{live}.textContent") != base and time.monotonic() < until:
                for kind in ("keyDown", "keyUp"):
                    key = {"key": "ArrowLeft", "code": "ArrowLeft", "windowsVirtualKeyCode": 37}
                    tab.send("Input.dispatchKeyEvent", type=kind, **key)
                time.sleep(0.02)
            assert tab.evaluate(f"{live}.textContent") == base
            assert before != base
            assert tab.complaints == []
            assert all(request.split("/")[2] == f"127.0.0.1:{port}" for request in tab.requests), tab.requests
            assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
            # as axe asks: a language, one main part, and buttons in the color of the text
            assert tab.evaluate("[document.documentElement.lang, document.querySelectorAll('main').length]") == [
                "en",
                1,
            ]
            assert not tab.evaluate("document.querySelector('.q-btn.text-primary')")
