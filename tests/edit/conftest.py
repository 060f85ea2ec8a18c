"""Fixtures of this room's tests."""

from small_edit import vectors as vectors
