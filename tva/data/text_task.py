"""A labeled text data set as one task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from tva.data.task import LabeledTask
from tva.state_dict import some

PADDING = -1  # in token ids: no tokenizer has it, so that no attention mask must travel with them


class TextTask(LabeledTask):
    """One text classification task over Hugging Face `datasets`, split as `ImageTask` does.

    Batches are ``tokens, labels``: int64 token ids of the model's own tokenizer, shape (batch, length), padded at the
    end with -1 to the longest of the batch; and int64 class indices, shape (batch,). The order of training depends on
    the run's seed alone: n ranks with batch size b see the batches of one rank with batch size n · b, whatever the
    number of workers.

    Args:
        path: A local parquet, arrow, csv or json file, where ``{split}`` stands for the split's name; a folder of them
            or one written by ``save_to_disk``; a mapping from split to file; or the name of a data set on the Hugging
            Face hub. Environment variables (``$DATA``) are filled in.
        name: Name in log keys and reports; by default the last part of ``path``.
        config: Configuration of a hub data set, such as ``sst2``.
        revision: Revision of a hub data set, so that the data cannot change under you.
        text_column: Column that holds the texts.
        label_column: Column that holds the labels: class indices, or class names.
        class_names: Names in the order of the labels; by default the data set's own.
        class_descriptions: Class name to one or several texts that describe it, which a head of class descriptions is
            made of; by default its name.
        templates: What descriptions are put into, in the place of ``{}``.
        max_length: Tokens of a text at most; the rest is cut off.
        train_split: Split to train on.
        val_split: Split to choose on. By default a part of the training split is held out: min(10 %, 5,000) examples,
            the paper's rule.
        val_size: Hold out so many training examples instead, where there is no ``val_split``.
        test_split: Split to report on.
        where: Keep the rows whose column holds one of the given values, such as ``{label: [spam]}``.
        batch_size: Examples a batch, on each rank.
        num_workers: Processes that make batches.
        seed: Of the held-out part, so that it is the same in every run.
        limit_train: Train on so many examples at most, the first of a seeded shuffle.
        limit_val: Validate on so many at most, likewise.
        limit_test: Test on so many at most, likewise.

    Raises:
        FileNotFoundError: A local file is not there.
        ValueError: A column, a split or a class is not in the data set, or a class has no description; the message
            names those that are there.
    """

    column_options = ("text_column", "label_column")

    def __init__(
        self,
        path: str | dict[str, str],
        name: str | None = None,
        config: str | None = None,
        revision: str | None = None,
        text_column: str = "text",
        label_column: str = "label",
        class_names: list[str] | None = None,
        class_descriptions: dict[str, list[str] | str] | None = None,
        templates: list[str] | None = None,
        max_length: int = 128,
        train_split: str = "train",
        val_split: str | None = None,
        val_size: int | None = None,
        test_split: str = "test",
        where: dict[str, Any] | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        limit_train: int | None = None,
        limit_val: int | None = None,
        limit_test: int | None = None,
    ) -> None:
        super().__init__(
            path=path,
            name=name,
            config=config,
            revision=revision,
            splits={"train": train_split, "val": val_split, "test": test_split},
            val_size=val_size,
            where=where,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            limits={"train": limit_train, "val": limit_val, "test": limit_test},
        )
        self.text_column = text_column
        self.label_column = label_column
        self.class_names = list(class_names or [])
        self.class_descriptions = None if class_descriptions is None else dict(class_descriptions)
        self.templates = list(templates) if templates is not None else ["{}"]
        self.max_length = max_length
        self._tokenizer: Any = None

    def setup(self, stage: str | None = None) -> None:
        tokenizer = tokenizer_of(self, self.max_length)
        if tokenizer is self._tokenizer:
            return
        examples = {}
        for part, table in self._select().items():
            ids = tokenize(tokenizer, texts_of(self, table, "text_column"), self.max_length)
            examples[part] = TokenExamples(ids, self._read_labels(table))
        self._check_descriptions()
        self._examples, self._tokenizer = examples, tokenizer

    def _check_descriptions(self) -> None:
        described = self.class_descriptions
        if described is None:
            return
        missing = [name for name in self.class_names if not described.get(name)]
        unknown = [name for name in described if name not in self.class_names]
        if missing or unknown:
            raise ValueError(
                f"{self.name}: class_descriptions must describe each class by its name, {some(self.class_names, 8)}; "
                + " and ".join(
                    [f"{some(missing)} has none"] * bool(missing) + [f"{some(unknown)} is no class"] * bool(unknown)
                )
                + "."
            )

    @staticmethod
    def collate(examples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Make a batch; tokens are padded at the end."""
        tokens, labels = zip(*examples, strict=True)
        return pad_sequence(tokens, batch_first=True, padding_value=PADDING), torch.stack(labels)


class TokenExamples(Dataset):
    """Token ids of different lengths with labels.

    Args:
        ids: One array an example.
        labels: Class indices, shape (examples,).
    """

    def __init__(self, ids: Sequence[np.ndarray], labels: Tensor) -> None:
        self.ids = ids
        self.labels = labels

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.ids[index]).long(), self.labels[index]


def tokenizer_of(task: Any, length: int) -> Any:
    """Give the tokenizer of the model that a task is used with, after checking that it takes so many tokens."""
    model = getattr(task.trainer, "lightning_module", None)
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise TypeError(
            f"{type(task).__name__} needs a model that says how texts reach it: a transformers tokenizer as its "
            f"attribute tokenizer, and {type(model).__name__} has none."
        )
    longest = getattr(model, "max_length", None)
    if longest is not None and length > longest:
        raise ValueError(
            f"{task.name}: {type(model).__name__} takes {longest} tokens at most, and {length} are asked for. Lower "
            f"{'max_length' if hasattr(task, 'max_length') else 'block_length'}."
        )
    return tokenizer


def texts_of(task: Any, table: Any, option: str) -> list[str]:
    """Read a column of texts."""
    column = getattr(task, option)
    texts = list(table[column])
    odd = [index for index, text in enumerate(texts) if not isinstance(text, str)]
    if odd:
        raise ValueError(
            f"{task.name}: the column {column!r} must hold texts; row {odd[0]} holds {texts[odd[0]]!r} "
            f"({len(odd)} such rows). Set {option} to another column, or leave those rows out."
        )
    return texts


def tokenize(tokenizer: Any, texts: list[str], max_length: int | None = None, special: bool = True) -> list[np.ndarray]:
    """Turn texts into int32 token ids, cut at ``max_length``."""
    found = tokenizer(
        texts,
        add_special_tokens=special,
        truncation=max_length is not None,
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    return [np.array(ids, dtype=np.int32) for ids in found]
