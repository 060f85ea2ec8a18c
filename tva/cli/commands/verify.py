"""The command ``tva verify``."""

from __future__ import annotations

from json import dumps

from tva.compose.verify import VerifyReport


def show_verified(result: VerifyReport, json: bool = False) -> bool:
    """Print what was found, and give whether it holds.

    Args:
        result: What `verify` gave.
        json: Print JSON.
    """
    print(dumps(result.to_json(), indent=1) if json else result)
    return result.holds
