"""Examples shared by validation, test and training data, and accuracy below chance."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from tva.evaluation.result import Evaluation

MAX_SHARE = 0.05  # of the test examples: real data sets have copies, up to some per cent
SAMPLE = 1024  # training examples that a task vector's file names at most
PADDING = -1  # at the end of rows of token ids, where no attention mask travels with them


def row_digests(batch: Any) -> list[int]:
    """Hash the inputs of a batch, example by example: a tuple's first part, or the tokens that are not padding."""
    tokens, mask = None, None
    if isinstance(batch, Mapping):
        tokens, mask = batch.get("input_ids"), batch.get("attention_mask")
        batch = next(iter(batch.values())) if tokens is None else tokens
    while isinstance(batch, (list, tuple)):
        batch = batch[0]
    if not isinstance(batch, Tensor) or batch.ndim == 0:
        return []
    if tokens is not None and mask is not None and mask.shape == tokens.shape:
        rows = [row[kept.bool()] for row, kept in zip(batch.detach().cpu(), mask.detach().cpu(), strict=True)]
        return [xxhash.xxh3_64_intdigest(row.contiguous().numpy().tobytes()) for row in rows]
    if batch.dtype in (torch.int64, torch.int32) and batch.ndim == 2 and bool((batch[:, -1:] == PADDING).any()):
        ends = (batch != PADDING).long().mul(torch.arange(1, batch.shape[1] + 1, device=batch.device)).amax(1).tolist()
        rows = [row[:end] for row, end in zip(batch.detach().cpu(), ends, strict=True)]
        return [xxhash.xxh3_64_intdigest(row.contiguous().numpy().tobytes()) for row in rows]
    if batch.dtype == torch.int64 and batch.ndim == 3:  # pairs: the same bytes, whatever the padding of the batch
        pairs = [[part[part != PADDING].numpy().tobytes() for part in row] for row in batch.detach().cpu()]
        return [xxhash.xxh3_64_intdigest(b"".join(pair)) for pair in pairs]
    flat = batch.detach().cpu().contiguous().reshape(len(batch), -1).view(torch.uint8).numpy()
    return [xxhash.xxh3_64_intdigest(row.tobytes()) for row in flat]


def num_shared(one: Evaluation, other: Evaluation) -> int | None:
    """Count the examples of ``other`` that are also in ``one``, by their inputs; None if these are not known.

    Inputs that occur more than once in a split are not counted: they do not tell examples apart.
    """
    if one.row_digests is None or other.row_digests is None:
        return None
    sets: list[np.ndarray] = []
    for rows in (one.row_digests, other.row_digests):
        values, counts = np.unique(rows, return_counts=True)
        sets.append(values[counts == 1])
    return len(np.intersect1d(sets[0], sets[1], assume_unique=True))


def sample_rows(datamodule: Any) -> tuple[int, str] | None:
    """Return how many examples are trained on, and the hashes of a sample of them; None where that is not known.

    Args:
        datamodule: One that has a ``training_sample``, as `tva.data.task.Task` has.
    """
    sample = getattr(datamodule, "training_sample", lambda most: None)(SAMPLE)
    if sample is None:
        return None
    num_examples, batches = sample
    rows = [row for batch in batches for row in row_digests(batch)]
    return (num_examples, "".join(f"{row:016x}" for row in rows)) if rows else None


def num_trained_on(num_examples: int, rows: str, evaluation: Evaluation) -> int | None:
    """Return how many of the evaluated examples were trained on: estimated, where only a sample of those is known.

    Args:
        num_examples: How many were trained on.
        rows: Hashes of a sample of them, or of all; see `sample_rows`.
        evaluation: Of any model on the examples; those whose inputs occur more than once are not counted.

    Returns:
        None where the inputs of the evaluation are not known.
    """
    if evaluation.row_digests is None:
        return None
    sample = np.frombuffer(bytes.fromhex(rows), dtype=">u8").astype(np.uint64)
    values, counts = np.unique(evaluation.row_digests, return_counts=True)
    found = int(np.isin(np.unique(sample), values[counts == 1]).sum())
    return min(evaluation.num_examples, round(found * max(1.0, num_examples / len(sample))))


def check_shared(
    val: Mapping[str, Evaluation], test: Mapping[str, Evaluation], allowed: bool = False
) -> dict[str, int]:
    """Return by task how many test examples the coefficient was chosen on, where there are any.

    Args:
        val: The base's evaluations of the tasks that the coefficient was chosen on, by task, on validation data.
        test: The same on test data.
        allowed: Whether any number is accepted.

    Raises:
        ValueError: Validation and test data of a task are the same, or share more than 5% of the test examples.
    """
    found: dict[str, int] = {}
    for task in val.keys() & test.keys():
        same = val[task].data_digest is not None and val[task].data_digest == test[task].data_digest
        shared = test[task].num_examples if same else num_shared(val[task], test[task])
        if not shared:
            continue
        if not allowed and (same or shared > MAX_SHARE * test[task].num_examples):
            raise ValueError(
                f"A coefficient must be proved on examples that it was not chosen on, but of the "
                f"{test[task].num_examples:,} test examples of {task} {shared:,} are among its validation examples. "
                f"Give the task another val_split or test_split (or val_size, for a part of the training data), or "
                f"pass allow_shared_examples if that is meant."
            )
        found[task] = shared
    return dict(sorted(found.items()))


def chance_accuracy(edited: Evaluation, base: Evaluation) -> float | None:
    """Return the accuracy that a model's predictions would have if they did not depend on the input.

    Args:
        edited: Of the model.
        base: Of the base on the same examples, whose labels are known.

    Returns:
        The sum over classes of the predicted share times the share of labels: 1 / 2 for two balanced classes, and a
        model's own accuracy where it always predicts one class. None where predictions or labels are not known.

    Source: Cohen, "A coefficient of agreement for nominal scales", 1960.
    """
    if edited.predicted is None or base.labels is None or len(edited.predicted) != len(base.labels):
        return None
    num = int(max(edited.predicted.max(), base.labels.max())) + 1
    shares = [np.bincount(classes, minlength=num) / len(classes) for classes in (edited.predicted, base.labels)]
    return float(shares[0] @ shares[1])
