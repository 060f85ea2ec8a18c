"""The command line. `TvaCLI` and `EditMixin` bring ``edit`` into a LightningCLI of your own."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tva.cli.lightning import EditMixin, TvaCLI

__all__ = ["EditMixin", "TvaCLI"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # Lightning takes seconds to load
        from tva.cli import lightning

        return getattr(lightning, name)
    raise AttributeError(f"module 'tva.cli' has no attribute {name!r}")
