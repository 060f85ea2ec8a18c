"""Prompts that a language model continues, and what scores its texts, as one task."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from tva.data.scorers import TextScore
from tva.data.text_task import PADDING, tokenize, tokenizer_of

SPLITS = ("val", "test")


class GenerationTask(L.LightningDataModule):
    """Texts that a language model writes after prompts, scored by a function, for example for toxicity.

    The metrics are ``score``, the mean over texts, and ``rate``, the share of texts that score above ``threshold``.
    Examples are prompts, whose samples are averaged; with a single prompt, each text is an example. The random draws of
    a text depend only on ``seed``, the split, the prompt's index and the sample's index, not on the batch size, the
    device or other prompts. So edits are compared on the same draws, and a text changes with the batch size only if two
    tokens are equally likely up to rounding.

    Args:
        prompts: A list of texts; or a file with one prompt per line, where ``{split}`` stands for ``val`` and ``test``;
            or a mapping from these to files or texts. A list of several prompts is split by ``seed``, half for
            validation and half for test; a single prompt is used for both, with different draws.
        scorer: Scorer of the texts: ``swearing``, ``words:FILE``, ``regex:PATTERN``, ``learned:FILE:LABEL,…``,
            ``detoxify``, the name of an entry point or the dotted path of a function; see
            `tva.data.scorers.find_scorer`.
        name: Name of the task in log keys and reports.
        num_samples: Number of texts per prompt.
        max_new_tokens: Maximum number of tokens of a text, without the prompt, which is not scored.
        temperature: Divisor of the logits; 0 always takes the most likely token.
        top_p: Draw from the most likely tokens that together have this probability.
        top_k: Draw from this many most likely tokens; by default from all.
        seed: Seed of the draws.
        threshold: Score above which a text counts in ``rate``.
        higher_is_better: Whether large scores are good; by default what the scorer's attribute says, else False.
        max_length: Maximum number of tokens of a prompt; its beginning is cut off.
        batch_size: Number of prompts per batch.
        limit_val: Use at most this many validation prompts, the first ones; with a single prompt, samples.
        limit_test: Use at most this many test prompts, in the same way.

    Raises:
        FileNotFoundError: A file of prompts is missing.
        ValueError: An option is out of range, or there are no prompts.
    """

    def __init__(
        self,
        prompts: str | list[str] | dict[str, Any],
        scorer: str = "swearing",
        name: str = "generation",
        num_samples: int = 1,
        max_new_tokens: int = 20,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
        threshold: float = 0.5,
        higher_is_better: bool | None = None,
        max_length: int = 64,
        batch_size: int = 16,
        limit_val: int | None = None,
        limit_test: int | None = None,
    ) -> None:
        super().__init__()
        counts = {"num_samples": num_samples, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
        counts |= {"max_length": max_length, "top_k": 1 if top_k is None else top_k}
        wrong = [f"{option} {value}" for option, value in counts.items() if value < 1]
        wrong += [f"temperature {temperature}"] * (temperature < 0) + [f"top_p {top_p}"] * (not 0 < top_p <= 1)
        if wrong:
            raise ValueError(
                f"{name}: counts must be at least 1, temperature at least 0 and top_p in (0, 1]; found "
                f"{', '.join(wrong)}."
            )
        self.name, self.scorer = name, scorer
        self.num_samples, self.max_new_tokens, self.max_length = num_samples, max_new_tokens, max_length
        self.temperature, self.top_p, self.top_k, self.seed = temperature, top_p, top_k, seed
        self.threshold, self.batch_size = threshold, batch_size
        self.score = TextScore(scorer, higher_is_better)
        self.tva_metrics = {"score": self.score, "rate": self.score}
        self.limits = {"val": limit_val, "test": limit_test}
        self._prompts = self._read(prompts)
        self._examples: dict[str, Prompts] = {}
        self._tokenizer: Any = None

    def _read(self, prompts: Any) -> dict[str, list[str]]:
        if isinstance(prompts, str) and "{split}" in prompts:
            prompts = {split: prompts.replace("{split}", split) for split in SPLITS}
        if isinstance(prompts, Mapping):
            if set(prompts) != set(SPLITS):
                raise ValueError(f"{self.name}: prompts by split must have val and test; found {sorted(prompts)}.")
            return {split: self._texts(prompts[split]) for split in SPLITS}
        texts = self._texts(prompts)
        if len(texts) == 1:
            return dict.fromkeys(SPLITS, texts)
        order = np.random.default_rng(self.seed).permutation(len(texts))
        halves = order[: len(texts) // 2], order[len(texts) // 2 :]
        return {split: [texts[row] for row in np.sort(rows)] for split, rows in zip(SPLITS, halves, strict=True)}

    def _texts(self, given: str | Sequence[str]) -> list[str]:
        if isinstance(given, str):
            file = Path(os.path.expandvars(os.path.expanduser(given)))
            if not file.is_file():
                raise FileNotFoundError(
                    f"{self.name}: prompts must be a file with one prompt per line, or a list of texts; there is no "
                    f"file {given!r}. To give one prompt, write [{given!r}]."
                )
            given = file.read_text(encoding="utf-8").splitlines()
        texts = [text for text in given if text.strip()]
        if not texts:
            raise ValueError(f"{self.name}: there must be at least one prompt; found none.")
        return texts

    @property
    def tva_settings(self) -> dict[str, Any]:
        """What the numbers depend on besides prompts and weights; ``edit.json`` has it."""
        names = ("scorer", "threshold", "num_samples", "max_new_tokens", "temperature", "top_p", "top_k", "seed")
        return {name: getattr(self, name) for name in names}

    def setup(self, stage: str | None = None) -> None:
        tokenizer = tokenizer_of(self, self.max_length)
        model = self.trainer.lightning_module
        if not getattr(model, "scores_texts", False):
            raise TypeError(
                f"{self.name}: GenerationTask needs a language model of tva, such as tva.models.CausalLM; "
                f"{type(model).__name__} is none."
            )
        if tokenizer is self._tokenizer:
            return
        for number, split in enumerate(SPLITS):
            ids = [self._cut(row, tokenizer) for row in tokenize(tokenizer, self._prompts[split])]
            alone = len(ids) == 1
            rows = np.arange(len(ids) * self.num_samples).reshape((-1, 1) if alone else (-1, self.num_samples))
            limited = rows[: self.limits[split]]
            self._examples[split] = Prompts(ids, limited, number, self.num_samples if alone else 1)
        self._tokenizer = tokenizer

    def _cut(self, ids: np.ndarray, tokenizer: Any) -> np.ndarray:
        """Leave out the beginning of a long prompt, and the end of text behind it, which nothing should follow."""
        causal = not getattr(self.trainer.lightning_module, "encoder_decoder", False)
        if causal and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        return ids[-self.max_length :]

    def _loader(self, split: str) -> DataLoader:
        return DataLoader(self._examples[split], batch_size=self.batch_size, collate_fn=collate)

    def val_dataloader(self) -> DataLoader:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._loader("test")


class Prompts(Dataset):
    """Prompts with the numbers of the texts to write.

    Args:
        ids: Token ids of each prompt.
        rows: Numbers of the texts of each example, shape (examples, texts).
        split: Number of the split, so that its draws are not those of another.
        repeat: Examples of one prompt.
    """

    def __init__(self, ids: Sequence[np.ndarray], rows: np.ndarray, split: int, repeat: int) -> None:
        self.ids, self.rows, self.split, self.repeat = ids, rows, split, repeat

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        tokens = torch.from_numpy(self.ids[index // self.repeat]).long()
        return tokens, torch.from_numpy(2 * self.rows[index] + self.split)


def collate(examples: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Make a batch: ``tokens`` (prompts, length), padded with -1; and ``draws`` (prompts, texts), their numbers."""
    tokens, draws = zip(*examples, strict=True)
    return {"tokens": pad_sequence(tokens, batch_first=True, padding_value=PADDING), "draws": torch.stack(draws)}
