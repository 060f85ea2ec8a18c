"""Running text, or prompts with targets, as one task for a language model."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from tva.data.task import Task
from tva.data.text_task import PADDING, TextReader, texts_of, tokenize, tokenizer_of

IGNORED = -100  # a target that no loss is taken of; what torch's cross-entropy leaves out by default


class LanguageTask(Task):
    """One language modeling task: running text that is cut into blocks, or prompts with targets.

    Batches are mappings: ``tokens``, int64 token ids of the model's own tokenizer, shape (batch, length), padded at the
    end with -1; and ``targets``, what is to be predicted, padded with -100. For a causal model targets are where their
    tokens are, and prompts have none; for a sequence-to-sequence model tokens are the prompt and targets the answer.

    Running text: all rows of a split are put one after the other, each with the tokenizer's own beginning and end, and
    cut into blocks of ``block_length``; what does not fill the last one is left out. A sequence-to-sequence model gets
    the first half of a block as prompt and the second as target. Documents are independent, not blocks: the held-out
    part is made of whole documents, and they are the unit of intervals and the gate. A document is a row, or the rows
    of one ``group``, and a block is of the document that most of it is from. A text file is one document; then blocks
    are held out and taken as independent.

    The order of training depends only on the run's seed, as with `TextTask`.

    Args:
        path: A local ``.txt`` or ``.txt.gz`` file (running text), or a parquet, arrow, csv or json file, where
            ``{split}`` stands for the split's name; a folder of the latter or one written by ``save_to_disk``; a
            mapping from split to file; or the name of a data set on the Hugging Face hub. Environment variables
            (``$DATA``) are expanded.
        text_column: Column that holds running text; unused where there are prompts.
        prompt_column: Column that holds prompts, or several columns of which a prompt is made; together with
            ``target_column``.
        target_column: Column that holds what should follow: texts, or class indices of a set that names its classes.
        prompt: Template in which ``{}`` stands for the prompt, such as ``"review: {} sentiment:"``; with several
            columns, one ``{}`` for each.
        metric: Metric of the text written after prompts, in addition to what the model logs: ``exact_match``,
            ``rougeL``, ``text_matthews``, ``text_f1:LABEL``, ``token_f1`` or the dotted path of a function of ``preds``
            and ``target``; or ``text_perplexity``, the mean over examples of each one's perplexity; or a list of these.
        block_length: Number of tokens of a block. With prompts, the maximum number of tokens of a prompt with its
            target (causal models: the prompt's beginning is cut off) or of each of the two (sequence-to-sequence
            models: their ends are cut off).
        **options: Options of `tva.data.task.Task`; limits count blocks, where text is cut into them.

    Raises:
        FileNotFoundError: A local file is missing.
        ValueError: A column or split is not in the data set, the text does not fill a block, or a target is empty.
    """

    def __init__(
        self,
        path: str | dict[str, str],
        text_column: str = "text",
        prompt_column: str | list[str] | None = None,
        target_column: str | None = None,
        prompt: str = "{}",
        metric: str | list[str] | None = None,
        block_length: int = 256,
        **options: Any,
    ) -> None:
        super().__init__(path, **options)
        if (prompt_column is None) != (target_column is None):
            raise ValueError(
                f"prompt_column and target_column go together; found {prompt_column!r} and {target_column!r}. Give "
                f"both, or neither for running text."
            )
        several = len(prompt_column) if isinstance(prompt_column, list) else 1
        if "{}" not in prompt or (several > 1 and prompt.count("{}") != several):
            raise ValueError(
                f"prompt must hold {{}} where {'each column' if several > 1 else 'a prompt'} goes; found {prompt!r}."
            )
        self.text_column = text_column
        self.prompt_column = prompt_column
        self.target_column = target_column
        self.prompt = prompt
        self.block_length = block_length
        self.tva_metrics = metrics_by_name(metric)
        self.column_options = ("text_column",) if prompt_column is None else ("prompt_column", "target_column")
        self._made_for: Any = None

    def setup(self, stage: str | None = None) -> None:
        tokenizer = tokenizer_of(self, self.block_length)
        self._check_streaming(stage)
        split_in_two = bool(getattr(self.trainer.lightning_module, "encoder_decoder", False))
        if self._made_for == (tokenizer, split_in_two):
            return
        if self.prompt_column is None:
            self._examples = self._running_text(tokenizer, split_in_two)
        else:
            self._examples = self._prompts(tokenizer, split_in_two)
        self._made_for = tokenizer, split_in_two

    def _running_text(self, tokenizer: Any, split_in_two: bool) -> dict[str, Any]:
        if self.streaming:
            finish = functools.partial(block_example, split_in_two=split_in_two)
            return self._make_streams(self._stream_tables(), finish, BlockCutter(self, tokenizer))
        return {part: Blocks(rows, split_in_two) for part, rows in self._blocks(tokenizer).items()}

    def _prompts(self, tokenizer: Any, split_in_two: bool) -> dict[str, Any]:
        if self.streaming:
            tables = self._stream_tables()
            names = self._value_names(tables["train"], self.target_column or "")
            return self._make_streams(tables, PairMaker(self, tokenizer, split_in_two, names))
        return {part: self._pairs(table, tokenizer, split_in_two) for part, table in self._select().items()}

    def _blocks(self, tokenizer: Any) -> dict[str, np.ndarray]:
        tables, cut, owners = self._tables(self._load_splits()), {}, {}
        for part in ("train", "test") if self.splits["val"] is None else ("train", "val", "test"):
            table = tables[part].select(self._filter(tables[part], self.where))
            documents = [ended(ids, tokenizer) for ids in tokenize(tokenizer, texts_of(self, table, "text_column"))]
            tokens = np.concatenate([*documents, np.zeros(0, np.int32)])
            if len(tokens) < self.block_length:
                raise ValueError(
                    f"{self.name}: the {part} text has {len(tokens)} tokens, fewer than one block of "
                    f"{self.block_length}. Lower block_length, or give more text."
                )
            cut[part] = tokens[: len(tokens) // self.block_length * self.block_length].reshape(-1, self.block_length)
            labels = self._group_labels(table)
            if labels is not None or len(documents) > 1:
                names = np.arange(len(documents)) if labels is None else np.unique(labels, return_inverse=True)[1]
                owners[part] = owners_of(names, list(map(len, documents)), self.block_length)
        rows = {part: np.arange(len(blocks)) for part, blocks in cut.items()}
        several = self.group is not None or len(np.unique(owners.get("train", ()))) > 1
        self._hold_out(rows, owners["train"] if several else None)
        rows = {part: self._limit(part, indices) for part, indices in rows.items()}
        source = {part: part if part in cut else "train" for part in ("val", "test")}
        self._groups = {part: owners[of][rows[part]] for part, of in source.items() if of in owners}
        return {part: cut.get(part, cut["train"])[indices] for part, indices in rows.items()}

    def _pairs(self, table: Any, tokenizer: Any, split_in_two: bool) -> Pairs:
        prompts = prompts_of(self, table)
        names = self._value_names(table, self.target_column or "")
        if names:
            answers = [names[label] for label in table[self.target_column]]
        else:
            answers = texts_of(self, table, "target_column")
        empty = [index for index, answer in enumerate(answers) if not answer.strip()]
        if empty:
            raise ValueError(
                f"{self.name}: a target must hold text; {len(empty)} of {len(answers)} are empty, the first in row "
                f"{empty[0]}. Leave those rows out."
            )
        return PairMaker(self, tokenizer, split_in_two, names).make(prompts, answers)

    @staticmethod
    def collate(examples: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Make a batch, padded at the end."""
        tokens, targets = zip(*examples, strict=True)
        return {
            "tokens": pad_sequence(tokens, batch_first=True, padding_value=PADDING),
            "targets": pad_sequence(targets, batch_first=True, padding_value=IGNORED),
        }


def owners_of(names: np.ndarray, lengths: Sequence[int], block_length: int) -> np.ndarray:
    """Return for each block of a text the document that most of its tokens are of, the first of several.

    Args:
        names: A number for each document, shape (documents,); the same for rows of one document.
        lengths: Tokens of each.
        block_length: Tokens of a block; what does not fill the last one is left out.

    Example:
        >>> owners_of(np.array([0, 1, 2]), [5, 2, 6], 4)
        array([0, 1, 2])
    """
    tokens = np.repeat(names, lengths)
    blocks = tokens[: len(tokens) // block_length * block_length].reshape(-1, block_length)
    return np.array([np.bincount(block).argmax() for block in blocks], dtype=np.int64)


class Blocks(Dataset):
    """Blocks of running text.

    Args:
        blocks: Token ids, shape (blocks, length).
        split_in_two: Whether the second half is the target of the first; else every token is.
    """

    def __init__(self, blocks: np.ndarray, split_in_two: bool) -> None:
        self.blocks = blocks
        self.split_in_two = split_in_two

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return block_example(self.blocks[index], self.split_in_two)


def block_example(ids: np.ndarray, split_in_two: bool) -> tuple[Tensor, Tensor]:
    """Make an example of a block of token ids."""
    block = torch.from_numpy(ids).long()
    middle = len(block) // 2
    return (block[:middle], block[middle:]) if split_in_two else (block, block)


class BlockCutter:
    """Cuts blocks out of the texts of a stream's rows; what fills none at the end is left out.

    Args:
        task: Says which column, and how long a block is.
        tokenizer: The model's.
    """

    def __init__(self, task: LanguageTask, tokenizer: Any) -> None:
        self.text, self.length, self.tokenizer = TextReader(task, "text_column"), task.block_length, tokenizer

    def __call__(self, rows: Iterable[Mapping[str, Any]], at_once: int) -> Iterator[np.ndarray]:
        rows, left = iter(rows), np.zeros(0, np.int32)
        while texts := [self.text(row) for row in islice(rows, at_once)]:
            left = np.concatenate([left, *(ended(ids, self.tokenizer) for ids in tokenize(self.tokenizer, texts))])
            whole = len(left) // self.length * self.length
            yield from left[:whole].reshape(-1, self.length)
            left = left[whole:]


class PairMaker:
    """Makes tokens and targets of prompts and answers.

    Args:
        task: Says which columns, what prompts are put into, and how long they may be.
        tokenizer: The model's.
        split_in_two: Whether the model takes prompt and answer apart.
        names: Of the answers, where the target column holds class indices.
    """

    def __init__(
        self, task: LanguageTask, tokenizer: Any, split_in_two: bool, names: Sequence[str] | None = None
    ) -> None:
        self.task, self.prompt, self.block_length = task.name, task.prompt, task.block_length
        self.prompts_of = [TextReader(task, "prompt_column", column) for column in columns_of(task)]
        self.target_of = TextReader(task, "target_column")
        self.tokenizer, self.split_in_two, self.names = tokenizer, split_in_two, names

    def __call__(self, row: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Make an example from a row of a stream."""
        answer = self.names[row[self.target_of.column]] if self.names else self.target_of(row)
        if not answer.strip():
            raise ValueError(f"{self.task}: a target must hold text, and one is empty. Leave such rows out.")
        return self.make([tuple(prompt_of(row) for prompt_of in self.prompts_of)], [answer])[0]

    def make(self, prompts: Sequence[str | tuple[str, ...]], answers: Sequence[str]) -> Pairs:
        """Make examples of as many prompts as answers."""
        prompts = [self._filled(given) for given in prompts]
        tokenizer, longest = self.tokenizer, self.block_length
        if self.split_in_two:
            return Pairs(tokenize(tokenizer, prompts, longest), tokenize(tokenizer, list(answers), longest))
        starts = tokenize(tokenizer, prompts)
        starts = [ids[:-1] if len(ids) and ids[-1] == tokenizer.eos_token_id else ids for ids in starts]
        ends = [ended(ids, tokenizer) for ids in tokenize(tokenizer, list(answers), special=False)]
        tokens, targets = [], []
        for start, end in zip(starts, ends, strict=True):
            end = end[: longest - 1]
            start = start[max(0, len(start) + len(end) - longest) :]
            tokens.append(np.concatenate([start, end]))
            targets.append(np.concatenate([np.full(len(start), IGNORED, np.int32), end]))
        return Pairs(tokens, targets)

    def _filled(self, given: str | tuple[str, ...]) -> str:
        parts = [given] if isinstance(given, str) else list(given)
        pieces = self.prompt.split("{}")
        parts = parts * (len(pieces) - 1) if len(parts) == 1 else parts
        return "".join(text for pair in zip(pieces, [*parts, ""], strict=True) for text in pair)


def metrics_by_name(metric: str | list[str] | None) -> dict[str, str]:
    """Return metrics by the names that they have in objectives: ``f1`` of ``my_package.f1``."""
    metrics = [metric] if isinstance(metric, str) else list(metric or [])
    return {name.partition(":")[0].rpartition(".")[2]: name for name in metrics}


def columns_of(task: Any) -> list[str]:
    """Return the columns of which prompts are made."""
    return [task.prompt_column] if isinstance(task.prompt_column, str) else list(task.prompt_column or [])


def prompts_of(task: Any, table: Any) -> list[str | tuple[str, ...]]:
    """Read a table's prompts, each with all its parts."""
    columns = [texts_of(task, table, "prompt_column", column) for column in columns_of(task)]
    return list(columns[0]) if len(columns) == 1 else list(zip(*columns, strict=True))


class Pairs(Dataset):
    """Tokens with targets, of different lengths.

    Args:
        tokens: One array per example.
        targets: One array per example.
    """

    def __init__(self, tokens: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> None:
        self.tokens = tokens
        self.targets = targets

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.tokens[index]).long(), torch.from_numpy(self.targets[index]).long()


def ended(ids: np.ndarray, tokenizer: Any) -> np.ndarray:
    """Put the tokenizer's end of text behind token ids, where it has one and did not put it there itself."""
    end = tokenizer.eos_token_id
    if end is None or (len(ids) and ids[-1] == end):
        return ids
    return np.append(ids, np.int32(end))
