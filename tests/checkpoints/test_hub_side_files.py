"""A base on the hub brings its configuration, tokenizer, code and sub-folders, of the commit of its weights."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub.constants
import huggingface_hub.file_download
import pytest
import torch

from tva import open_weights, save_weights
from tva.compose import compose, verify

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARRIED = ("config.json", "vocab.txt", "modeling_own.py", "1_Pooling/config.json", "2_Dense/config.json")
LEFT = ("pytorch_model.bin", "onnx/model.onnx", "training_args.json", "optimizer.pt", "other/model.safetensors")


class Mirror(BaseHTTPRequestHandler):
    """The end points of downloads and listings. Source: the client's own calls, huggingface_hub 2.4."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        folder, path = self.server.folder, self.path.partition("?")[0]
        names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        data, status = b"{}", 404
        if path.startswith(f"/api/models/owner/net/tree/{COMMIT}"):
            content = [{"type": "file", "path": name, "size": 2, "oid": "0"} for name in names]
            data, status = json.dumps(content).encode(), 200
        elif (name := path.partition("/resolve/")[2].partition("/")[2]) in names:
            data, status = (folder / name).read_bytes(), 200
            self.server.asked.append((name, path.partition("/resolve/")[2].partition("/")[0]))
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hash(data) & 0xFFFFFFFF:x}"')
        self.send_header("X-Error-Code", "EntryNotFound" if status == 404 else "")
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.folder, server.asked = Path("hub"), []
    Thread(target=server.serve_forever, daemon=True).start()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    )
    if hasattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE"):  # a copy, in 0.25
        copy = constants.HUGGINGFACE_CO_URL_TEMPLATE
        monkeypatch.setattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", copy)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "cache")
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("parts", [False, True])
def test_a_base_on_the_hub_comes_out_as_one_in_a_folder(mirror, parts):
    for name in (*CARRIED, *LEFT):
        (mirror.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (mirror.folder / name).write_text("{}")
    save_weights({"w": torch.arange(3.0)}, mirror.folder / "model.safetensors")
    if parts:
        modules = [{"idx": 0, "path": "", "type": "m.Transformer"}, {"idx": 2, "path": "2_Dense", "type": "m.Dense"}]
        (mirror.folder / "modules.json").write_text(json.dumps(modules))
        save_weights({"linear.weight": torch.ones(2)}, mirror.folder / "2_Dense/model.safetensors")
    names = ["0.model.w", "2.linear.weight"] if parts else ["w"]
    save_weights({name: torch.full((3 - n,), 9.0) for n, name in enumerate(names)}, "tuned.safetensors")
    compose("hf://owner/net", {"a": "tuned.safetensors"}, "a", "out")
    written = {path.relative_to("out").as_posix() for path in Path("out").rglob("*") if path.is_file()}
    more = {"modules.json", "2_Dense/model.safetensors"} if parts else set()
    assert written == {"model.safetensors", *CARRIED, *more}
    assert sorted(open_weights("out")) == names
    assert all(bool((tensor == 9).all()) for tensor in open_weights("out").values())
    asked = dict(mirror.asked)
    assert {asked[name] for name in CARRIED} == {COMMIT}
    assert not asked.keys() & {*LEFT}
    assert verify("out", base="hf://owner/net").holds


def test_the_tokenizer_of_a_vector_on_the_hub_is_compared_and_comes_along(mirror):
    rows, base = torch.arange(12.0).view(4, 3), Path("base")
    mirror.folder.mkdir(exist_ok=True)
    base.mkdir()
    save_weights({"embed_tokens.weight": rows + 1}, mirror.folder / "model.safetensors")
    save_weights({"embed_tokens.weight": rows[:3]}, base / "model.safetensors")
    for folder, tokens in ((mirror.folder, "abcd"), (base, "acb")):
        (folder / "config.json").write_text(json.dumps({"vocab_size": len(tokens)}))
        (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    with pytest.raises(ValueError, match="2 of 3 ids in both are other tokens"):
        compose(base, {"a": "hf://owner/net"}, "a", "out", new_rows="keep")
    (base / "vocab.txt").write_text("a\nb\nc\n")
    compose(base, {"a": "hf://owner/net"}, "a", "out", new_rows="keep")
    assert Path("out/vocab.txt").read_text() == "a\nb\nc\nd\n"
    assert json.loads(Path("out/config.json").read_text())["vocab_size"] == 4
