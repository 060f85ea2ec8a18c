"""The page of `tva play`, served in a process of its own, and what it answers."""

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from small_models import free_port

MARKUP = "<img src=x onerror='document.title=1'>\""


@contextmanager
def served(run, *first):
    """Serve a run's page, with folders before others on Python's path; give its port."""
    port = free_port()
    # NiceGUI takes a server that knows of pytest for one of its own tests
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [*first, *Path(__file__).parents[:2]]))
    command = [sys.executable, "-m", "tva", "play", str(run), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=run.parent)
    try:
        assert f"http://127.0.0.1:{port} shows" in server.stdout.readline()
        until = time.monotonic() + 300
        while time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield port
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def answer(port, path="/", **headers):
    """Return the status and the headers of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()
