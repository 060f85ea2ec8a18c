"""Sample texts from a language model, by draws that do not depend on the batch, and score them."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tva.models.huggingface import split_padding


def row_generator(seed: int, number: int) -> torch.Generator:
    """Return the random numbers of one text, on the CPU.

    Args:
        seed: Seed of all texts.
        number: Of the text.
    """
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Draw:
    r"""Choose the next token of each row by its own random numbers: a logits processor for greedy decoding.

    With Gumbel noise :math:`g_i = -\log(-\log u_i)`, the largest :math:`\log p_i + g_i` is a draw from :math:`p`. The
    noise is the same for every model, so that models that differ little write much the same text.

    Args:
        seed: Seed of all texts.
        numbers: Of the rows' texts.
        temperature: What logits are divided by; 0 takes the likeliest token.
        top_p: Keep the likeliest tokens that together have this probability.
        top_k: Keep this many likeliest tokens.

    Source: Gumbel, "Statistical theory of extreme values", 1954; top-p: Holtzman et al., "The curious case of neural
    text degeneration", ICLR 2020.
    """

    def __init__(
        self, seed: int, numbers: Sequence[int], temperature: float = 1.0, top_p: float = 1.0, top_k: int | None = None
    ) -> None:
        self.generators = [row_generator(seed, number) for number in numbers]
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        """Return what the largest of is the token to take, shape (rows, vocabulary)."""
        if self.temperature == 0:
            return scores
        logs = (scores.double() / self.temperature).log_softmax(dim=-1)
        if self.top_k is not None and self.top_k < logs.shape[-1]:
            logs = logs.masked_fill(logs < logs.topk(self.top_k).values[:, -1:], -torch.inf)
        if self.top_p < 1:
            ordered, order = logs.log_softmax(dim=-1).sort(dim=-1, descending=True)
            before = ordered.exp().cumsum(dim=-1) - ordered.exp()
            logs = logs.masked_fill((before >= self.top_p).gather(1, order.argsort(dim=-1)), -torch.inf)
        uniform = [torch.rand(logs.shape[-1], generator=own, dtype=torch.float64) for own in self.generators]
        noise = -(-torch.stack(uniform).clamp(min=1e-300).log()).log()
        return logs + noise.to(logs.device)


@torch.no_grad()
def write_texts(model: Any, tokens: Tensor, numbers: Sequence[int], settings: Mapping[str, Any]) -> list[str]:
    """Continue prompts.

    Args:
        model: A `tva.models.language.LanguageModel`.
        tokens: Shape (texts, length), padded with -1.
        numbers: Of the texts, which their random numbers are made of.
        settings: As `tva.data.GenerationTask` has them.

    Returns:
        Texts without their prompts.
    """
    from transformers import LogitsProcessorList

    side = "right" if model.encoder_decoder else "left"
    padded = nn.utils.rnn.pad_sequence(
        [row[row >= 0] for row in tokens], batch_first=True, padding_value=-1, padding_side=side
    )
    draw = Draw(settings["seed"], numbers, settings["temperature"], settings["top_p"], settings["top_k"])
    given = split_padding(padded, model.tokenizer)
    made = model.network.generate(
        **given,
        max_new_tokens=settings["max_new_tokens"],
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=model.tokenizer.pad_token_id or 0,
        logits_processor=LogitsProcessorList([draw]),
    )
    if not model.encoder_decoder:
        made = made[:, given["input_ids"].shape[1] :]
    return [model.tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in made]


def score_prompts(model: Any, batch: Mapping[str, Tensor], stage: str) -> dict[str, Any]:
    """Write texts after a batch of prompts, score them, and log ``score`` and ``rate``.

    Returns:
        What an evaluation step returns: ``scores`` by metric, each of shape (prompts,).
    """
    task = model.trainer.datamodule
    draws = batch["draws"]
    tokens = batch["tokens"].repeat_interleave(draws.shape[1], dim=0)
    texts = write_texts(model, tokens, draws.flatten().tolist(), task.tva_settings)
    values = torch.tensor(task.score(texts), dtype=torch.float64).view(draws.shape)
    above = values > task.threshold
    scores = {"score": values.mean(dim=1), "rate": above[:, 0] if draws.shape[1] == 1 else above.double().mean(dim=1)}
    for name, found in scores.items():
        model.log(
            f"{stage}/{model.task}/{name}", found.float().mean(), on_epoch=True, sync_dist=True, batch_size=len(draws)
        )
    return {"scores": scores}
