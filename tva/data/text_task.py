"""A labeled text data set as one task."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from tva.data.labeled_task import LabeledTask
from tva.errors import some

PADDING = -1  # in token ids: no tokenizer has it, so that no attention mask must travel with them


class TextTask(LabeledTask):
    """One text classification task over Hugging Face `datasets`.

    Batches are ``tokens, labels``: int64 token ids of the model's own tokenizer, shape (batch, length), padded at the
    end with -1 to the longest of the batch; and int64 class indices, shape (batch,). The order of training depends on
    the run's seed only: n ranks with batch size b see the batches of one rank with batch size n · b, whatever the
    number of workers.

    Args:
        path: A local parquet, arrow, csv or json file, where ``{split}`` stands for the split's name; a folder of them
            or one written by ``save_to_disk``; a mapping from split to file; or the name of a data set on the Hugging
            Face hub. Environment variables (``$DATA``) are expanded.
        text_column: Column that holds the texts.
        label_column: Column that holds the labels: class indices, or class names.
        class_names: Names in the order of the labels; by default the data set's own.
        class_descriptions: Class name to one or several texts that describe it, which a head of class descriptions is
            made of; by default its name.
        templates: What descriptions are put into, in place of ``{}``.
        max_length: Maximum number of tokens of a text; the rest is cut off.
        **options: Options of `tva.data.labeled_task.LabeledTask`.

    Raises:
        FileNotFoundError: A local file is missing.
        ValueError: A column, a split or a class is not in the data set, or a class has no description; the message
            lists what there is.
    """

    column_options = ("text_column", "label_column")

    def __init__(
        self,
        path: str | dict[str, str],
        text_column: str = "text",
        label_column: str = "label",
        class_names: list[str] | None = None,
        class_descriptions: dict[str, list[str] | str] | None = None,
        templates: list[str] | None = None,
        max_length: int = 128,
        **options: Any,
    ) -> None:
        super().__init__(path, **options)
        self.text_column = text_column
        self.label_column = label_column
        self.class_names = list(class_names or [])
        self.class_descriptions = None if class_descriptions is None else dict(class_descriptions)
        self.templates = list(templates) if templates is not None else ["{}"]
        self.max_length = max_length
        self._tokenizer: Any = None

    def setup(self, stage: str | None = None) -> None:
        tokenizer = tokenizer_of(self, self.max_length)
        self._check_streaming(stage)
        if tokenizer is self._tokenizer:
            return
        examples: dict[str, Any] = {}
        if self.streaming:
            examples = self._make_streams(self._stream_tables(), TextRow(self, tokenizer))
        else:
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
                    [f"{some(missing)} has none"] * bool(missing) + [f"{some(unknown)} is not a class"] * bool(unknown)
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
        ids: One array per example.
        labels: Class indices, shape (examples,).
    """

    def __init__(self, ids: Sequence[np.ndarray], labels: Tensor) -> None:
        self.ids = ids
        self.labels = labels

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.ids[index]).long(), self.labels[index]


class TextRow:
    """Make an example from a row of a stream.

    Args:
        task: Says which columns, how long, and what the classes are.
        tokenizer: The model's.
    """

    def __init__(self, task: TextTask, tokenizer: Any) -> None:
        self.label_column, self.max_length = task.label_column, task.max_length
        self.text = TextReader(task, "text_column")
        self.class_index = task.label_reader()
        self.tokenizer = tokenizer

    def __call__(self, row: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        (ids,) = tokenize(self.tokenizer, [self.text(row)], self.max_length)
        return torch.from_numpy(ids).long(), torch.tensor(self.class_index(row[self.label_column]))


class TextReader:
    """Reads the text of a row of a stream.

    Args:
        task: Whose column it is.
        option: The task's option that names the column.
        column: Which of those that it names, where it names several.
    """

    def __init__(self, task: Any, option: str, column: str | None = None) -> None:
        self.task, self.option, self.column = task.name, option, column or getattr(task, option)

    def __call__(self, row: Mapping[str, Any]) -> str:
        text = row[self.column]
        if not isinstance(text, str):
            raise ValueError(
                f"{self.task}: the column {self.column!r} must hold texts; a row holds {text!r}. Set {self.option} to "
                f"another column."
            )
        return text


def tokenizer_of(task: Any, length: int) -> Any:
    """Return the tokenizer of the model that a task is used with, after checking that it takes ``length`` tokens."""
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
            f"{task.name}: {type(model).__name__} takes {longest} tokens at most, but {length} are requested. Lower "
            f"{'max_length' if hasattr(task, 'max_length') else 'block_length'}."
        )
    return tokenizer


def texts_of(task: Any, table: Any, option: str, column: str | None = None) -> list[str]:
    """Read a column of texts."""
    column = column or getattr(task, option)
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
