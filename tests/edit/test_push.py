"""Pushing an edit to a hub: a server on this machine that answers as the hub does, and refuses as it does."""

import base64
import io
import json
import runpy
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from small_edit import edit
from small_runs import image_run, language_run, text_run

from tva import TaskVector, fingerprint, open_weights, save_weights
from tva.cli.commands.play import open_run
from tva.cli.main import main
from tva.compose import compose
from tva.edit.play.answers import Sampling
from tva.edit.play.demo import Demo
from tva.edit.push import push
from tva.edit.space import write_space


class Hub(BaseHTTPRequestHandler):
    """The end points that a commit needs. Source: the client's own calls, huggingface_hub 2.4."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server = self.server
        server.calls.append(self.path)
        if self.headers.get("Authorization") != "Bearer right":
            return self._answer(401, {"error": "Invalid credentials in Authorization header"})
        if self.path == "/api/validate-yaml":
            server.card = json.loads(body)["content"]
            return self._answer(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            server.created = json.loads(body)
            return self._answer(200, {"url": f"{server.url}/me/edited", "name": "me/edited"})
        if self.path in (f"/api/{kind}/me/edited/preupload/main" for kind in ("models", "spaces")):
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
            return self._answer(200, {"files": modes})
        if self.path in (f"/api/{kind}/me/edited/commit/main" for kind in ("models", "spaces")):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                else:
                    server.message = entry["value"]["summary"]
            return self._answer(200, {"commitUrl": f"{server.url}/me/edited/commit/1", "commitOid": "1" * 40})
        return self._answer(404, {"error": self.path})

    def _answer(self, status, content):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.files, server.calls, server.created, server.card = {}, [], None, None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "right")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def run(vectors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    edit(vectors, scaling_coef=0.5, folder=folder)
    return folder / "out"


FILES = ["README.md", "edit.json", "edited.safetensors", "report.html", "vectors/a.tv.safetensors"]
FILES += ["vectors/b.tv.safetensors"]


def test_weights_vectors_and_card_go_up_in_one_commit(run, hub, capsys):
    with pytest.raises(SystemExit):
        main(["push", str(run), "me/edited", "--base_model", "owner/base"])
    out, err = capsys.readouterr()
    assert "edited.safetensors" in out  # what would be published is listed before anything is sent
    assert "nobody is there to be asked. Check them with --dry_run, then give --yes" in err
    assert hub.calls == []
    main(["push", str(run), "me/edited", "--base_model", "owner/base", "--yes"])
    assert f"pushed: {hub.url}/me/edited/commit/1" in capsys.readouterr().out
    assert sorted(hub.files) == FILES
    assert "private" in (hub.created.get("visibility"), "private" if hub.created.get("private") else None)
    assert hub.message == "tva edit: a + b"
    assert hub.calls.count("/api/models/me/edited/commit/main") == 1
    for name, data in hub.files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(data)
    edited = fingerprint(open_weights("edited.safetensors")).digest
    assert edited == json.loads(hub.files["edit.json"])["edited"]["fingerprint"]
    assert TaskVector.load("vectors/a.tv.safetensors").norm() > 0
    assert hub.files["README.md"].decode() == hub.card  # the hub was asked whether its metadata is valid
    assert ModelCard(hub.card).data.base_model == "owner/base"


def test_a_dry_run_sends_nothing_and_a_new_repository_can_be_public(run, hub, capsys):
    main(["push", str(run), "me/edited", "--dry_run", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert sorted(found["files"]) == FILES
    assert found["files"]["edited.safetensors"] == (run / "edited.safetensors").stat().st_size
    assert (found["url"], hub.calls) == (None, [])
    main(["push", str(run), "me/edited", "--dry_run"])
    assert "nothing was sent; this would go to me/edited" in capsys.readouterr().out
    push(str(run), "me/edited", public=True, vectors=False)
    assert hub.created.get("visibility", "public") == "public"
    assert not hub.created.get("private")
    assert sorted(hub.files) == FILES[:4]


def test_an_unreachable_or_refusing_hub_is_a_plain_error(run, hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(OSError, match=r"not let this token write to me/edited \(status 401\): log in with `hf auth"):
        push(str(run), "me/edited")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "none")
    with pytest.raises(SystemExit):
        main(["push", str(run), "me/edited", "--yes"])
    assert "log in with `hf auth login`, or set HF_TOKEN" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "right")
    with pytest.raises(OSError, match="'no name' is not a repository's name"):
        push(str(run), "no name")
    with pytest.raises(OSError, match="The hub refused me/other: "):
        push(str(run), "me/other")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="The hub cannot be reached for me/edited"):
        push(str(run), "me/edited")
    assert hub.files == {}


def test_what_the_card_does_not_describe_is_not_pushed(vectors, hub):
    edit(vectors, scaling_coef=0.5, subject_to=["other/accuracy >= 2"])
    with pytest.raises(ValueError, match="has no edited weights to push, for its constraints do not hold: FAILS"):
        push("out", "me/edited")
    edit(vectors, scaling_coef=0.5)
    weights = dict(open_weights("out/edited.safetensors"))
    save_weights({name: 2 * tensor for name, tensor in weights.items()}, "out/edited.safetensors")
    with pytest.raises(ValueError, match="is not what the edit wrote: its fingerprint is .* Make the edit again"):
        push("out", "me/edited")
    Path("out/edited.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="edited.safetensors is missing"):
        push("out", "me/edited")
    with pytest.raises(FileNotFoundError, match="No report at"):
        push(".", "me/edited")
    assert hub.calls == []


@pytest.mark.parametrize("folder", [True, False])
def test_what_compose_wrote_is_pushed_with_a_card_of_its_own(hub, folder):
    base = {"w": torch.arange(4.0), "b": torch.ones(2)}
    Path("base").mkdir()
    save_weights(base, "base/model.safetensors")
    Path("base/config.json").write_text('{"architectures": ["BertForSequenceClassification"]}')
    Path("base/README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# A base\n")
    TaskVector.between(base, {"w": base["w"] + 1, "b": base["b"]}).save("a.tv.safetensors")
    output = "out" if folder else "out.safetensors"
    compose("base", {"a": "a.tv.safetensors"}, "0.5 * a", output, keep_undo=True)
    push(output, "me/edited", base_model="owner/base")
    card = ModelCard(hub.files["README.md"].decode())
    found = card.data.to_dict()
    assert (found["base_model"], found["base_model_relation"]) == ("owner/base", "merge")
    assert "`0.5 * a`" in card.text
    weights = {"model.safetensors", "config.json"} if folder else {"out.safetensors"}
    assert set(hub.files) == {"README.md", "vectors/a.tv.safetensors"} | weights
    if folder:
        assert (found["library_name"], found["pipeline_tag"]) == ("transformers", "text-classification")
        assert (found["license"], found["language"]) == ("apache-2.0", "en")
    changed = {name: tensor + 1 for name, tensor in open_weights(output).items()}
    file = Path(f"{output}/model.safetensors" if folder else output)
    save_weights(changed, file, open_weights(output).metadata)
    with pytest.raises(ValueError, match="is not what tva compose wrote: its fingerprint is"):
        push(output, "me/edited")


def test_a_question_is_asked_and_no_is_an_answer(run, hub, monkeypatch, capsys):
    for answer, sent in (("n", False), ("", False), ("y", True)):
        terminal = io.StringIO(f"{answer}\n")
        terminal.isatty = lambda: True
        monkeypatch.setattr("sys.stdin", terminal)
        main(["push", str(run), "me/edited", "--public"])
        out, err = capsys.readouterr()
        assert "Upload these files to me/edited, for everybody, if the repository is new? [y/N]" in err
        assert ("pushed: " in out, bool(hub.files)) == (sent, sent)


# --- a demo as a Space

DEMO = ["README.md", "app.py", "demo.json", "edited.safetensors"]
TEXT = "it was a good film"


@pytest.mark.slow
def test_a_space_of_a_text_classifier_goes_up_and_answers_as_play_does(hub, tmp_path, capsys):
    run = text_run(tmp_path)
    main(["push", str(run), "me/edited", "--space", "--dry_run"])
    assert f"try it first: python {run / 'space/app.py'}" in capsys.readouterr().out
    assert hub.calls == []
    main(["push", str(run), "me/edited", "--space", "--yes", "--base_model", "owner/base"])
    assert (hub.created["type"], hub.created["sdk"]) == ("space", "gradio")
    assert "private" in (hub.created.get("visibility"), "private" if hub.created.get("private") else None)
    model = [f"model/name/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")]
    assert sorted(hub.files)[: len(DEMO) + 4] == [*DEMO, "heads.safetensors", *model]
    head = yaml.safe_load(hub.files["README.md"].decode().split("---")[1])
    assert (head["sdk"], head["app_file"], head["models"]) == ("gradio", "app.py", ["owner/base"])
    required = hub.files["requirements.txt"].decode().splitlines()
    assert any(line.startswith("torch>=") for line in required)
    assert any(line.startswith("transformers>=") and "extra" not in line for line in required)
    assert not any(line.startswith(("tva", "pytest", "peft")) for line in required)
    code = "import tva.callbacks, tva.edit.play.demo; print(tva.__file__, tva.callbacks.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=run / "space", capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(run / f"space/tva/{part}__init__.py") for part in ("", "callbacks/")]
    assert {"tva/models/tiny/tva-tiny.json", "tva/py.typed"} <= set(hub.files)
    assert not any(name.endswith(".pyc") for name in hub.files)
    (tmp_path / "bert").rename(tmp_path / "gone")  # the demo has all it needs
    demo = Demo(run / "space")
    (tmp_path / "gone").rename(tmp_path / "bert")
    for task, rows in open_run(str(run)).answer(TEXT).classes.items():
        base, edited = demo.answer(TEXT, task)
        assert [(name, base[name], edited[name]) for name in base] == [tuple(row) for row in rows]
        assert base != edited
    with pytest.raises(ValueError, match="Type a text of 1 to 4,000 characters; found none"):
        demo.answer(" ")
    weights = dict(open_weights(run / "space/edited.safetensors"))
    save_weights({name: 2 * tensor for name, tensor in weights.items()}, run / "space/edited.safetensors")
    with pytest.raises(ValueError, match="The edited weights are not those that the demo was written with"):
        Demo(run / "space")


@pytest.mark.slow
def test_a_space_continues_prompts_and_classifies_images(hub):
    runs = {}
    for kind, make in (("prompts", language_run), ("images", image_run)):
        Path(kind).mkdir()
        runs[kind] = make(Path(kind))
        main(["push", str(runs[kind]), "me/edited", "--space", "--dry_run", "--requirement=tva==1.0"])
        assert (runs[kind] / "space/requirements.txt").read_text() == "tva==1.0\n"
        assert not (runs[kind] / "space/tva").exists()
    greedy = Sampling(6, 0.0)
    texts = Demo(runs["prompts"] / "space").answer(TEXT, None, 6, 0.0)
    assert texts == open_run(str(runs["prompts"])).answer(TEXT, sampling=greedy).texts
    demo, image = Demo(runs["images"] / "space"), Image.open("images/1.png")
    playground = open_run(str(runs["images"]))
    for found, weights in zip(demo.answer(image), playground.weights(), strict=True):
        playground.answers.model.load_state_dict(weights)
        assert found == playground.answers.classes(image)["images"]
        assert sum(found.values()) == pytest.approx(1)
    with pytest.raises(ValueError, match="Choose an image first"):
        demo.answer(None)
    pytest.importorskip("gradio", reason="the extra tva[space] is not installed")
    for run in runs.values():
        assert runpy.run_path(str(run / "space/app.py"))["page"].title == demo.title


def test_a_demo_of_what_nobody_knows_how_to_ask_is_refused_by_name(run, hub, capsys):
    with pytest.raises(SystemExit):
        main(["push", str(run), "me/edited", "--space"])
    assert (
        "config.yaml does not exist: a demo opens the model by the options that `tva edit`" in capsys.readouterr().err
    )
    config = Path("config.yaml")
    config.write_text("model: {class_path: mine.Net}")
    for given in (None, "image"):  # a class of one's own is not on the hub's machine
        with pytest.raises(ValueError, match="A demo can be made of tva's classifiers .*; found mine.Net. Push the"):
            write_space(SimpleNamespace(input=given, answers=None), Path(), config)
    Path("space").mkdir()
    config.write_text("model: {class_path: tva.models.CausalLM}")
    with pytest.raises(ValueError, match="space is there, and is not a demo that tva wrote. Move it away"):
        write_space(SimpleNamespace(input="prompt", answers=None), Path(), config)
    Path("demo.json").write_text(
        json.dumps({"input": "text", "title": "", "about": "", "tasks": {}, "model": {"class_path": "os.system"}})
    )
    with pytest.raises(ValueError, match="A demo holds a model of tva; found os.system"):
        Demo(Path())
    assert not Path(Path("space/app.py")).exists()


def test_a_push_reaches_the_hub_that_is_configured_and_nothing_else(run, hub):
    seen = []
    watching = [True]

    def watch(event, given):
        if watching and event in ("socket.connect", "socket.sendto"):
            seen.append(tuple(given[1][:2]))

    sys.addaudithook(watch)  # which cannot be taken away again
    try:
        main(["push", str(run), "me/edited", "--yes"])
    finally:
        watching.clear()
    assert set(seen) == {("127.0.0.1", hub.server_port)}


def test_a_link_out_of_the_folder_is_not_pushed(run, hub, capsys):
    """A folder from somebody else may list any name in it as a file of the edit."""
    shutil.copytree(run, "run")
    Path("secret.txt").write_text("mine")
    Path("run/notes.txt").symlink_to("../secret.txt")
    content = json.loads(Path("run/edit.json").read_text())
    content["edited"]["files"].append("notes.txt")
    Path("run/edit.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="2"):
        main(["push", "run", "me/edited", "--yes"])
    assert "is a link to a file outside of" in " ".join(capsys.readouterr().err.split())
    assert hub.calls == []
