"""Serve the page of ``tva play`` to this machine."""

import functools
import os
import socket
from collections.abc import Iterable
from importlib import resources
from typing import Any

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


class OnlyThisMachine:
    """Middleware that answers only pages of this machine, and tells browsers what they may load.

    Requests with another ``Host`` (DNS rebinding) or another ``Origin`` (a script of another site) get status 403.

    Args:
        app: The application that answers.
        port: Port of the page.
    """

    def __init__(self, app: Any, port: int) -> None:
        self.app = app
        self.hosts = {f"{name}:{port}" for name in (HOST, "localhost")}
        policy = {
            "default-src": "'none'",
            "script-src": "'self' 'unsafe-inline' 'unsafe-eval'",  # Vue compiles its templates in the browser
            "style-src": "'self' 'unsafe-inline'",
            "img-src": "'self' data:",
            "font-src": "'self' data:",
            "connect-src": " ".join(["'self'", *(f"ws://{host}" for host in sorted(self.hosts))]),
            "base-uri": "'none'",
            "form-action": "'none'",
            "frame-ancestors": "'none'",
        }
        self.headers = {
            b"content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()).encode(),
            b"x-frame-options": b"DENY",
            b"x-content-type-options": b"nosniff",
            b"referrer-policy": b"no-referrer",
        }

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
        elif self.is_allowed(scope["headers"]):
            await self.app(scope, receive, functools.partial(self._send, send))
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"This page is for this machine only.\n"})

    def is_allowed(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Return whether a request names this server, and comes from its own page or from no page."""
        hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
        origins = [value.decode("latin-1") for name, value in headers if name == b"origin"]
        return (
            len(hosts) == 1
            and hosts[0] in self.hosts
            and all(origin.removeprefix("http://") in self.hosts for origin in origins)
        )

    async def _send(self, send: Any, message: Any) -> None:
        if message["type"] == "http.response.start":
            kept = [pair for pair in message["headers"] if pair[0].lower() not in self.headers]
            message = {**message, "headers": [*kept, *self.headers.items()]}
        await send(message)


def serve(page: Page, show: bool = False) -> None:
    """Serve a page until interrupted.

    Args:
        page: The page.
        show: Open it in a browser.
    """
    from nicegui import app, ui

    app.add_middleware(OnlyThisMachine, port=page.port)
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
