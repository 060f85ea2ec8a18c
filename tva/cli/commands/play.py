"""The command ``tva play``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tva.edit.options import EditOptions
from tva.edit.play.model import Playground
from tva.edit.play.page import Page
from tva.edit.play.server import address, check_port, serve
from tva.report.edit_report import read_report
from tva.report.run_files import CONFIG

HELP = "open a finished edit on a local page where sliders set its coefficients"
ORDER = "run"


def run(run: str, port: int = 8765, edit_config: str | None = None, num_examples: int = 500) -> Page:
    """Open a finished edit on a local page where sliders set its coefficients.

    Args:
        run: Folder of a finished edit.
        port: Port of the page, which only this machine can reach (127.0.0.1).
        edit_config: YAML file with the options of the edit; by default the ``config.yaml`` that `tva edit` saves in the
            folder. It names classes, whose code is run: open only runs that you trust.
        num_examples: Number of validation examples per task on which every setting is evaluated.

    Raises:
        FileNotFoundError: The folder holds no edit, or no configuration.
        ValueError: NiceGUI is not installed, the port is in use, or the run cannot be opened.
    """
    if find_spec("nicegui") is None:
        raise ValueError("tva play draws its page with NiceGUI, which is not installed: pip install 'tva[play]'.")
    check_port(port)
    return Page(open_run(run, edit_config, num_examples), run, port)


def open_run(run: str, edit_config: str | None = None, num_examples: int = 500) -> Playground:
    """Open a finished edit again.

    Args:
        run: Folder of a finished edit.
        edit_config: As in `run`.
        num_examples: As in `run`.

    Raises:
        FileNotFoundError: The folder holds no edit, or no configuration.
        ValueError: The run holds no evaluations, or was not made with these options.
    """
    content = read_report(Path(run))
    if not content["evaluations"]:
        raise ValueError(f"{run} holds no evaluations, so there is nothing to compare with. Make the edit again.")
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    path = folder / CONFIG if edit_config is None else Path(edit_config)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: the model and the data of a run are opened by the options it was made with. Give "
            f"them with --edit_config, or make the edit again with `tva edit`, which leaves them there."
        )
    from tva.cli.lightning import open_edit

    opened = open_edit(path)
    trainer, model = opened.pop("trainer"), opened.pop("model")
    return Playground(trainer, model, content, EditOptions(**opened), num_examples)


def show(result: Page) -> None:
    """Print where the page is."""
    print(f"{address(result)} shows {result.run}; Ctrl-C ends it", flush=True)


def to_json(result: Page) -> dict[str, Any]:
    """Return where the page is, and its sliders."""
    sliders = [vars(slider) for slider in result.playground.sliders]
    return {"url": address(result), "run": result.run, "sliders": sliders}


def finish(result: Page, show: bool = False) -> None:
    """Serve the page until interrupted.

    Args:
        result: What `run` returned.
        show: Open the page in a browser.
    """
    serve(result, show)
