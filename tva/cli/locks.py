"""A lock on one piece of work in a folder that several machines share; a dead holder's lock is taken over."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import uuid
from pathlib import Path
from typing import Any

STALE_S = 120.0  # without a sign of life


class Lock:
    """A file that one process may make; it says who, and its time is the last sign of life.

    Ages are taken by the clock of the file system, so that machines need not agree on the time. A holder is dead when
    it gave no sign of life for ``stale_s``, or runs no more on this machine.

    Args:
        path: The file.
        stale_s: Seconds after which a holder without a sign of life counts as dead.
    """

    def __init__(self, path: Path, stale_s: float = STALE_S) -> None:
        self.path = path
        self.stale_s = stale_s
        self._nonce = uuid.uuid4().hex

    def acquire(self) -> bool:
        """Take the lock; say whether it is ours."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._make(self.path):
            return True
        if not self._is_stale(self.path):
            return False
        # One process at a time looks again and removes; else two that saw the same dead lock could both take it over.
        guard = self.path.with_name(self.path.name + ".takeover")
        if not self._make(guard):
            if self._is_stale(guard):
                guard.unlink(missing_ok=True)
            return False
        try:
            if self._is_stale(self.path):
                self.path.unlink(missing_ok=True)
            return self._make(self.path)
        finally:
            guard.unlink(missing_ok=True)

    def refresh(self) -> bool:
        """Give a sign of life; say whether the lock is still ours."""
        if self.holder().get("nonce") != self._nonce:
            return False
        os.utime(self.path)
        return True

    def release(self) -> None:
        """Remove the lock if it is ours."""
        if self.holder().get("nonce") == self._nonce:
            self.path.unlink(missing_ok=True)

    def holder(self) -> dict[str, Any]:
        """Say who holds the lock: ``host``, ``pid``, ``nonce``; nothing if nobody does."""
        return _read(self.path)

    def _make(self, path: Path) -> bool:
        try:
            with open(path, "x") as file:
                json.dump({"host": socket.gethostname(), "pid": os.getpid(), "nonce": self._nonce}, file)
        except FileExistsError:
            return False
        return True

    def _is_stale(self, path: Path) -> bool:
        holder = _read(path)
        if holder.get("host") == socket.gethostname() and not _runs(holder["pid"]):
            return True
        probe = path.with_name(f"{path.name}.{self._nonce}")
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        try:
            return now - path.stat().st_mtime > self.stale_s
        except FileNotFoundError:  # released in between
            return False


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # being made, or just gone
        return json.loads(path.read_text())
    return {}


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
