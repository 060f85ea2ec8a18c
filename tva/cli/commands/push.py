"""The command ``tva push``."""

from __future__ import annotations

from json import dumps

from tva.edit.push import Pushed


def show_pushed(result: Pushed, json: bool = False) -> None:
    """Print what went up.

    Args:
        result: What `push` gave.
        json: Print JSON instead of lines.
    """
    if json:
        print(dumps(result.to_json(), indent=1, ensure_ascii=False))
        return
    for name, size in result.files.items():
        print(f"{size:>14,} bytes  {name}")
    for note in result.notes:
        print(f"left out: {note}")
    print(f"pushed: {result.url}" if result.url else f"nothing was sent; this would go to {result.repository}")
