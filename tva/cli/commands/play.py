"""The command ``tva play``."""

from __future__ import annotations

import os
import socket
from importlib import resources
from importlib.util import find_spec
from json import dumps
from pathlib import Path

from tva.edit.play.model import Playground
from tva.edit.play.page import HOST, STYLE, Page, build
from tva.report.edit_report import read_report
from tva.report.run_files import CONFIG


def open_run(run: str, edit_config: str | None = None, num_examples: int = 500) -> Playground:
    """Open a finished edit again.

    Args:
        run: Folder of a finished edit.
        edit_config: YAML file with the options it was made with; by default the ``config.yaml``
            that `tva edit` leaves in the folder.
        num_examples: Validation examples a task that every setting is evaluated on.

    Raises:
        FileNotFoundError: The folder holds no edit, or no configuration.
        ValueError: The run holds no evaluations, or was not made with these options.
    """
    content = read_report(Path(run))
    if not content["evaluations"]:
        raise ValueError(f"{run} holds no evaluations, so there is nothing to set beside. Make the edit again.")
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    path = folder / CONFIG if edit_config is None else Path(edit_config)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there: the model and the data of a run are opened by the options it was made with. Give "
            f"them with --edit_config, or make the edit again with `tva edit`, which leaves them there."
        )
    from tva.cli.lightning import open_edit

    opened = open_edit(str(path))
    trainer, model = opened.pop("trainer"), opened.pop("model")
    return Playground(trainer, model, content, num_examples, **opened)


def prepare(run: str, port: int = 8765, edit_config: str | None = None, num_examples: int = 500) -> Page:
    """Open a finished edit for a page where sliders set its coefficients.

    Args:
        run: Folder of a finished edit.
        port: Port of the page, on 127.0.0.1 alone.
        edit_config: YAML file with the options the edit was made with; by default the ``config.yaml``
            that `tva edit` leaves in the folder.
        num_examples: Validation examples a task that every setting is evaluated on.

    Raises:
        FileNotFoundError: The folder holds no edit, or no configuration.
        ValueError: NiceGUI is not installed, the port is in use, or the run cannot be opened.
    """
    if find_spec("nicegui") is None:
        raise ValueError("tva play draws its page with NiceGUI, which is not installed: pip install 'tva[play]'.")
    check_port(port)
    return Page(open_run(run, edit_config, num_examples), run, port)


def check_port(port: int) -> None:
    """Check that a port of this machine is free.

    Raises:
        ValueError: It is not, or is none.
    """
    if not 0 < port < 65536:
        raise ValueError(f"A port is a number from 1 to 65535; found {port}.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ValueError(
                f"Port {port} on {HOST} cannot be taken ({os.strerror(error.errno or 0).lower()}): end what listens "
                f"there, or give another port with --port, such as --port {port % 65535 + 1}."
            ) from error


def serve(result: Page, show: bool = False, json: bool = False) -> None:
    """Serve the page until interrupted.

    Args:
        result: What `prepare` gave.
        show: Open it in a browser.
        json: Print where it is, and its sliders, as JSON in one line.
    """
    from nicegui import ui

    style = (resources.files("tva.report") / "templates" / "style.css").read_text() + STYLE
    url = f"http://{HOST}:{result.port}"
    if json:
        sliders = [vars(slider) for slider in result.playground.sliders]
        print(dumps({"url": url, "run": result.run, "sliders": sliders}, ensure_ascii=False), flush=True)
    else:
        print(f"{url} shows {result.run}; Ctrl-C ends it", flush=True)
    ui.run(
        lambda: build(ui, result, style),
        host=HOST,
        port=result.port,
        title=f"tva play {result.run}",
        dark=None,
        show=show,
        reload=False,
        tailwind=False,
        show_welcome_message=False,
    )
