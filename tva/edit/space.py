"""Write a Gradio demo of base beside edited as a folder, which is a Space of the Hugging Face hub."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

import tva.callbacks
from tva.checkpoints import fingerprint, save_weights
from tva.edit.play.demo import BASE, EDITED, FACTS, HEADS, INSIDE, LOCAL, PATHS
from tva.edit.play.model import Playground
from tva.report.model_card import hub_repository
from tva.report.series import formula
from tva.version import __version__

SPACE = "space"  # folder of the demo in that of the edit
GRADIO = "6.31.0"  # of which the demo was run, where no other is installed
SUFFIXES = (".json", ".txt", ".model", ".jinja", ".safetensors", ".bin", ".pt", ".pth", ".ckpt")
APP = '''"""Base and edited model on the same input."""

from pathlib import Path

from tva.edit.play.demo import make_page

page = make_page(Path(__file__).parent)

if __name__ == "__main__":
    page.launch(show_error=True)
'''


def write_space(
    playground: Playground, folder: Path, config: Path, base_model: str | None = None, requirement: str | None = None
) -> Path:
    """Write the demo of an edit into ``folder/space``, replacing an earlier one.

    Args:
        playground: The edit, opened.
        folder: Of the edit.
        config: The options it was made with.
        base_model: ``owner/name`` of the base on the hub, for the Space's card.
        requirement: The line of ``requirements.txt`` that installs tva; by default its source is copied into the demo.

    Returns:
        The folder of the demo.

    Raises:
        ValueError: tva does not know how a user asks the model, or it is not one of tva's.
    """
    path, options = _model_of(playground, config)
    out, staging = folder / SPACE, folder / f".{SPACE}.tmp"
    if out.exists() and not (out / FACTS).exists():
        raise ValueError(f"{out} is there, and is not a demo that tva wrote. Move it away.")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    for option in PATHS:
        if isinstance(options.get(option), str):
            options[option] = _carry(options[option], option, staging)
    base, edited = playground.weights()
    if playground.base_is_given:
        save_weights(base, staging / BASE)
    save_weights(edited, staging / EDITED)
    choices = playground.answers.choices
    heads = {task: choice.head.cpu().contiguous() for task, choice in choices.items() if choice.head is not None}
    if heads:
        save_weights(heads, staging / HEADS)
    facts = {
        **_about(playground.content),
        "input": playground.input,
        "model": {"class_path": path, "init_args": options},
        "tasks": {task: {"class_names": c.class_names, "max_length": c.max_length} for task, c in choices.items()},
        "base": fingerprint(base).digest,
        "edited": fingerprint(edited).digest,
    }
    needs_text = playground.input != "image" or path.endswith(".TransformersModel")
    texts = {
        FACTS: json.dumps(facts, indent=1),
        "app.py": APP,
        "requirements.txt": f"{requirement}\n" if requirement else _copy_package(staging, needs_text),
        "README.md": _card(facts, playground.content, base_model),
    }
    for name, text in texts.items():
        (staging / name).write_text(text, encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    staging.rename(out)
    return out


def _copy_package(staging: Path, needs_text: bool) -> str:
    """Copy the source of tva into the demo; return the requirements that it has, one a line.

    A Space installs its requirements before it has its files, so they cannot name a wheel among these.
    """
    try:
        required = metadata.requires("tva") or []
    except metadata.PackageNotFoundError as error:
        raise ValueError(
            "The demo needs tva's requirements, and tva is not installed here. Install it (pip install .), or give "
            "--requirement, the line of requirements.txt that installs tva."
        ) from error
    for source, target in ((Path(tva.__file__).parent, "tva"), (Path(tva.callbacks.__file__).parent, "tva/callbacks")):
        shutil.copytree(source, staging / target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    extra = re.compile(r"""\s*;\s*extra == ['"](\w[\w-]*)['"]$""")
    wanted = [(extra.sub("", line), extra.search(line)) for line in required]
    return "".join(f"{line}\n" for line, found in wanted if found is None or (needs_text and found[1] == "text"))


def _model_of(playground: Playground, config: Path) -> tuple[str, dict[str, Any]]:
    """Return the class path of an edit's model and its options, without heads, which the demo has apart."""
    given = yaml.safe_load(config.read_text(encoding="utf-8")).get("model")
    path = given.get("class_path", "") if isinstance(given, Mapping) else ""
    if playground.input is None or not path.startswith("tva."):
        raise ValueError(
            f"A demo can be made of tva's classifiers of images or single texts, and of its language models, on tasks "
            f"with class names; found {path or type(playground.answers.model).__name__}. Push the edit without --space."
        )
    return path, {key: value for key, value in (given.get("init_args") or {}).items() if key != "heads"}


def _about(content: Mapping[str, Any]) -> dict[str, str]:
    text = (
        f"Base and edited model on the same input. Verdict on test data: {content['verdict'].rstrip('.')}. One input "
        f"proves nothing. Made by tva {__version__}."
    )
    return {"title": formula(content), "about": text}


def _carry(value: str, option: str, staging: Path) -> str:
    """Copy what an option names into the demo, if it is here; return what the option is there."""
    start = LOCAL if value.startswith(LOCAL) else ""
    source = Path(os.path.expandvars(os.path.expanduser(value.removeprefix(LOCAL))))
    if not source.exists():
        return value
    target = staging / INSIDE / option
    if source.is_file():
        target.mkdir(parents=True)
        shutil.copyfile(source, target / source.name)
        return f"{start}{INSIDE}{option}/{source.name}"
    files = [file for file in source.rglob("*") if file.is_file() and file.suffix in SUFFIXES]
    safe = any(file.suffix == ".safetensors" for file in files)
    for file in files:
        name = file.relative_to(source)
        if not any(part.startswith(".") for part in name.parts) and not (safe and file.suffix == ".bin"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / name)
    return f"{start}{INSIDE}{option}"


def _card(facts: Mapping[str, Any], content: Mapping[str, Any], base_model: str | None) -> str:
    try:
        gradio = metadata.version("gradio")
    except metadata.PackageNotFoundError:
        gradio = GRADIO
    base = base_model or hub_repository(content["base"]["path"])
    head = {
        "title": f"Edited by {content['recipe']}"[:60],
        "sdk": "gradio",
        "sdk_version": gradio,
        "python_version": "3.11",
        "app_file": "app.py",
        "tags": ["task-arithmetic", "task-vectors", "model-editing"],
        **({"models": [base]} if base else {}),
    }
    text = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---\n\n# `{facts['title']}`\n\n{facts['about']}\n"
