"""Headless Chromium for tests, spoken to over a pipe in its own protocol: what a page logs, asks for, and looks like.

Source: https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
DESKTOP, PHONE = (1280, 900), (390, 844)


@contextmanager
def browser():
    """Start a browser; the test is skipped where there is none."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    to_browser, from_test = os.pipe()
    to_test, from_browser = os.pipe()
    # the browser reads from file descriptor 3 and writes to 4
    command = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--hide-scrollbars"]
        process = subprocess.Popen(
            ["bash", "-c", command, program, *options, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (to_browser, from_browser):
            os.close(end)
        try:
            yield Browser(from_test, to_test)
        finally:
            process.terminate()
            process.wait(120)
            os.close(from_test)
            os.close(to_test)


class Browser:
    """One tab.

    Attributes:
        complaints: Errors and warnings of its console, and exceptions that nothing caught.
        requests: Addresses it asked for, but those of the page itself and of data in it.
    """

    def __init__(self, write, read, timeout_s=300):
        self.write, self.read, self.timeout_s = write, read, timeout_s
        self.pending, self.number, self.session = b"", 0, None
        self.complaints, self.requests = [], []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method, **parameters):
        """Call a method and give its result; events that come meanwhile are noted."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._receive()
            if found.get("id") == self.number:
                assert "error" not in found, found
                return found["result"]

    def _receive(self):
        until = time.monotonic() + self.timeout_s
        while b"\0" not in self.pending:
            ready, _, _ = select.select([self.read], [], [], max(0.0, until - time.monotonic()))
            assert ready, "the browser does not answer"
            piece = os.read(self.read, 2**20)
            assert piece, "the browser is gone"
            self.pending += piece
        message, _, self.pending = self.pending.partition(b"\0")
        found = json.loads(message)
        self._note(found.get("method"), found.get("params", {}))
        return found

    def _note(self, method, event):
        if method == "Runtime.exceptionThrown":
            details = event["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "warning", "assert"):
            self.complaints.append(" ".join(str(a.get("value", a.get("description"))) for a in event["args"]))
        elif method == "Log.entryAdded" and event["entry"]["level"] in ("error", "warning"):
            self.complaints.append(event["entry"]["text"])
        elif method == "Network.requestWillBeSent" and not event["request"]["url"].startswith(("data:", "blob:")):
            self.requests.append(event["request"]["url"])

    def open(self, url, size=DESKTOP, dark=False, until="document.readyState == 'complete'"):
        """Open a page on a screen of that size, and wait until an expression is true there."""
        self.complaints, self.requests = [], []
        width, height = size
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=url)
        self.wait(f"location.href == {json.dumps(url)} && ({until})")
        self.requests = [request for request in self.requests if request != url]

    def evaluate(self, expression):
        """Return the value of an expression in the page."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression):
        """Wait until an expression is true in the page."""
        until = time.monotonic() + self.timeout_s
        while not self.evaluate(f"Boolean({expression})"):
            assert time.monotonic() < until, f"{expression} did not come true; the console says {self.complaints}"
            time.sleep(0.05)

    def print(self, path):
        """Print the page to a PDF on A4 paper."""
        found = self.send("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, printBackground=True)
        path.write_bytes(base64.b64decode(found["data"]))
