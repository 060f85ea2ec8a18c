"""Fixtures of this room's tests."""

from small_cli import runs as runs
from small_edit import vectors as vectors
