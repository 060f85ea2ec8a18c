"""Whatever fails, a command ends with a message, the right status and nothing that a terminal would obey."""

import json
import struct
from pathlib import Path

import pytest
import small_cli
import torch
from safetensors.torch import save_file

from tva import TaskVector, save_weights
from tva.cli.failures import describe
from tva.cli.main import main
from tva.console import printable
from tva.errors import some
from tva.search.optuna import Optuna


def run(capfd, *words):
    status = small_cli.run(*words)
    found = capfd.readouterr()
    return status, found.out, found.err


def broken(*_, **__):
    raise KeyError("nothing has this key")


def test_a_bug_is_called_one_with_a_status_of_its_own(capfd, monkeypatch):
    monkeypatch.setattr("tva.data.presets.PRESETS", {"a": None})
    status, out, err = run(capfd, "data")
    assert (status, out) == (3, "")
    assert err.startswith("tva: error: this is a bug in tva: AttributeError: ")
    assert "(data.py, line " in err
    assert "TVA_DEBUG=1 shows the traceback" in err
    assert "Traceback" not in err
    monkeypatch.setenv("TVA_DEBUG", "1")
    with pytest.raises(AttributeError):
        main(["data"])


def test_what_tva_raises_on_purpose_is_its_message_and_nothing_more(capfd):
    status, _, err = run(capfd, "inspect", Path("nothing"))
    assert (status, err.count("\n")) == (2, 1)
    assert "TVA_DEBUG" not in err  # it would show nothing that helps


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (ValueError("it is so"), 2, "it is so"),
        (OSError(28, "No space left on device", "out"), 2, "No space left"),
        (MemoryError(), 2, "MemoryError"),
        (KeyError("x"), 3, "this is a bug in tva: KeyError: 'x'"),
        (RecursionError("too deep"), 3, "this is a bug in tva: RecursionError"),
        (ZeroDivisionError(), 3, "this is a bug in tva: ZeroDivisionError"),
    ],
)
def test_the_kind_of_an_exception_decides(error, status, words):
    message, found = describe(error)
    assert (found, words in message) == (status, True)


HOSTILE = "\x1b]0;owned\x07[/b][red]x\r\x1b[2J"


@pytest.fixture
def hostile(tmp_path):
    """Files whose names of tensors, and values, hold control characters and markup."""
    base = {f"{HOSTILE}.{part}": torch.ones(4) for part in ("w", "b\nforged  1  1")}
    tuned = {name: value + 1 for name, value in base.items()}
    save_file(base, "base.safetensors")
    save_file(tuned, "tuned.safetensors")
    save_file({**tuned, f"{HOSTILE}.more": torch.ones(2)}, "more.safetensors")
    TaskVector.between(base, tuned).save("a.tv.safetensors")
    return tmp_path


COMPOSE = ("compose", "--base", "base.safetensors", "--vectors.a", "a.tv.safetensors", "--recipe", "a")


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "base.safetensors", "--by", "tensor"),
        ("inspect", "a.tv.safetensors", "--by", "tensor"),
        ("compare", "a.tv.safetensors", "tuned.safetensors", "--base", "base.safetensors", "--by", "tensor"),
        (*COMPOSE, "--output", "out.safetensors", "--plan"),
        (*COMPOSE, "--output", "out.safetensors"),
        ("extract", "--base", "base.safetensors", "--finetuned", "more.safetensors", "--output", "b.tv.safetensors"),
        ("compress", "a.tv.safetensors", "--output", "small.tv.safetensors", "--encoding", "int8"),
        ("inspect", f"no{HOSTILE}thing"),
        (f"no{HOSTILE}command",),
    ],
)
def test_names_from_files_never_reach_the_terminal_raw(hostile, capfd, words):
    status, out, err = run(capfd, *words)
    assert status in (0, 2)
    assert not [character for character in out + err if ord(character) < 32 and character != "\n"]
    if status == 0 and words[0] in ("inspect", "compose") and "output" not in words:
        assert r"\x1b]0;owned\x07[/b][red]x" in out
        assert "\nforged" not in out


def test_json_says_them_as_they_are(hostile, capfd):
    status, out, _ = run(capfd, "inspect", "base.safetensors", "--by", "tensor", "--json")
    assert (status, f"{HOSTILE}.w" in json.loads(out)["groups"]) == (0, True)
    assert "\x1b" not in out


def test_a_long_value_from_a_file_is_cut(capfd):
    save_weights({"w": torch.ones(2)}, "base.safetensors")
    TaskVector.between({"w": torch.ones(2)}, {"w": torch.zeros(2)}).save("a.tv.safetensors", encoding="int8")
    data = Path("a.tv.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"]["tva.encoding"] = "x" * 100_000
    for seal in ("tva.content_fingerprint", "tva.header_fingerprint"):  # which would be in the way
        del header["__metadata__"][seal]
    text = json.dumps(header).encode()
    Path("a.tv.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    for words in (("inspect", "a.tv.safetensors"), (*COMPOSE, "--output", "out.safetensors")):
        _, out, err = run(capfd, *words)
        assert len(out + err) < 3000


def test_text_is_shown_escaped_and_cut():
    assert printable("a\x1b[31m\u202eb\n") == r"a\x1b[31m\u202eb\n"
    assert printable("a\nb", newline="\n") == "a\nb"
    assert printable("x" * 400) == "x" * 299 + "…"
    assert some(["y" * 300]) == f"'{'y' * 100}…{'y' * 99}'"


def test_a_package_of_an_extra_that_is_missing_is_named_with_the_extra(monkeypatch):
    error = ModuleNotFoundError("No module named 'transformers.models'", name="transformers.models")
    assert describe(error) == ("This needs transformers, which is not installed: pip install 'tva[text]'.", 2)
    monkeypatch.setattr("tva.search.optuna.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"This search needs optuna: pip install 'tva\[optuna\]'"):
        Optuna({"a": (0.0, 1.0)})
