"""The command ``tva push``."""

from __future__ import annotations

import functools
import os
import re
import sys
from pathlib import Path

from tva.console import make_console, print_line
from tva.edit.push import Pushed, check_edited, push, push_space
from tva.report.run_files import CONFIG

HELP = "upload edited weights, their task vectors and a model card to the Hugging Face Hub"
ORDER = "run repository"


def run(
    run: str | os.PathLike[str],
    repository: str,
    *,
    base_model: str | None = None,
    vectors: bool = True,
    public: bool = False,
    dry_run: bool = False,
    yes: bool = False,
    space: bool = False,
    requirement: str | None = None,
) -> Pushed:
    """Upload edited weights, their task vectors and a model card in one commit, after asking for confirmation.

    With ``space`` a Gradio demo goes up instead, as a Space: base and edited model answer the same input.

    Args:
        run: Folder of a finished edit, with its ``edit.json``; or a folder or file that ``tva compose`` wrote.
        repository: ``owner/name`` on the hub; if it does not exist, it is created as private.
        base_model: ``owner/name`` of the base on the hub, for the card.
        vectors: Also upload the recipe's task vectors, as ``vectors/NAME.tv.safetensors``.
        public: Make a new repository public.
        dry_run: Send nothing; list what would be uploaded.
        yes: Upload without asking.
        space: Write a demo into ``space/`` of the run's folder, from the options that `tva edit` left there, and upload
            that. They name classes, whose code is run: only for runs you trust.
        requirement: The line of the Space's ``requirements.txt`` that installs tva, such as ``tva==1.0`` from an index
            or ``tva @ git+https://…``. By default this tva's own source goes up with the demo.

    Returns:
        What was uploaded.

    Raises:
        ValueError: There are no weights to push, they or a vector are not those that the card describes, or nobody is
            there to be asked.
        OSError: The hub cannot be reached, or refuses.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"A repository on the hub is named OWNER/NAME, as in me/forgetful; found {repository!r}.")
    options = {"base_model": base_model, "vectors": vectors, "public": public}
    send = functools.partial(push, run, repository, **options)
    if requirement and not space:
        raise ValueError("--requirement is what a Space installs tva by. Give --space with it, or leave it out.")
    if space:
        send = functools.partial(push_space, _write_demo(run, base_model, requirement), repository, public=public)
    planned = send(dry_run=True)
    if dry_run:
        return planned
    if not yes:
        _list(planned)
        who = "everybody, if the repository is new" if public else "whoever may read the repository"
        if not sys.stdin.isatty():
            raise ValueError(
                f"These files would be published in {repository}, and nobody is there to be asked. Check them with "
                f"--dry_run, then give --yes."
            )
        print(f"Upload these files to {repository}, for {who}? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            return planned
    return send()


def _write_demo(run: str | os.PathLike[str], base_model: str | None, requirement: str | None) -> Path:
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    check_edited(folder)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder / CONFIG} does not exist: a demo opens the model by the options that `tva edit` leaves there. "
            f"Make the edit with `tva edit`, or push it without --space."
        )
    from tva.cli.commands.play import open_run
    from tva.edit.space import write_space

    playground = open_run(os.fspath(run), num_examples=1)
    return write_space(playground, folder, folder / CONFIG, base_model, requirement)


def _list(result: Pushed) -> None:
    console = make_console()
    package = {name: size for name, size in result.files.items() if name.startswith("tva/")}
    shown = {name: size for name, size in result.files.items() if name not in package}
    if package:
        shown[f"tva/ ({len(package)} files: the source of tva)"] = sum(package.values())
    for name, size in shown.items():
        print_line(console, f"{size:>14,} bytes  {name}")
    for note in result.notes:
        print_line(console, note)


def show(result: Pushed) -> None:
    """Print which files were uploaded."""
    _list(result)
    sent = f"pushed: {result.url}" if result.url else f"nothing was sent; this would go to {result.repository}"
    print_line(make_console(), sent)
