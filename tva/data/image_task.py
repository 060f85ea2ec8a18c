"""A labeled image data set as one task."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tva.data.decode_cache import Decoder, SampleCache
from tva.data.labeled_task import LabeledTask
from tva.data.presets import find_preset
from tva.sizes import parse_bytes


class ImageTask(LabeledTask):
    """One image classification task over Hugging Face `datasets`, with the paper's splits.

    Batches are ``images, labels``: float tensors of shape (batch, 3, height, width) as the model's ``image_transform``
    makes them, and int64 class indices of shape (batch,). Decoded examples are kept, as bytes in a memory-mapped file.
    The held-out examples and the order of each epoch depend only on seeds, not on the number of ranks and workers: in
    each step, all ranks together take what one process would take.

    Args:
        path: ``preset:NAME``, a set of the literature with its columns, class names and templates (``tva data`` lists
            them); ``builtin:NAME``, a set that ships with this package; a local parquet, arrow, csv, json or npz file,
            where ``{split}`` stands for the split's name; a folder of images by class, or one written by
            ``save_to_disk``; a mapping from split to file; or the name of a data set on the Hugging Face hub.
            Environment variables (``$DATA``) are expanded. Relative paths start at the working directory.
        name: Name of the task in log keys and reports; by default the last part of ``path``.
        config: Configuration of a hub data set, such as ``plain_text``.
        image_column: Column that holds the images.
        label_column: Column that holds the labels: class indices, or class names.
        class_names: Names in the order of the labels, or the name of a preset to take them from (``preset:NAME`` in a
            list stands for its names; data that name some of a longer list's classes are of these); by default the data
            set's own.
        templates: Prompts in which ``{}`` stands for the class name, or the name of a preset; by default a built-in
            set's own, else ``a photo of a {}.``
        prototype_where: Replaces ``where`` for the training examples from which class-mean heads are computed.
        batch_size: Examples per batch, on each rank.
        local: For a preset, a copy of the data to read instead of the hub; takes anything that ``path`` takes.
        cache: Disk space for decoded examples on this machine, such as ``500MiB``; the rest is decoded each time.
        augment: Train on images that the model's ``train_transform`` augments, differently in each epoch (CLIP's: a
            random crop of 90 to 100% of the area, as in the paper). They are not cached.
        **options: Options of `tva.data.labeled_task.LabeledTask`.

    Raises:
        FileNotFoundError: A local file is missing.
        ValueError: A column, a split or a class is not in the data set; the message lists what there is.

    Example:
        >>> task = ImageTask("builtin:digits", templates=["a photo of the digit {}."])
        >>> task.name
        'digits'
    """

    column_options = ("image_column", "label_column")
    folder_format = "imagefolder"

    def __init__(
        self,
        path: str | dict[str, str],
        name: str | None = None,
        config: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        class_names: list[str] | str | None = None,
        templates: list[str] | str | None = None,
        prototype_where: dict[str, Any] | None = None,
        batch_size: int = 128,
        local: str | dict[str, str] | None = None,
        cache: str = "2GiB",
        augment: bool = False,
        **options: Any,
    ) -> None:
        preset = None
        if isinstance(path, str) and path.startswith("preset:"):
            preset_name = path.removeprefix("preset:")
            preset = find_preset(preset_name)
            name, config = name or preset_name, config or preset.config
            if local is None and preset.revision is not None:
                options.setdefault("revision", preset.revision)
            path = preset.hub if local is None else local
            templates = preset.templates if templates is None else templates
        elif local is not None:
            raise ValueError(f"local= is the copy of a preset, and {path!r} is not a preset. Give path= {local!r}.")
        if isinstance(class_names, str):
            class_names = find_preset(class_names).name_classes([], class_names)
        if isinstance(templates, str):
            templates = find_preset(templates).templates
        super().__init__(path, name=name, config=config, batch_size=batch_size, **options)
        self.preset = preset
        self.image_column = image_column
        self.label_column = label_column
        self.class_names = [name for entry in class_names or [] for name in _classes(entry)]
        self.templates = list(templates) if templates is not None else _default_templates(self.path)
        self.prototype_where = None if prototype_where is None else dict(prototype_where)
        self._cache_bytes_left = parse_bytes(cache, "cache")
        self.augment = augment

    # --- splits

    def setup(self, stage: str | None = None) -> None:
        transform = getattr(getattr(self.trainer, "lightning_module", None), "image_transform", None)
        if transform is None:
            raise TypeError(
                "ImageTask needs a model with an image_transform, which takes a PIL image and "
                f"returns a tensor, and {type(getattr(self.trainer, 'lightning_module', None)).__name__} has none."
            )
        self._check_streaming(stage)
        if not self._examples:
            self._examples = self._load(transform)
        for part, examples in self._examples.items():
            made = self._train_transform() if part == "augmented" else transform
            (examples.finish if self.streaming else examples).set_transform(made)

    def _train_transform(self) -> Callable[[Any], Tensor]:
        model = getattr(self.trainer, "lightning_module", None)
        if getattr(model, "train_transform", None) is None:
            raise TypeError(
                f"{self.name}: augment needs a model with a train_transform, from a PIL image to a tensor, as "
                f"ClipClassifier's; {type(model).__name__} has none. Leave augment out."
            )
        return model.train_transform

    def _load(self, transform: Callable[[Any], Tensor]) -> dict[str, Any]:
        if self.streaming:
            if self.augment:
                raise ValueError(f"{self.name}: a stream is not augmented. Leave augment or streaming out.")
            if self.prototype_where is not None:
                raise ValueError(
                    f"{self.name}: prototype_where picks rows by number, which a stream does not have. Leave one out."
                )
            return self._make_streams(self._stream_tables(), ImageRow(self, transform))
        parts = {
            part: Examples(table[self.image_column], self._read_labels(table), transform)
            for part, table in self._select().items()
        }
        if self.augment:
            parts["augmented"] = Augmented(parts["train"].images, parts["train"].labels, self._train_transform())
        return parts

    def _group_labels(self, table: Any) -> Sequence[Any] | None:
        track = None if self.preset is None or self.group is not None else self.preset.track
        if not track:
            return super()._group_labels(table)
        found = [track.search(name or "") for name in file_names(table, self.image_column)]
        if not all(found):  # a copy without the names, or a split of single images
            return None
        return [f"{label}/{match[1]}" for label, match in zip(self._read_labels(table).tolist(), found, strict=True)]

    def _load_splits(self) -> Mapping[str, Any]:
        splits = super()._load_splits()
        if self.streaming:  # who reads an image need not decode it
            splits = {split: table.decode(False) if table.features else table for split, table in splits.items()}
        return splits if self.preset is None else self.preset.standardize(splits)

    def _draw_held_out(self, count: int, num_val: int) -> tuple[np.ndarray, np.ndarray]:
        if self.preset is None:
            return super()._draw_held_out(count, num_val)
        # As the paper's code splits, so that published checkpoints were not trained on what is held out:
        # torch.utils.data.random_split with the generator's seed 0, the last of the order for validation.
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed)).numpy()
        return order[count - num_val :], order[: count - num_val]

    def train_dataloader(self) -> DataLoader:
        return self._loader("augmented" if self.augment else "train", shuffle=True)

    def _choose_rows(self, tables: dict[str, Any]) -> dict[str, np.ndarray]:
        rows = super()._choose_rows(tables)
        if self.prototype_where is not None:
            matching = self._filter(tables["train"], self.prototype_where)
            held_out = rows["val"] if self.splits["val"] is None else []
            rows["prototype"], tables["prototype"] = np.setdiff1d(matching, held_out), tables["train"]
            if not len(rows["prototype"]):
                raise ValueError(f"{self.name}: no prototype example is left where {self.prototype_where}.")
        return rows

    def _default_class_names(self, own: list[str], labels: Sequence[Any]) -> list[str]:
        if self.preset is not None:
            return self.preset.name_classes(own, self.name)
        return super()._default_class_names(own, labels)

    def _stream_class_names(self, own: list[str]) -> list[str]:
        return super()._stream_class_names(own) if self.preset is None else self.preset.name_classes(own, self.name)

    def _loader(self, part: str, shuffle: bool = False) -> DataLoader:
        examples, trainer = self._examples[part], self.trainer
        if self.streaming or part == "augmented":
            return super()._loader(part, shuffle)
        # Here and not in a worker, so that all share one file; ranks on one machine share the budget.
        used = examples.open_cache(self._cache_bytes_left // getattr(trainer, "num_devices", 1))
        self._cache_bytes_left -= used * getattr(trainer, "num_devices", 1)
        return super()._loader(part, shuffle)


class Examples(Dataset):
    """Images with labels, decoded at first access and then kept, if a cache is open.

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
        """Keep decoded examples from here on; return the bytes that this takes more than before."""
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
        """Return a batch's examples, converted together; a DataLoader asks in this way."""
        if self.cache is None:
            kept = np.stack([self._decode(index) for index in indices])
        else:
            kept = self.cache.take(indices, self._decode)
        return list(zip(self.decoder.finish(kept), self.labels[torch.as_tensor(indices)], strict=True))


class Augmented(Dataset):
    """Training images with labels, transformed anew at each access.

    Args:
        images: PIL images by index.
        labels: Class indices, shape (examples,).
        transform: From a PIL image to a tensor; random.
    """

    def __init__(self, images: Sequence[Any], labels: Tensor, transform: Callable[[Any], Tensor]) -> None:
        self.images = images
        self.labels = labels
        self.set_transform(transform)

    def set_transform(self, transform: Callable[[Any], Tensor]) -> None:
        """Change the transform."""
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[index].convert("RGB")), self.labels[index]


class ImageRow:
    """Make an example from a row of a stream.

    Args:
        task: Says which columns, and what the classes are.
        transform: From a PIL image to a tensor.
    """

    def __init__(self, task: ImageTask, transform: Callable[[Any], Tensor]) -> None:
        self.columns = task.image_column, task.label_column
        self.class_index = task.label_reader()
        self.set_transform(transform)

    def set_transform(self, transform: Callable[[Any], Tensor]) -> None:
        """Change the transform."""
        self.transform = transform

    def __call__(self, row: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        import datasets

        image, label = (row[column] for column in self.columns)
        if isinstance(image, dict):
            image = datasets.Image().decode_example(image)
        return self.transform(image.convert("RGB")), torch.tensor(self.class_index(label))


def file_names(table: Any, column: str) -> list[str | None]:
    """Return the file name of each image of a table, where it is known."""
    images = table.with_format("arrow")[column]
    images = images.combine_chunks() if hasattr(images, "combine_chunks") else images
    return [name and Path(name).name for name in images.field("path").to_pylist()]


def _classes(entry: str) -> list[str]:
    preset = entry.removeprefix("preset:")
    return [entry] if preset == entry else list(find_preset(preset).name_classes([], preset))


def _default_templates(path: str | Mapping[str, str]) -> list[str]:
    if isinstance(path, str) and path.startswith("builtin:"):
        from tva.data.builtin import BUILTIN_SETS

        known = BUILTIN_SETS.get(path.removeprefix("builtin:"))
        return list(known.templates) if known else []  # an unknown name is refused, with the known ones, when loaded
    return ["a photo of a {}."]
