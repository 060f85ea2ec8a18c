"""YAML of configurations and values as jsonargparse loads it, within limits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from tva.checkpoints.foreign_yaml import check_yaml, read_yaml_text


def load_yaml(text: str) -> Any:
    """Load YAML that `check_yaml` accepts, as jsonargparse does."""
    check_yaml(text)
    return _load(text)


_load = get_loader("yaml")
set_loader("yaml", load_yaml, (yaml.YAMLError,))


def check_configs(words: Sequence[str]) -> None:
    """Check the files that ``--config`` names before they are parsed.

    Raises:
        ValueError: One is not a regular file, is too large, is not text, or is refused by `check_yaml`.
    """
    for word, after in zip(words, [*words[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        path = Path(value if equals else after)
        if name == "--config" and path.exists():
            read_yaml_text(path)
