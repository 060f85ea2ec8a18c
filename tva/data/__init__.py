"""LightningDataModules: one task each, with splits, class names and prompt templates.

A data module that an installed package names under the entry-point group ``tva.data_sets`` is ``tva.data.NAME``, also
in YAML; a `tva.data.presets.Preset` under that group is ``preset:NAME`` for `ImageTask`.
"""

from typing import Any

import lightning as L

from tva.data.generation_task import GenerationTask
from tva.data.image_task import ImageTask
from tva.data.language_task import LanguageTask
from tva.data.presets import GROUP
from tva.data.table_task import TableTask
from tva.data.text_task import TextTask
from tva.plugins import installed

__all__ = ["GenerationTask", "ImageTask", "LanguageTask", "TableTask", "TextTask"]


def __getattr__(name: str) -> Any:
    if name.startswith("_") or name not in installed(GROUP):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = installed(GROUP)[name].load()
    if not (isinstance(value, type) and issubclass(value, L.LightningDataModule)):
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}: the entry point in {GROUP} is not a LightningDataModule "
            f"class. A preset is used as preset:{name}."
        )
    return value
