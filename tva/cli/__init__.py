"""The command line: `main` runs a command; `TvaCLI` and `EditMixin` bring ``edit`` into your own LightningCLI."""

from typing import TYPE_CHECKING, Any

from tva.cli.main import main, run

if TYPE_CHECKING:
    from tva.cli.lightning import EditMixin, TvaCLI

__all__ = ["EditMixin", "TvaCLI", "main", "run"]


def __getattr__(name: str) -> Any:
    if name in ("EditMixin", "TvaCLI"):  # Lightning takes seconds to load
        from tva.cli import lightning

        return getattr(lightning, name)
    raise AttributeError(f"module 'tva.cli' has no attribute {name!r}")
