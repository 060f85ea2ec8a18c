"""Fixtures of this room's tests."""

from small_cli import runs as runs
