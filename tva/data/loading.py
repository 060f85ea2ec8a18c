"""Where data sets come from: files, folders, the hub or this package; the only importer of Hugging Face `datasets`."""

import functools
import gzip
import operator
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tva.errors import is_local, nearby, some

_FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}
_OWN = (".npz", ".txt", ".txt.gz")


def expand(path: str) -> str:
    """Fill in environment variables and ``~``."""
    expanded = os.path.expandvars(os.path.expanduser(path))
    if "$" in expanded:
        raise ValueError(f"The path {path!r} names an environment variable that is not set. Set it, or write the path.")
    return expanded


def default_name(path: str | Mapping[str, str]) -> str:
    """Name a task by the last part of its path."""
    if not isinstance(path, str):
        path = next(iter(path.values()))
    return Path(path.removeprefix("builtin:")).name.split(".")[0].replace("-{split}", "").replace("{split}", "images")


def load_splits(
    path: str | Mapping[str, str],
    config: str | None = None,
    revision: str | None = None,
    folder: str | None = None,
    streaming: bool = False,
) -> Mapping[str, Any]:
    """Open a data set by the rules of a task's ``path``.

    Args:
        path: As for `tva.data.ImageTask`; a ``.txt`` or ``.txt.gz`` file is one row with the column ``text``.
        config: Configuration of a hub data set.
        revision: Revision of a hub data set.
        folder: How `datasets` reads a folder that holds none of these files, such as ``imagefolder``.
        streaming: Read from beginning to end without an index.

    Returns:
        Split names to `datasets.Dataset`, or to `datasets.IterableDataset` where they are streamed.
    """
    if streaming:
        return _streamed(path, config, revision, folder)
    if isinstance(path, str) and path.startswith("builtin:"):
        return _builtin(path.removeprefix("builtin:"))
    import datasets

    if isinstance(path, str) and "{split}" in path:
        path = _files_by_split(path)
    if isinstance(path, str):
        local = Path(path)
        if local.is_dir():
            return _read_folder(local, folder, streaming=False)
        if _is_on_the_hub(path):
            here = "" if local.exists() else f"there is no such file or folder here.{nearby(local)} "
            with _in_words(path, here), _no_bars_in_pipes():
                return datasets.load_dataset(path.removeprefix("hf://"), name=config, revision=revision)
        if local.suffix == ".npz" and local.exists():
            return _read_npz(local)
        path = {"train": path}
    files = {split: Path(file) for split, file in path.items()}
    _check_exist(files.values())
    suffixes = {".txt.gz" if file.name.endswith(".txt.gz") else file.suffix for file in files.values()}
    suffix = suffixes.pop()
    if suffixes or suffix not in {*_FORMATS, *_OWN}:
        raise ValueError(
            f"A data set must be files of one format, one of {', '.join([*_FORMATS, *_OWN])}; found "
            f"{some(str(file) for file in files.values())}."
        )
    if suffix == ".npz":
        return {split: _read_npz(file)[split if len(files) == 1 else "train"] for split, file in files.items()}
    if suffix in _OWN:
        return {split: datasets.Dataset.from_dict({"text": [_read_text(file)]}) for split, file in files.items()}
    separator = {"sep": "\t"} if suffix == ".tsv" else {}
    data_files = {split: str(file) for split, file in files.items()}
    return _load_files(_FORMATS[suffix], data_files=data_files, **separator)


def _load_files(kind: str, **options: Any) -> Any:
    """Load files of this machine; without the request by which the library lets a server count that."""
    import datasets

    counts = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        with _in_words(options.get("data_dir") or some(options["data_files"].values())), _no_bars_in_pipes():
            return datasets.load_dataset(kind, **options)
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts


@contextmanager
def _no_bars_in_pipes() -> Iterator[None]:
    import datasets

    if sys.stderr.isatty() or datasets.utils.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


@contextmanager
def _in_words(path: str, here: str = "") -> Iterator[None]:
    """Say of which path and what to do where `datasets` finds no data set."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} holds no data set that can be read: {here}{str(error).rstrip('.!')}. Give a file or folder with "
            f"examples, or a data set on the hub."
        ) from error


def check_path(path: str | Mapping[str, str]) -> None:
    """Check that the local files of a task's ``path`` exist, or that there is such a built-in set; nothing is read.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: No built-in set has this name.
    """
    if not isinstance(path, str):
        _check_exist(map(Path, path.values()))
    elif path.startswith("builtin:"):
        from tva.data.builtin import check_name

        check_name(path.removeprefix("builtin:"))
    elif "{split}" in path:
        _files_by_split(path)
    elif not _is_on_the_hub(path):
        _check_exist([Path(path)])


def _is_on_the_hub(path: str) -> bool:
    local = Path(path)
    return path.startswith("hf://") or not (local.suffix or local.is_dir() or is_local(path))


def _files_by_split(path: str) -> dict[str, str]:
    parent, pattern = Path(path).parent, Path(path).name
    before, after = pattern.split("{split}")
    found = sorted(parent.glob(pattern.replace("{split}", "*"))) if parent.is_dir() else []
    if not found:
        raise FileNotFoundError(f"Files were expected at {path}, but none is there.{nearby(Path(path))}")
    return {file.name[len(before) : len(file.name) - len(after)]: str(file) for file in found}


def _check_exist(files: Iterable[Path]) -> None:
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"A data set was expected at {file}, but nothing is there.{nearby(file)}")


def _read_folder(path: Path, folder: str | None, streaming: bool) -> Mapping[str, Any]:
    import datasets

    if (path / "dataset_dict.json").exists():
        tables = datasets.load_from_disk(path)
        return {split: table.to_iterable_dataset() for split, table in tables.items()} if streaming else tables
    kinds = {_FORMATS.get(file.suffix) for file in path.iterdir()} - {None}
    kind = kinds.pop() if len(kinds) == 1 else folder
    if kind is None:
        raise ValueError(
            f"The folder {path} must hold files of one format, one of {', '.join(_FORMATS)}, or be one that "
            f"save_to_disk wrote; name the file instead."
        )
    return _load_files(kind, data_dir=str(path), streaming=streaming)


def _streamed(
    path: str | Mapping[str, str], config: str | None, revision: str | None, folder: str | None
) -> Mapping[str, Any]:
    import datasets

    if isinstance(path, str) and Path(path).is_dir():
        return _read_folder(Path(path), folder, streaming=True)

    if isinstance(path, str) and "{split}" in path:
        path = {split: path.format(split=split) for split in ("train", "val", "validation", "test")}
        path = {split: file for split, file in path.items() if Path(file).exists()}
    if not isinstance(path, str):
        suffixes = {Path(file).suffix for file in path.values()}
        if len(suffixes) != 1 or not suffixes <= set(_FORMATS):
            raise ValueError(
                f"Files to stream must be there and of one format, one of {', '.join(_FORMATS)}; found {dict(path)}."
            )
        return _load_files(_FORMATS[suffixes.pop()], data_files=dict(path), streaming=True)
    if ":" in path or Path(path).is_absolute() or path.startswith(".") or Path(path).suffix:
        raise ValueError(
            f"streaming=true takes a hub set's name, a folder, a mapping from split to file, or a path with {{split}}; "
            f"found {path!r}. Leave streaming out."
        )
    return datasets.load_dataset(path, name=config, revision=revision, streaming=True)


@functools.cache
def _builtin(name: str) -> Mapping[str, Any]:
    from tva.data.builtin import load_builtin

    return load_builtin(name)


def resolved_revision(splits: Mapping[str, Any]) -> str | None:
    """Return the commit of the hub's repository that tables were read from; None of local data.

    `datasets` has it in the addresses that it read, and names the folder of its cache by it.
    """
    for table in splits.values():
        sources = getattr(getattr(table, "info", None), "download_checksums", None) or {}
        files = [entry["filename"] for entry in getattr(table, "cache_files", None) or ()]
        for place in (*sources, *files):
            if found := re.search(r"hf://datasets/[^@]+@([0-9a-f]{40})/|/([0-9a-f]{40})/[^/]+\.arrow$", place):
                return found[1] or found[2]
    return None


def _read_text(file: Path) -> str:
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        return lines.read()


def _read_npz(file: Path) -> dict[str, Any]:
    """Read ``images`` (examples, height, width[, 3]) uint8 with ``labels``; or ``train_images``, ``test_labels`` …"""
    import datasets
    from PIL import Image

    arrays = np.load(file, allow_pickle=False)
    splits = {key.removesuffix("images").rstrip("_") or "train": key for key in arrays.files if key.endswith("images")}
    if not splits:
        raise ValueError(
            f"{file} must hold arrays 'images' and 'labels', or 'train_images' …; it holds {arrays.files}."
        )
    tables = {}
    for split, key in splits.items():
        labels = key.removesuffix("images") + "labels"
        if labels not in arrays.files or len(arrays[labels]) != len(arrays[key]) or arrays[key].dtype != np.uint8:
            raise ValueError(
                f"{file}: {key!r} must be uint8 and {labels!r} must hold one label for each; found {arrays[key].dtype} "
                f"{arrays[key].shape} and {arrays[labels].shape if labels in arrays.files else 'nothing'}."
            )
        tables[split] = datasets.Dataset.from_dict(
            {"image": [Image.fromarray(image) for image in arrays[key]], "label": arrays[labels].tolist()},
            features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
        )
    return tables


_COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def comparison(condition: Any) -> Callable[[Any], bool] | None:
    """Return the function that a condition such as ``"> 0.8"`` is; None where it is no comparison.

    A missing value meets none.

    Example:
        >>> comparison(">= 2")(2), comparison("two")
        (True, None)
    """
    found = (
        re.fullmatch(r"\s*(>=|<=|>|<)\s*([-+]?[\d.]+(?:e[-+]?\d+)?)\s*", condition)
        if isinstance(condition, str)
        else None
    )
    return None if found is None else functools.partial(_meets, _COMPARISONS[found[1]], float(found[2]))


def _meets(compare: Callable[[Any, Any], bool], bound: float, value: Any) -> bool:
    return value is not None and bool(compare(value, bound))
