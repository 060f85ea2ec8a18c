"""Serve the page of ``tva play`` to this machine."""

from __future__ import annotations

import os
import socket
from importlib import resources

from tva.edit.play.page import HOST, STYLE, Page, build


def address(page: Page) -> str:
    """Return the URL of a page."""
    return f"http://{HOST}:{page.port}"


def check_port(port: int) -> None:
    """Check that a port of this machine is free.

    Raises:
        ValueError: It is not, or it is not a port.
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


def serve(page: Page, show: bool = False) -> None:
    """Serve a page until interrupted.

    Args:
        page: The page.
        show: Open it in a browser.
    """
    from nicegui import ui

    style = (resources.files("tva.report") / "templates" / "style.css").read_text() + STYLE
    ui.run(
        lambda: build(ui, page, style),
        host=HOST,
        port=page.port,
        title=f"tva play {page.run}",
        dark=None,
        show=show,
        reload=False,
        tailwind=False,
        show_welcome_message=False,
    )
