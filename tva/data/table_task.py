"""Any table as one task: text or image columns, a label or a target, split by file, column or fraction."""

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tva.data.examples import IGNORED, Encoded, ImageFiles, Images, collate, padded
from tva.data.labeled_task import LabeledTask
from tva.data.language_task import LanguageTask, PairMaker, Pairs, metrics_by_name
from tva.data.text_task import texts_of, tokenize, tokenizer_of
from tva.errors import some

_VAL_NAMES = ("val", "validation", "valid", "dev")


class TableTask(LabeledTask):
    """One task over any table: CSV, parquet, arrow, JSON or JSON lines files, or a data set of the hub.

    Batches are ``inputs, targets`` as tva's models take them. Of one text column inputs are token ids of the model's
    tokenizer, padded with -1; of two, the pair in one text (or apart, for sentence similarity); of an image column what
    the model's image processor makes. Targets are class indices (``label_column``) or numbers or texts
    (``target_column``); a text column of lists of words with a label column of as many labels is token classification.
    For a language model, texts are prompts and targets what should follow; without a target column every row is a text.

    Args:
        path: A local csv, tsv, parquet, arrow, json or jsonl file, where ``{split}`` stands for the split's name; a
            folder of them or one written by ``save_to_disk``; a mapping from split to file; or the name of a data set
            on the Hugging Face hub. Environment variables (``$DATA``) are expanded.
        text_column: Column of texts, or two columns for pairs; ``text`` where there is no ``image_column``.
        image_column: Column of images, or of paths of image files, relative to the table's folder.
        label_column: Column of classes: indices or names; ``label`` where there is no ``target_column``.
        target_column: Column of numbers to predict, of lists of them (several labels at once), or of texts to generate.
        class_names: Names in the order of the model's classes, where neither the model nor the data name them.
        split_column: Column that names each row's split.
        split_fractions: Split to the part of the rows that it gets, such as ``{val: 0.1, test: 0.2}``; drawn by
            ``seed``, with ``group`` in whole groups; the rest is for training.
        metric: How the task is measured, besides what the model logs: the name of a metric of torchmetrics, such as
            ``f1_score`` or ``mean_squared_error``, ``spearman``, those of `LanguageTask` for a language model, or the
            dotted path of a function of ``preds`` and ``target`` (texts that were generated, and those wanted, of a
            language model); or a list of these.
        max_length: Maximum number of tokens of a text; the rest is cut off. By default the model's, at most 512.
        **options: Options of `tva.data.labeled_task.LabeledTask`. A split called val, validation, valid or dev is the
            validation split.

    Raises:
        FileNotFoundError: A local file is missing.
        ValueError: A column, a split or a class is not in the table; the message lists what there is.
    """

    prompt = "{}"

    def __init__(
        self,
        path: str | dict[str, str],
        text_column: str | list[str] | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        target_column: str | None = None,
        class_names: list[str] | None = None,
        split_column: str | None = None,
        split_fractions: dict[str, float] | None = None,
        metric: str | list[str] | None = None,
        max_length: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(path, **options)
        if image_column is not None and text_column is not None:
            raise ValueError(f"{self.name}: give text_column or image_column, not both; models take one of them.")
        if label_column is not None and target_column is not None:
            raise ValueError(f"{self.name}: give label_column (classes) or target_column (numbers, texts), not both.")
        if split_column is not None and split_fractions is not None:
            raise ValueError(f"{self.name}: give split_column or split_fractions, not both.")
        texts = [text_column] if isinstance(text_column, str) else list(text_column or [])
        self.text_columns = texts or ([] if image_column else ["text"])
        if len(self.text_columns) > 2:
            raise ValueError(f"{self.name}: text_column takes one column, or two for pairs; found {len(texts)}.")
        self.image_column = image_column
        self.label_column = label_column or ("" if target_column else "label")
        self.target_column = target_column
        self.class_names = list(class_names or [])
        self.split_column = split_column
        self.split_fractions = _checked_fractions(self.name, split_fractions)
        self.max_length = max_length
        self.prompt_column, self.second_column = [*self.text_columns, None, None][:2]
        self.tva_metrics = metrics_by_name(metric)
        self._given_names = list(self.class_names)
        self.block_length = max_length or 512
        self._made_for: Any = None

    # --- splits

    def _split_tables(self) -> dict[str, Any]:
        splits = dict(self._load_splits())
        if self.split_column is None and self.split_fractions is None:
            return splits
        if len(splits) > 1:
            option = "split_column" if self.split_column else "split_fractions"
            raise ValueError(f"{self.name} has the splits {some(splits, 8)} already, so that {option} cannot split it.")
        (table,) = splits.values()
        if self.split_column is not None:
            self._check_column(table, "split_column", self.split_column)
            names = np.asarray([str(name) for name in table[self.split_column]])
            return {name: table.select(np.flatnonzero(names == name)) for name in dict.fromkeys(names.tolist())}
        assert self.split_fractions is not None
        places, found = self._places(table, list(self.split_fractions.values())), {}
        for place, (name, fraction) in enumerate(self.split_fractions.items()):
            rows = np.flatnonzero(places == place)
            if not len(rows):
                unit = "rows" if self.group is None else "rows in whole groups"
                raise ValueError(
                    f"{self.name}: {fraction:g} of {len(table)} {unit} for {name!r} are none. Give it more."
                )
            found[name] = table.select(rows)
        rest = np.flatnonzero(places == len(found))
        return {**found, **({self.splits["train"] or "train": table.select(rest)} if len(rest) else {})}

    def _places(self, table: Any, fractions: Sequence[float]) -> np.ndarray:
        """Return the number of each row's split, drawn by ``seed``; the rest has the number after the last."""
        generator = np.random.default_rng(self.seed)
        if self.group is None:
            places, order = np.full(len(table), len(fractions)), generator.permutation(len(table))
            start = 0
            for place, fraction in enumerate(fractions):
                stop = start + round(fraction * len(table))
                places[order[start:stop]], start = place, stop
            return places
        _, index, sizes = np.unique(np.asarray(self._group_labels(table)), return_inverse=True, return_counts=True)
        order = generator.permutation(len(sizes))
        middles = (sizes[order].cumsum() - sizes[order] / 2) / len(table)  # a group goes where its middle is
        of_group = np.empty(len(sizes), dtype=np.int64)
        of_group[order] = np.searchsorted(np.cumsum(fractions) + 1e-9, middles)
        return of_group[index]

    def _check_column(self, table: Any, option: str, column: str) -> None:
        if column not in table.column_names:
            raise ValueError(
                f"{self.name} has no column {column!r}; its columns are {some(table.column_names, 8)}. Set {option} to "
                f"one of them."
            )

    def _columns(self, generates: bool) -> dict[str, str]:
        found = dict.fromkeys(self.text_columns, "text_column")
        for option in ("image_column", "target_column", "label_column"):
            column = getattr(self, option)
            if column and not (generates and option == "label_column"):
                found[column] = option
        return {option: column for column, option in found.items()} | {
            f"text_column {column}": column for column in self.text_columns
        }

    def _select_parts(self, generates: bool) -> dict[str, Any]:
        """Return the rows of each part as a table; train may be missing where validation data are given."""
        splits = self._split_tables()
        val = self.splits["val"] or next((name for name in _VAL_NAMES if name in splits), None)
        names = {"train": self.splits["train"], "val": val, "test": self.splits["test"]}
        tables = {part: splits[name] for part, name in names.items() if name in splits}
        required = ["test", "val" if self.splits["val"] or val else "train"]
        missing = [names[part] for part in required if part not in tables]
        if missing:
            raise ValueError(
                f"{self.name} has no split {some(missing)}; its splits are {some(splits, 8)}. Set train_split, "
                f"val_split and test_split to those, give path as a mapping from split to file, or split the rows by "
                f"split_column or split_fractions."
            )
        for table in tables.values():
            for option, column in self._columns(generates).items():
                self._check_column(table, option.split()[0], column)
        rows = {part: self._filter(table, self.where) for part, table in tables.items()}
        if "val" not in rows:
            self._hold_out(rows, self._group_labels(tables["train"]))
            tables["val"] = tables["train"]
        return self._grouped(self._limited(rows, tables))

    # --- examples

    def setup(self, stage: str | None = None) -> None:
        model = getattr(self.trainer, "lightning_module", None)
        if self.streaming:
            raise ValueError(f"{self.name}: TableTask keeps its rows in memory. Leave streaming out.")
        if self._made_for is model and model is not None:
            return
        self.class_names = list(self._given_names)
        self.block_length = self.max_length or min(getattr(model, "max_length", None) or 512, 512)
        generates = hasattr(model, "encoder_decoder")
        parts = self._select_parts(generates)
        if stage == "fit" and "train" not in parts:
            raise ValueError(f"{self.name} has no split {self.splits['train']!r} to train on. Set train_split.")
        if generates:
            examples = {part: self._texts_to_generate(table, model) for part, table in parts.items()}
            self.collate = LanguageTask.collate
        else:
            examples = self._inputs_and_targets(parts, model)
            self.collate = collate
        self._examples, self._made_for = examples, model

    def _texts_to_generate(self, table: Any, model: Any) -> Dataset:
        tokenizer = tokenizer_of(self, self.block_length)
        prompts = texts_of(self, table, "prompt_column")
        if self.second_column is not None:
            raise ValueError(f"{self.name}: a language model takes one text_column, and target_column beside it.")
        if self.target_column is None:
            if model.encoder_decoder:
                raise ValueError(f"{self.name}: {type(model).__name__} answers prompts. Set target_column.")
            ids = tokenize(tokenizer, prompts, self.block_length)
            return Pairs(ids, ids)
        return PairMaker(self, tokenizer, model.encoder_decoder).make(prompts, texts_of(self, table, "target_column"))

    def _inputs_and_targets(self, parts: Mapping[str, Any], model: Any) -> dict[str, Dataset]:
        words = not self.image_column and isinstance(next(iter(parts["test"][self.text_columns[0]]), None), list)
        if self.label_column:
            labels = [label for table in parts.values() for label in _flat(table[self.label_column])]
            self.class_names = self._names_of(parts["test"], labels, model)
        if words:
            return {part: self._labeled_words(table) for part, table in parts.items()}
        found: dict[str, Dataset] = {}
        for part, table in parts.items():
            targets = self._read_targets(table)
            if self.image_column:
                found[part] = Images(self._images(table), targets, self._transform(model))
            else:
                found[part] = Encoded(self._encode(table, model), targets)
        return found

    def _encode(self, table: Any, model: Any) -> list[Tensor]:
        tokenizer = tokenizer_of(self, self.block_length)
        texts = texts_of(self, table, "prompt_column")
        if self.second_column is None:
            return [torch.from_numpy(ids).long() for ids in tokenize(tokenizer, texts, self.block_length)]
        others = texts_of(self, table, "second_column")
        if getattr(model, "encodes_apart", False):
            pairs = zip(*(tokenize(tokenizer, side, self.block_length) for side in (texts, others)), strict=True)
        else:
            found = tokenizer(texts, others, truncation=True, max_length=self.block_length, verbose=False)
            types = found.get("token_type_ids") or [[0] * len(ids) for ids in found["input_ids"]]
            pairs = zip(found["input_ids"], types, strict=True)
        return [padded([torch.as_tensor(np.asarray(side)).long() for side in pair]) for pair in pairs]

    def _labeled_words(self, table: Any) -> Dataset:
        tokenizer = tokenizer_of(self, self.block_length)
        inputs, targets = [], []
        for words, labels in zip(table[self.text_columns[0]], table[self.label_column], strict=True):
            if not isinstance(labels, list) or len(words) != len(labels):
                raise ValueError(
                    f"{self.name}: a row of words in {self.text_columns[0]!r} must have as many labels in "
                    f"{self.label_column!r}; found {len(words)} words and {str(labels)[:60]}."
                )
            found = tokenizer(words, is_split_into_words=True, truncation=True, max_length=self.block_length)
            marks = [
                self._index_of(labels[word]) if word is not None and word != before else IGNORED
                for before, word in itertools.pairwise([None, *found.word_ids()])
            ]
            inputs.append(torch.tensor(found["input_ids"]))
            targets.append(torch.tensor(marks))
        return Encoded(inputs, targets)

    def _images(self, table: Any) -> Sequence[Any]:
        """Return the images of a table, opened when they are read; paths are relative to the table's folder."""
        column = table[self.image_column]
        if not isinstance(next(iter(column), None), str):
            return column
        file = self.path if isinstance(self.path, str) else next(iter(self.path.values()))
        folder = Path(file) if Path(file).is_dir() else Path(file).parent
        paths = [folder / os.path.expandvars(name) for name in column]
        missing = [str(path) for path in paths if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{self.name}: image files were expected where {self.image_column!r} says, relative to {folder}; "
                f"{len(missing)} of {len(paths)} are not there, such as {missing[0]}."
            )
        return ImageFiles(paths)

    def _transform(self, model: Any) -> Callable[[Any], Tensor]:
        transform = getattr(model, "image_transform", None)
        if transform is None:
            raise TypeError(
                f"{self.name}: a model of images must have an image_transform, from a PIL image to a tensor, and "
                f"{type(model).__name__} has none."
            )
        return transform

    # --- targets

    def _read_targets(self, table: Any) -> Sequence[Tensor]:
        if self.target_column is None:
            return torch.tensor([self._index_of(label) for label in table[self.label_column]])
        values = list(table[self.target_column])
        try:
            return torch.tensor(values, dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{self.name}: {self.target_column!r} must hold numbers, or as many of them in every row; a row holds "
                f"{_first_odd(values)!r}. Classes go into label_column, and texts are for language models."
            ) from error

    def _names_of(self, table: Any, labels: Sequence[Any], model: Any) -> list[str]:
        """Return the class names in the order of the model's head, or in that of the data where it names none."""
        feature = (table.features or {}).get(self.label_column)
        own = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
        head, has_head = getattr(model, "label_names", None), hasattr(model, "label_names")
        texts = list(own or sorted({label for label in labels if isinstance(label, str)}))
        if self._given_names:
            order = self._given_names
        elif head and texts and {name.casefold() for name in texts} <= {name.casefold() for name in head}:
            order = head
        elif texts and has_head and (head or not own):
            raise ValueError(
                f"{self.name}: the classes in {self.label_column!r} are {some(texts, 8)}, and those of the model "
                f"{some(head, 8) if head else 'have no names'}. Pass class_names, the table's names in the order of "
                f"the model's classes."
            )
        else:
            order = texts or head or self._numbered(labels, has_head)
        count = len(head) if head else getattr(model, "num_labels", None)
        if count is not None and len(order) > count:
            raise ValueError(
                f"{self.name} has {len(order)} classes ({some(order, 8)}), and the head of {type(model).__name__} has "
                f"{count}. Use a model with a head for these classes."
            )
        known = {name.casefold(): index for index, name in enumerate(order)}
        self._index = {str(name): index for name, index in known.items()}
        # class indices of a table that names them mean these names, if the model has them
        named = own and all(name.casefold() in known for name in own)
        self._indices = [known[name.casefold()] for name in own] if named else list(range(len(order)))
        return list(order)

    def _numbered(self, labels: Sequence[Any], has_head: bool) -> list[str]:
        if not has_head:  # the head is made of the names
            return self._default_class_names([], labels)
        return [str(index) for index in range(max(labels) + 1)]

    def _index_of(self, label: Any) -> int:
        if isinstance(label, str) and label.casefold() in self._index:
            return self._index[label.casefold()]
        if isinstance(label, (int, np.integer)) and 0 <= label < len(self._indices):
            return self._indices[int(label)]
        raise ValueError(
            f"{self.name}: the label {label!r} in {self.label_column!r} is none of the classes "
            f"{some(self.class_names, 8)}, nor their index. Set class_names, or leave those rows out."
        )


def _checked_fractions(name: str, given: dict[str, float] | None) -> dict[str, float] | None:
    if given is not None and (not given or min(given.values()) <= 0 or sum(given.values()) > 1 + 1e-9):
        raise ValueError(f"{name}: split_fractions must be above 0 and at most 1 together; found {given}.")
    return given


def _flat(labels: Iterable[Any]) -> Iterable[Any]:
    for label in labels:
        yield from label if isinstance(label, list) else [label]


def _first_odd(values: Sequence[Any]) -> Any:
    return next((value for value in values if not isinstance(value, (int, float))), values[0])
