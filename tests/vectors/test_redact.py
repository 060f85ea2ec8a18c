"""Secrets and the home folder are in nothing that may be published."""

import pytest
from tva.callbacks.writer import _json_only

from tva.vectors.redact import HIDDEN, is_secret, public_command, public_path, public_values

SECRET = "hunter2"


@pytest.mark.parametrize(
    "words",
    [
        f"--api_key {SECRET}",
        f"--api_key={SECRET}",
        f"--model.init_args.hub_token={SECRET}",
        f"--trainer.logger.init_args.project={SECRET}",
        f"--trainer.logger.init_args.project {SECRET}",
        f"""--trainer.logger '{{"class_path": "X", "init_args": {{"id": "{SECRET}"}}}}'""",
        f"""--model '{{"init_args": {{"password": "{SECRET}"}}}}'""",
        f"--data.url 'https://host/x?token={SECRET}&b=1'",
        f"--data.client_secret {SECRET}",
        f"--data.API_KEY {SECRET}",
    ],
)
def test_values_of_secret_options_and_loggers_are_hidden(words):
    shown = public_command(f"tva edit {words} --rule best")
    assert SECRET not in shown
    assert HIDDEN in shown
    assert shown.endswith("--rule best")


def test_other_options_stay():
    command = 'tva edit --config c.yaml --key_map \'{"a": "b"}\' --model.max_tokens 5 --trainer.logger true -x'
    assert public_command(command) == command
    assert not is_secret("key_map")
    assert not is_secret("tokenizer")


def test_hyperparameters_are_made_public(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    given = {"lr": 0.1, "api_key": SECRET, "data": {"token": SECRET, "root": "/home/someone/x"}, "number_token": 3}
    kept = public_values(_json_only(given))
    assert kept == {"lr": 0.1, "api_key": HIDDEN, "data": {"token": HIDDEN, "root": "~/x"}, "number_token": 3}


def test_paths_say_nothing_of_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert public_path(str(tmp_path / "home/c")) == "~/c"
    assert public_path(str(tmp_path / "homes/c")) == str(tmp_path / "homes/c")
    assert public_path("a") == "a"
    assert public_command(f"tva edit --base={tmp_path}/home/c") == "tva edit --base=~/c"
