"""Every block of the README does what it says."""

import contextlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tva import TaskVector, fingerprint, open_weights, save_weights
from tva.cli.main import list_commands, main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = (ROOT / "README.md").read_text()
COMMANDS = list_commands()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


def blocks(language, containing=""):
    return [text for kind, text in BLOCKS if kind == language and containing in text]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files that the README names."""
    monkeypatch.chdir(tmp_path)
    states = [{"w": torch.full((3, 2), float(value)), "b": torch.full((2,), value / 2)} for value in (1, 2, 4)]
    save_weights(states[0], "base.safetensors")
    for name in ("mnist.ckpt", "a.ckpt"):
        torch.save({"state_dict": states[1]}, name)
    for name in ("svhn.tv.safetensors", "b.tv.safetensors"):
        TaskVector.between(states[0], states[2]).save(name)
    return tmp_path


@pytest.mark.parametrize("text", [text for text in blocks("python") if "edit_model" not in text])
def test_python_blocks_run(folder, text, capsys):
    exec(text, {})


def test_an_edit_of_a_newcomers_network(folder, capsys):
    from small_text import write_classifier
    from torch.utils.data import DataLoader

    (text,) = blocks("python", "edit_model")
    assert len(text.splitlines()) <= 12
    write_classifier(folder / "reviews-base")
    write_classifier(folder / "toxic-finetuned", moved=0.05)
    rows = [{"input_ids": torch.tensor([1 + row, 8, 9]), "labels": row % 2} for row in range(20)]

    def evaluate(model, split):
        return [1.0, 0.0] if split == "val" else 0.5

    scope = {"val_loader": DataLoader(rows[:10], 5), "test_loader": DataLoader(rows[10:], 5), "evaluate": evaluate}
    exec(text, scope)
    assert "toxic" in capsys.readouterr().out
    assert list((folder / "edited").glob("*.safetensors"))


def test_the_library_block_computes_what_it_says(folder):
    (text,) = blocks("python", "open_weights")
    scope = {}
    exec(text, scope)
    assert scope["edited"]["w"][0, 0] == pytest.approx(1 + 0.4 * (1 + 3))
    assert scope["inferred"].deltas["w"][0, 0] == pytest.approx(-0.5 + 3 - 1)


@pytest.mark.slow
def test_the_compose_block_runs(folder, capsys):
    (text,) = blocks("bash", "tva compose")
    words = shlex.split(text.replace("\\\n", " "))[1:]
    # a process of its own: this one takes more memory than the block allows
    subprocess.run([sys.executable, "-m", "tva", *words], check=True, capture_output=True)
    assert fingerprint(open_weights("edited.safetensors")) != fingerprint(open_weights("base.safetensors"))


def test_the_edit_block_is_the_demos_forget_config():
    (text,) = blocks("yaml")
    shown, real = yaml.safe_load(text), yaml.safe_load((ROOT / "configs/demo/edit/forget.yaml").read_text())
    for key in ("recipe", "rule", "minimize", "subject_to"):
        assert shown[key] == real[key]


def test_every_command_and_file_named_is_there():
    for text in blocks("bash"):
        for line in text.splitlines():
            words = line.split()
            if words[:1] == ["tva"] and not words[1].startswith("-"):
                assert words[1] in COMMANDS or " ".join(words[1:3]) in COMMANDS
            if words[:1] == ["make"]:
                assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for target in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_option_named_in_the_pages_is_an_option_of_its_command(capsys):
    helps, count = {}, 0
    for page in PAGES:
        text = page.read_text()
        shown = re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL) + re.findall(r"`(tva [^`\n]+)`", text)
        for line in "\n".join(shown).replace("\\\n", " ").splitlines():
            known = (name for name in sorted(COMMANDS, key=len, reverse=True) if re.match(rf"\s*tva {name}\b", line))
            command = next(known, None)
            for option in re.findall(r"(?<=\s)--[a-z_]+", line.split("  #")[0]) if command else ():
                if command not in helps:
                    with contextlib.suppress(SystemExit):
                        main([*command.split(), "--help"])
                    printed = capsys.readouterr()
                    assert printed.out, f"tva {command} --help: {printed.err}"
                    helps[command] = printed.out
                assert re.search(rf"{option}\b", helps[command]), f"{page.name}: {line}"
                count += 1
    assert count > 40


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150
