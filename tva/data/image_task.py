"""A labeled image data set as one task; the one door to Hugging Face `datasets`."""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from tva.compose import parse_bytes
from tva.data.cache import Decoder, SampleCache
from tva.data.presets import find_preset
from tva.data.streaming import Stream, make_streams
from tva.state_dict import some

_FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json"}


class ImageTask(L.LightningDataModule):
    """One image classification task over Hugging Face `datasets`, with the paper's splits.

    Batches are ``images, labels``: float tensors of shape (batch, 3, height, width) as the model's ``image_transform``
    makes them, and int64 class indices of shape (batch,). Decoded examples are kept, as bytes in a memory-mapped file.
    Which examples are held out and in which order epochs take them depends on seeds alone, not on how many ranks and
    workers share them: ranks together take in each step what one process would.

    Args:
        path: ``preset:NAME``, a set of the literature with its columns, class names and templates (``tva data`` lists
            them); ``builtin:NAME``, a set that ships with this package; a local parquet, arrow, csv, json or npz file,
            where ``{split}`` stands for the split's name; a folder of images by class, or one written by
            ``save_to_disk``; a mapping from split to file; or the name of a data set on the Hugging Face hub.
            Environment variables (``$DATA``) are filled in. Relative paths start at the working directory.
        name: Name in log keys and reports; by default the last part of ``path``.
        config: Configuration of a hub data set, such as ``plain_text``.
        revision: Revision of a hub data set, so that the data cannot change under you.
        image_column: Column that holds the images.
        label_column: Column that holds the labels: class indices, or class names.
        class_names: Names in the order of the labels, or the name of a preset to take them from; by default the data
            set's own.
        templates: Prompts in which ``{}`` stands for the class name, or the name of a preset; by default a built-in
            set's own, else ``a photo of a {}.``
        train_split: Split to train on.
        val_split: Split to choose on. By default a part of the training split is held out: min(10 %, 5,000) examples,
            the paper's rule.
        val_size: Hold out so many training examples instead, where there is no ``val_split``.
        test_split: Split to report on.
        where: Keep the rows whose column holds one of the given values, such as
            ``{style: [sketch], label: [cat, dog]}``.
        prototype_where: As ``where``, instead of it, for the training examples that class-mean heads are taken from.
        batch_size: Examples a batch.
        num_workers: Processes that decode; 0 decodes in this one.
        seed: Of the held-out part, so that it is the same in every run; also of the order of training where the run has
            no seed (``seed_everything``).
        limit_train: Train on so many examples at most, the first of a seeded shuffle.
        limit_val: Validate on so many at most, likewise.
        limit_test: Test on so many at most, likewise.
        local: For a preset, where a copy of the data lies instead of the hub: anything that ``path`` may be.
        cache: What decoded examples may take on this machine, such as ``500MiB``; the rest is decoded each time.
        streaming: Read from beginning to end without an index, for sets too large for the disk: a hub set, or local
            parquet, arrow, csv or json files. Needs ``val_split`` or ``val_size``, and ``trainer.max_steps``.

    Raises:
        FileNotFoundError: A local file is not there.
        ValueError: A column, a split or a class is not in the data set; the message names those that are.

    Example:
        >>> task = ImageTask("builtin:digits", templates=["a photo of the digit {}."])
        >>> task.name
        'digits'
    """

    def __init__(
        self,
        path: str | dict[str, str],
        name: str | None = None,
        config: str | None = None,
        revision: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        class_names: list[str] | str | None = None,
        templates: list[str] | str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        val_size: int | None = None,
        test_split: str = "test",
        where: dict[str, Any] | None = None,
        prototype_where: dict[str, Any] | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        limit_train: int | None = None,
        limit_val: int | None = None,
        limit_test: int | None = None,
        local: str | dict[str, str] | None = None,
        cache: str = "2GiB",
        streaming: bool = False,
    ) -> None:
        super().__init__()
        self.preset = None
        if isinstance(path, str) and path.startswith("preset:"):
            preset_name = path.removeprefix("preset:")
            self.preset = find_preset(preset_name)
            name, config = name or preset_name, config or self.preset.config
            path = self.preset.hub if local is None else local
            templates = self.preset.templates if templates is None else templates
        elif local is not None:
            raise ValueError(f"local= is where a preset's data lies, and {path!r} is none. Give path= {local!r}.")
        if isinstance(class_names, str):
            class_names = find_preset(class_names).name_classes([], class_names)
        if isinstance(templates, str):
            templates = find_preset(templates).templates
        # Plain attributes rather than save_hyperparameters: LightningCLI can give one data module another's.
        self.path = {split: _expand(file) for split, file in path.items()} if isinstance(path, dict) else _expand(path)
        self.name = name or _default_name(self.path)
        self.config = config
        self.revision = revision
        self.image_column = image_column
        self.label_column = label_column
        self.class_names: list[str] = list(class_names or [])
        self.templates = list(templates) if templates is not None else _default_templates(self.path)
        self.splits = {"train": train_split, "val": val_split, "test": test_split}
        self.val_size = val_size
        self.where = dict(where or {})
        self.prototype_where = None if prototype_where is None else dict(prototype_where)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.limits = {"train": limit_train, "val": limit_val, "test": limit_test}
        self._cache_bytes_left = parse_bytes(cache)
        self.streaming = streaming
        self._examples: dict[str, Examples | Stream] = {}

    @property
    def order_seed(self) -> int:
        """Seed of the order of training: the run's, which Lightning keeps in the environment."""
        return int(os.environ.get("PL_GLOBAL_SEED", self.seed))

    # --- splits

    def setup(self, stage: str | None = None) -> None:
        transform = getattr(getattr(self.trainer, "lightning_module", None), "image_transform", None)
        if transform is None:
            raise TypeError(
                "ImageTask needs a model that says how images reach it: its image_transform takes a PIL image and "
                f"gives a tensor, and {type(getattr(self.trainer, 'lightning_module', None)).__name__} has none."
            )
        if self.streaming and stage == "fit" and getattr(self.trainer, "max_steps", None) == -1:
            raise ValueError(f"{self.name}: a stream's length is unknown, so training needs trainer.max_steps. Set it.")
        if not self._examples:
            self._examples = self._load(transform)
        for examples in self._examples.values():
            examples.set_transform(transform)

    def _load(self, transform: Callable[[Any], Tensor]) -> Mapping[str, Examples | Stream]:
        splits = load_images(self.path, config=self.config, revision=self.revision, streaming=self.streaming)
        if self.preset is not None:
            splits = self.preset.standardize(splits)
        if self.streaming:
            return make_streams(self, splits, transform)
        train_split, test_split = self._split(splits, "train"), self._split(splits, "test")
        self.class_names = self._read_class_names(train_split)
        rows = {"train": self._filter(train_split, self.where), "test": self._filter(test_split, self.where)}
        if self.splits["val"] is not None:
            rows["val"] = self._filter(self._split(splits, "val"), self.where)
        elif len(rows["train"]) < 2:
            raise ValueError(
                f"{self.name}: at least 2 training examples are needed to hold one out for validation, and "
                f"{len(rows['train'])} are there{' where ' + str(self.where) if self.where else ''}."
            )
        else:  # the paper's rule
            order = np.random.default_rng(self.seed).permutation(rows["train"])
            num_val = max(1, min(len(order) // 10, 5000)) if self.val_size is None else self.val_size
            if not 0 < num_val < len(order):
                raise ValueError(f"{self.name}: val_size must lie in 1 … {len(order) - 1}; found {num_val}.")
            rows["train"], rows["val"] = np.sort(order[num_val:]), np.sort(order[:num_val])
        tables = {"train": train_split, "val": train_split, "test": test_split}
        if self.splits["val"] is not None:
            tables["val"] = self._split(splits, "val")
        if self.prototype_where is not None:
            matching = self._filter(train_split, self.prototype_where)
            held_out = rows["val"] if self.splits["val"] is None else []
            rows["prototype"], tables["prototype"] = np.setdiff1d(matching, held_out), train_split
        examples = {}
        for part, indices in rows.items():
            limit = self.limits.get(part)
            if limit is not None and limit < len(indices):
                indices = np.sort(np.random.default_rng(self.seed).permutation(indices)[:limit])
            if not len(indices):
                raise ValueError(f"{self.name}: no {part} example is left where {self.prototype_where or self.where}.")
            table = tables[part].select(indices)
            examples[part] = Examples(table[self.image_column], self._read_labels(table), transform)
        return examples

    def _split(self, splits: Mapping[str, Any], part: str) -> Any:
        name = self.splits[part]
        if name not in splits:
            raise ValueError(
                f"{self.name} has no split {name!r}; its splits are {some(splits, 8)}. Set {part}_split to one of them."
            )
        table = splits[name]
        for option in ("image_column", "label_column"):
            column = getattr(self, option)
            if column not in table.column_names:
                raise ValueError(
                    f"{self.name} has no column {column!r}; its columns are {some(table.column_names, 8)}. Set "
                    f"{option} to one of them."
                )
        return table

    def _filter(self, table: Any, where: Mapping[str, Any]) -> np.ndarray:
        keep = np.ones(len(table), dtype=bool)
        for column, values in where.items():
            if column not in table.column_names:
                raise ValueError(
                    f"{self.name}: where names the column {column!r}, not one of {some(table.column_names, 8)}."
                )
            wanted = list(values) if isinstance(values, (list, tuple, set)) else [values]
            names = self.class_names if column == self.label_column else getattr(table.features[column], "names", None)
            found = np.asarray(list(table[column]))
            if names and found.dtype.kind in "iu":
                unknown = [value for value in wanted if isinstance(value, str) and value not in names]
                wanted = [names.index(value) if value in names else value for value in wanted]
            else:
                unknown = [value for value in wanted if value not in found]
            if unknown:
                known = names or sorted({str(value) for value in found.tolist()})
                raise ValueError(f"{self.name}: where asks {column} for {some(unknown)}; it holds {some(known, 12)}.")
            keep &= np.isin(found, wanted)
        return np.flatnonzero(keep)

    # --- classes

    def _read_class_names(self, table: Any) -> list[str]:
        own = list(getattr(table.features[self.label_column], "names", None) or [])
        labels = list(table[self.label_column])
        if not own and isinstance(labels[0], str):
            own = sorted(set(labels))
        if not self.class_names:
            if self.preset is not None:
                return self.preset.name_classes(own, self.name)
            if not own:
                raise ValueError(
                    f"{self.name} does not name its classes; pass class_names, {max(labels) + 1} names in the "
                    f"order of the labels in {self.label_column!r}."
                )
            return own
        required = len(own) or max(labels) + 1
        if len(self.class_names) != required:
            raise ValueError(
                f"{self.name} has {required} classes, but class_names has {len(self.class_names)}: "
                f"{some(self.class_names)}. Give one name for each class, in the order of the labels."
            )
        return self.class_names

    def _read_labels(self, table: Any) -> Tensor:
        labels = list(table[self.label_column])
        if isinstance(labels[0], str):
            index = {name: position for position, name in enumerate(self.class_names)}
            unknown = sorted(set(labels) - index.keys())
            if unknown:
                raise ValueError(
                    f"{self.name}: labels {some(unknown)} are not in class_names {some(self.class_names, 8)}."
                )
            labels = [index[label] for label in labels]
        labels = torch.as_tensor(labels, dtype=torch.int64)
        if labels.min() < 0 or labels.max() >= len(self.class_names):
            raise ValueError(
                f"{self.name}: labels must lie in 0 … {len(self.class_names) - 1} but reach from {int(labels.min())} "
                f"to {int(labels.max())}. Give one class name for each class."
            )
        return labels

    # --- loaders

    def train_dataloader(self) -> DataLoader:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._loader("test")

    def prototype_dataloader(self) -> DataLoader:
        """Training examples for class-mean heads, in order."""
        return self._loader("prototype" if "prototype" in self._examples else "train")

    def _loader(self, part: str, shuffle: bool = False) -> DataLoader:
        examples, trainer = self._examples[part], self.trainer
        if isinstance(examples, Stream):
            loader = DataLoader(
                examples,
                batch_size=self.batch_size,
                num_workers=self.num_workers,
                persistent_workers=self.num_workers > 0,
                pin_memory=torch.cuda.is_available(),
            )
            loader.sampler.set_epoch = examples.set_epoch  # Lightning tells samplers the epoch, and no data set
            return loader
        ranks = getattr(trainer, "world_size", 1)
        # Here and not in a worker, so that all share one file; ranks on one machine share the budget.
        used = examples.open_cache(self._cache_bytes_left // getattr(trainer, "num_devices", 1))
        self._cache_bytes_left -= used * getattr(trainer, "num_devices", 1)
        sampler = None
        if shuffle:  # the same order, and a new one each epoch, on any number of ranks; Lightning counts the epochs
            rank = getattr(trainer, "global_rank", 0)
            sampler = DistributedSampler(examples, num_replicas=ranks, rank=rank, seed=self.order_seed)
        return DataLoader(
            examples,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


class Examples(Dataset):
    """Images with labels, decoded when first asked for and then kept, as far as a cache is open.

    Args:
        images: PIL images by index.
        labels: Class indices, shape (examples,).
        transform: From a PIL image to a tensor.
    """

    def __init__(self, images: Sequence[Any], labels: Tensor, transform: Callable[[Any], Tensor]) -> None:
        self.images = images
        self.labels = labels
        self.cache: SampleCache | None = None
        self.decoder = Decoder(transform)

    def set_transform(self, transform: Callable[[Any], Tensor]) -> None:
        """Change the transform, forgetting what was decoded with another."""
        if self.decoder.transform is not transform:
            self.decoder = Decoder(transform)
            if self.cache is not None:
                self.cache, room = None, self.cache.num_bytes
                self.open_cache(room)

    def open_cache(self, max_bytes: int) -> int:
        """Keep decoded examples from here on; give the bytes that this takes more than before."""
        if self.cache is not None or not len(self):
            return 0
        first = self._decode(0)
        self.cache = SampleCache(len(self), first, max_bytes)
        self.cache.take([0], lambda _: first)
        return self.cache.num_bytes

    def _decode(self, index: int) -> np.ndarray:
        return self.decoder.decode(self.images[index].convert("RGB"))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Give a batch's examples, converted together; a DataLoader asks in this way."""
        if self.cache is None:
            kept = np.stack([self._decode(index) for index in indices])
        else:
            kept = self.cache.take(indices, self._decode)
        return list(zip(self.decoder.finish(kept), self.labels[torch.as_tensor(indices)], strict=True))


def _expand(path: str) -> str:
    expanded = os.path.expandvars(os.path.expanduser(path))
    if "$" in expanded:
        raise ValueError(f"The path {path!r} names an environment variable that is not set. Set it, or write the path.")
    return expanded


def _default_name(path: str | Mapping[str, str]) -> str:
    if not isinstance(path, str):
        path = next(iter(path.values()))
    return Path(path.removeprefix("builtin:")).name.split(".")[0].replace("-{split}", "").replace("{split}", "images")


def _default_templates(path: str | Mapping[str, str]) -> list[str]:
    if isinstance(path, str) and path.startswith("builtin:"):
        from tva.data.builtin import BUILTIN_SETS

        known = BUILTIN_SETS.get(path.removeprefix("builtin:"))
        return list(known.templates) if known else []  # an unknown name is refused, with the known ones, when loaded
    return ["a photo of a {}."]


def load_images(
    path: str | Mapping[str, str], config: str | None = None, revision: str | None = None, streaming: bool = False
) -> Mapping[str, Any]:
    """Open an image data set by the rules of `ImageTask`'s ``path``.

    Returns:
        Split names to `datasets.Dataset`, or to `datasets.IterableDataset` where they are streamed.
    """
    if streaming:
        return _streamed(path, config, revision)
    if isinstance(path, str) and path.startswith("builtin:"):
        return _builtin(path.removeprefix("builtin:"))
    import datasets

    if isinstance(path, str) and "{split}" in path:
        parent, pattern = Path(path).parent, Path(path).name
        before, after = pattern.split("{split}")
        found = sorted(parent.glob(pattern.replace("{split}", "*"))) if parent.is_dir() else []
        path_of = {file.name[len(before) : len(file.name) - len(after)]: str(file) for file in found}
        if not path_of:
            raise FileNotFoundError(f"Files were expected at {path}, but none is there.{_nearby(Path(path))}")
        path = path_of
    if isinstance(path, str):
        local = Path(path)
        if local.is_dir():
            if (local / "dataset_dict.json").exists():
                return datasets.load_from_disk(path)
            kinds = {_FORMATS.get(file.suffix) for file in local.iterdir()} - {None}
            return datasets.load_dataset(kinds.pop() if len(kinds) == 1 else "imagefolder", data_dir=path)
        if not local.suffix and not local.is_absolute() and not path.startswith("."):
            return datasets.load_dataset(path, name=config, revision=revision)  # the hub
        if local.suffix == ".npz" and local.exists():
            return _read_npz(local)
        path = {"train": path}
    files = {split: Path(file) for split, file in path.items()}
    for file in files.values():
        if not file.exists():
            raise FileNotFoundError(f"A data set was expected at {file}, but nothing is there.{_nearby(file)}")
    suffixes = {file.suffix for file in files.values()}
    suffix = suffixes.pop()
    if suffixes or suffix not in {*_FORMATS, ".npz"}:
        raise ValueError(
            f"A data set must be files of one format, one of {', '.join([*_FORMATS, '.npz'])}; found "
            f"{some(str(file) for file in files.values())}."
        )
    if suffix == ".npz":
        return {split: _read_npz(file)[split if len(files) == 1 else "train"] for split, file in files.items()}
    return datasets.load_dataset(_FORMATS[suffix], data_files={split: str(file) for split, file in files.items()})


def _streamed(path: str | Mapping[str, str], config: str | None, revision: str | None) -> Mapping[str, Any]:
    import datasets

    if isinstance(path, str) and "{split}" in path:
        path = {split: path.format(split=split) for split in ("train", "val", "validation", "test")}
        path = {split: file for split, file in path.items() if Path(file).exists()}
    if not isinstance(path, str):
        suffixes = {Path(file).suffix for file in path.values()}
        if len(suffixes) != 1 or not suffixes <= set(_FORMATS):
            raise ValueError(
                f"Files to stream must be there and of one format, one of {', '.join(_FORMATS)}; found {dict(path)}."
            )
        return datasets.load_dataset(_FORMATS[suffixes.pop()], data_files=dict(path), streaming=True)
    if ":" in path or Path(path).is_absolute() or path.startswith(".") or Path(path).suffix:
        raise ValueError(
            f"streaming=true takes a hub set's name, a mapping from split to file, or a path with {{split}}; found "
            f"{path!r}. Leave streaming out."
        )
    return datasets.load_dataset(path, name=config, revision=revision, streaming=True)


@functools.cache
def _builtin(name: str) -> Mapping[str, Any]:
    from tva.data.builtin import load_builtin

    return load_builtin(name)


def _nearby(path: Path) -> str:
    if not path.parent.is_dir():
        return f" The folder {path.parent} does not exist."
    near = difflib.get_close_matches(path.name, [file.name for file in path.parent.iterdir()], n=1, cutoff=0.5)
    return f" Did you mean {path.parent / near[0]}?" if near else ""


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
