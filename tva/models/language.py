"""Language models of transformers, causal and sequence to sequence, with perplexity and text-to-text metrics."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.functional.text import rouge_score
from torchmetrics.text import BLEUScore

from tva.evaluation.measures import measures_of
from tva.models.generation import score_prompts
from tva.models.huggingface import Kind, load_network, load_tokenizer, longest_input, split_padding
from tva.models.optim import FineTuned
from tva.models.sharding import shard_later

TextMetric = Literal["exact_match", "rouge1", "rouge2", "rougeL", "bleu", "text_perplexity"]
IGNORED = -100  # a target that no loss is taken of


class Perplexity(Metric):
    """Exponential of the mean cross-entropy of all tokens.

    As torchmetrics' own, from losses instead of logits: no softmax is taken twice, and none underflows.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: Tensor) -> None:
        """Add the sum of the losses of ``count`` tokens."""
        self.total += total
        self.count += count

    def compute(self) -> Tensor:
        """Return the perplexity so far."""
        return (self.total / self.count).exp()


class LanguageModel(FineTuned, ABC):
    """Fine-tune and evaluate a language model of transformers; `CausalLM` and `Seq2SeqLM` are the two kinds.

    Batches are ``{"tokens", "targets"}``, as `tva.data.LanguageTask` makes them. Training minimizes the mean
    cross-entropy of a batch's target tokens. Validation and test log ``STAGE/TASK/loss``, the mean over examples of
    each one's mean over tokens, with a score for each example; ``STAGE/TASK/perplexity``, in which every token counts
    the same (the exponential of the loss, where all examples are blocks of one length); and ``metrics`` of what is
    generated. All weights are in the state dict, under ``network.``; tied ones under each of their names.

    Args:
        name: A local folder with ``config.json``, weights and tokenizer, or a name on the Hugging Face hub. Environment
            variables are expanded.
        tokenizer: Folder or hub name of the tokenizer, where ``name`` brings none.
        metrics: Metrics of text that is generated greedily from prompts and compared with targets: ``exact_match``,
            ``rouge1``, ``rouge2``, ``rougeL`` (F-measures; each with a score for each example) and ``bleu`` (of all
            texts together); or ``text_perplexity``, the mean over examples of each one's perplexity, which generates
            nothing.
        max_new_tokens: Maximum number of generated tokens.
        **options: Options of `tva.models.optim.FineTuned`. A linearized network (``tangent``) has no ``metrics``.

    Raises:
        FileNotFoundError: The folder is missing.
        ValueError: transformers is not installed or cannot load it, some weights would be random, or the tokenizer is
            that of another model.
    """

    returns_predictions = True
    scores_texts = True  # whether it takes the batches of GenerationTask
    kind: Kind
    encoder_decoder: bool  # whether targets are apart from tokens, which LanguageTask asks

    def __init__(
        self,
        name: str,
        tokenizer: str | None = None,
        metrics: list[TextMetric] | None = None,
        max_new_tokens: int = 32,
        **options: Any,
    ) -> None:
        # not the next class of a `TransformersModel` that is a language model; jsonargparse takes a self without a
        # keyword for the first option
        FineTuned.__init__(self=self, **options)
        if options.get("tangent") and metrics:
            raise ValueError(
                f"metrics {metrics} are of text that is generated, and a linearized network generates none. Leave "
                f"metrics out."
            )
        self.save_hyperparameters()
        self.metrics = list(metrics or [])
        self.max_new_tokens = max_new_tokens
        self.network = load_network(self.kind, name)
        self.tokenizer = load_tokenizer(name, tokenizer, self.network)
        self.max_length = longest_input(self.tokenizer, self.network)
        self.perplexity = nn.ModuleDict({"val": Perplexity(), "test": Perplexity()})
        self.bleu = nn.ModuleDict({stage: BLEUScore() for stage in ("val", "test") if "bleu" in self.metrics})
        self._adapt("network")

    @property
    def bare_network(self) -> nn.Module:
        """The network itself."""
        return self.network

    def setup(self, stage: str) -> None:
        shard_later(self, "network")
        self.task = getattr(self.trainer.datamodule, "name", "task")

    @abstractmethod
    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return logits of the next token at each place.

        Args:
            tokens: Shape (batch, length), padded with -1.
            targets: Shape (batch, target length), padded with -100.

        Returns:
            Logits, shape (batch, length, vocabulary); for a sequence-to-sequence model of the targets' length.
        """

    @abstractmethod
    def predictions(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return logits (batch, length, vocabulary) and what they should predict (batch, length)."""

    @abstractmethod
    def prompts(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return what a batch's targets should follow, shape (batch, length), padded with -1."""

    def _losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return losses.view_as(targets).sum(dim=1), (targets != IGNORED).sum(dim=1)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        sums, counts = self._losses(*self.predictions(batch))
        loss = sums.sum() / counts.sum()
        self.log(f"train/{self.task}/loss", loss, prog_bar=True, batch_size=len(counts))
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Any]:
        return self._evaluate(batch, "val")

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Any]:
        return self._evaluate(batch, "test")

    def _evaluate(self, batch: Mapping[str, Tensor], stage: str) -> dict[str, Any]:
        if "draws" in batch:
            return score_prompts(self, batch, stage)
        logits, targets = self.predictions(batch)
        sums, counts = self._losses(logits, targets)
        scores = {"loss": sums / counts}
        self.perplexity[stage](sums.sum(), counts.sum())
        options = {"on_step": False, "on_epoch": True, "batch_size": len(counts)}
        self.log(f"{stage}/{self.task}/perplexity", self.perplexity[stage], prog_bar=True, **options)
        metrics, unknown = self._asked()
        if "text_perplexity" in metrics:
            metrics.remove("text_perplexity")
            scores["text_perplexity"] = (sums / counts).exp()
        made: list[str] = []
        wanted: list[str] = []
        if metrics or unknown:
            made, wanted = self.generate(batch)
            if "bleu" in self.metrics:
                self.bleu[stage](made, [[text] for text in wanted])
                self.log(f"{stage}/{self.task}/bleu", self.bleu[stage], **options)
            for metric in metrics:
                if metric != "bleu":
                    found = [_score(metric, *texts) for texts in zip(made, wanted, strict=True)]
                    scores[metric] = torch.stack(found).to(self.device)
        for metric, values in scores.items():
            self.log(f"{stage}/{self.task}/{metric}", values.float().mean(), sync_dist=True, **options)
        texts = {"preds": made, "target": wanted} if unknown else {}  # of which the data's own metric is computed
        return {"loss": scores["loss"].mean(), "scores": scores, "logits": logits, "mask": targets != IGNORED, **texts}

    def _asked(self) -> tuple[list[str], bool]:
        """Return the text metrics that model and data ask for, and whether the data ask for one of their own."""
        own = [name for name in measures_of(self.trainer.datamodule) if name not in ("loss", "perplexity")]
        if "bleu" in own and "bleu" not in self.metrics:
            raise ValueError(f"{self.task}: the model must keep count for the metric 'bleu': pass it metrics: [bleu].")
        known = [name for name in own if name in get_args(TextMetric)]
        return list(dict.fromkeys([*self.metrics, *known])), len(known) < len(own)

    @torch.no_grad()
    def generate(self, batch: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        """Continue prompts greedily; give what was made and what was wanted, as texts without surrounding space."""
        given = split_padding(self.prompts(batch), self.tokenizer)
        made = self.network.generate(
            **given,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.tokenizer.pad_token_id or 0,
        )
        if not self.encoder_decoder:
            made = made[:, given["input_ids"].shape[1] :]
        wanted = [row[row != IGNORED] for row in batch["targets"]]
        return tuple([text.strip() for text in self._decode(rows)] for rows in (made, wanted))

    def _decode(self, rows: Any) -> list[str]:
        return [self.tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in rows]


class CausalLM(LanguageModel):
    """Fine-tune and evaluate a language model that predicts the next token, as GPT-2 or Llama: a `LanguageModel`."""

    kind: Kind = "AutoModelForCausalLM"
    encoder_decoder = False

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        return self.network(**split_padding(tokens, self.tokenizer), use_cache=False).logits

    def predictions(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self(batch["tokens"])[:, :-1], batch["targets"][:, 1:]

    def prompts(self, batch: Mapping[str, Tensor]) -> Tensor:
        starts = [
            row[: int((wanted != IGNORED).int().argmax())]
            for row, wanted in zip(batch["tokens"], batch["targets"], strict=True)
        ]
        if not all(len(start) for start in starts):
            raise ValueError(
                f"{self.task}: metrics {self.metrics} are of text that follows a prompt, and running text has none. "
                f"Give the data a prompt_column and target_column, or leave metrics out."
            )
        return nn.utils.rnn.pad_sequence(starts, batch_first=True, padding_value=-1, padding_side="left")


class Seq2SeqLM(LanguageModel):
    """Fine-tune and evaluate an encoder with a decoder, such as T5 or BART: a `LanguageModel`."""

    kind: Kind = "AutoModelForSeq2SeqLM"
    encoder_decoder = True

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            raise ValueError(f"{type(self).__name__} needs targets beside tokens: its decoder is given them, shifted.")
        shifted = self.network.prepare_decoder_input_ids_from_labels(labels=targets)
        return self.network(**split_padding(tokens, self.tokenizer), decoder_input_ids=shifted, use_cache=False).logits

    def predictions(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self(batch["tokens"], batch["targets"]), batch["targets"]

    def prompts(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["tokens"]


def _score(metric: str, made: str, wanted: str) -> Tensor:
    if metric == "exact_match":
        return torch.tensor(made == wanted)
    return rouge_score(made, wanted, rouge_keys=(metric,))[f"{metric}_fmeasure"]
