"""The command ``tva revert``."""

from __future__ import annotations

from json import dumps

from tva.compose.revert import RevertReport


def show_reverted(result: RevertReport, json: bool = False) -> None:
    """Print what was written.

    Args:
        result: What `revert` gave.
        json: Print JSON.
    """
    print(dumps(result.to_json(), indent=1) if json else result)
