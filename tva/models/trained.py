"""Models with the head that they were trained with: those of transformers, sentence-transformers and timm."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning as L
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from tva.checkpoints.foreign import read_json
from tva.errors import some
from tva.models.clip import ClipClassifier
from tva.models.huggingface import (
    Kind,
    head_names,
    load_image_transform,
    load_network,
    load_sentence_transformer,
    load_tokenizer,
    longest_input,
    read_task,
    split_padding,
)
from tva.models.language import CausalLM, LanguageModel, Seq2SeqLM
from tva.models.optim import FineTuned
from tva.models.sharding import shard_later
from tva.models.vision import is_timm, load_timm

TrainedTask = Literal[
    "sequence-classification",
    "token-classification",
    "image-classification",
    "sentence-similarity",
    "causal-lm",
    "seq2seq-lm",
]
IGNORED = -100  # a token's label that no loss is taken of
_KINDS: dict[str, Kind] = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "image-classification": "AutoModelForImageClassification",
}


class TrainedModel(FineTuned):
    """Fine-tune and evaluate a network with the head that it was trained with; `TransformersModel`, `TimmModel`.

    Batches are ``inputs, targets``, as `tva.data.TableTask` makes them. Logs ``STAGE/TASK/loss``, with a score for each
    example, and what belongs to its task: ``accuracy`` of classes, ``spearman`` of numbers. The steps of validation and
    test return ``preds`` and ``target``, from which the data's own metric is computed.
    """

    returns_predictions = True
    label_names: list[str] | None = None  # of the head's outputs, where the model names them

    def _finish(self, network: nn.Module, kind: str, head: list[str], edit_head: bool) -> None:
        """Set the network and how it is trained; the last line of a subclass's constructor."""
        self.network, self.kind = network, kind
        if not edit_head and not head:
            raise ValueError(
                f"edit_head=false does not touch the head, and {type(network).__name__} has none. Drop it."
            )
        self.head_patterns = [] if edit_head else [rf"^(network[.])?{re.escape(name)}$" for name in head]
        self.tokens_right = nn.ModuleDict({stage: MeanMetric() for stage in ("val", "test") if "token" in kind})
        self.tva_metrics = {"spearman": "spearman"} if self._is_regression else {}
        self._adapt("network")
        for name, parameter in self.network.named_parameters():
            if not edit_head and name in head:
                parameter.requires_grad_(False)

    @property
    def bare_network(self) -> nn.Module:
        """The network itself."""
        return self.network

    @property
    def _is_regression(self) -> bool:
        return self.kind == "sentence-similarity" or getattr(self, "num_labels", 0) == 1

    def setup(self, stage: str) -> None:
        shard_later(self, "network")
        self.task = getattr(self.trainer.datamodule, "name", "task")

    def forward(self, inputs: Tensor) -> Tensor:
        """Return what the head says of a batch.

        Args:
            inputs: Token ids (batch, length), padded with -1; or (batch, 2, length): token ids and their types, or for
                sentence similarity the two texts; or images (batch, 3, height, width).

        Returns:
            Logits (batch, classes) or (batch, length, classes); numbers (batch,) of a regression.
        """
        raise NotImplementedError

    def _scores(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self._is_regression:
            return F.mse_loss(logits.float(), targets.to(logits.device).float(), reduction="none")
        if targets.is_floating_point():
            return F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none").mean(dim=-1)
        if logits.ndim == 3:
            losses = F.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
            return losses.sum(dim=-1) / (targets != IGNORED).sum(dim=-1)
        return F.cross_entropy(logits.float(), targets, reduction="none")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss = self._scores(self(inputs), targets).mean()
        self.log(f"train/{self.task}/loss", loss, prog_bar=True, batch_size=len(targets))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Any]:
        return self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Any]:
        return self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> dict[str, Any]:
        inputs, targets = batch
        logits = self(inputs)
        scores = {"loss": self._scores(logits, targets)}
        outputs: dict[str, Any] = {"preds": logits, "target": targets, "scores": scores, "loss": scores["loss"].mean()}
        options = {"on_step": False, "on_epoch": True, "batch_size": len(targets)}
        if logits.ndim == 3:
            labeled = targets != IGNORED
            right = (logits.argmax(dim=-1) == targets) & labeled
            self.tokens_right[stage](right[labeled].float().mean(), weight=labeled.sum())
            self.log(f"{stage}/{self.task}/accuracy", self.tokens_right[stage], prog_bar=True, **options)
            scores["accuracy_by_text"] = right.sum(dim=-1) / labeled.sum(dim=-1)
            outputs |= {"preds": logits[labeled], "target": targets[labeled], "logits": logits, "mask": labeled}
        elif not self._is_regression and not targets.is_floating_point():
            outputs["correct"] = logits.argmax(dim=-1) == targets
            accuracy = outputs["correct"].float().mean()
            self.log(f"{stage}/{self.task}/accuracy", accuracy, prog_bar=True, sync_dist=True, **options)
        for name, values in scores.items():
            self.log(f"{stage}/{self.task}/{name}", values.float().mean(), sync_dist=True, **options)
        return outputs


class TransformersModel(TrainedModel):
    """Fine-tune and evaluate any model of transformers with its own trained head, by the folder it was saved to.

    ``TransformersModel(folder)`` loads ``AutoModelForSequenceClassification``, ``…TokenClassification``,
    ``…ImageClassification``, ``…CausalLM`` or ``…Seq2SeqLM``, whichever the folder's ``config.json`` names; a folder
    with ``modules.json`` is one of sentence-transformers. All weights are in the state dict; ``edit_head`` says
    whether the head is edited with them. For language models this is `CausalLM` or `Seq2SeqLM`.

    Args:
        path: A local folder with ``config.json``, weights and tokenizer or image processor, or a name on the Hugging
            Face hub. Environment variables are expanded.
        task: What the head does; by default what the folder says.
        edit_head: Whether the head is trained and edited with the other weights. By default it is, as vectors of one
            task share its classes; set it to false to add vectors of tasks with other classes.
        tokenizer: Folder or hub name of the tokenizer, where ``path`` brings none.
        metrics: Of language models: metrics of generated text; see `LanguageModel`.
        max_new_tokens: Of language models: tokens that are generated at most.
        **options: Options of `tva.models.optim.FineTuned`.

    Raises:
        FileNotFoundError: The folder is missing.
        ValueError: The folder does not say what the head does, it cannot be loaded, or some weights would be random.
    """

    def __init__(
        self,
        path: str,
        task: TrainedTask | None = None,
        edit_head: bool = True,
        tokenizer: str | None = None,
        metrics: list[str] | None = None,
        max_new_tokens: int = 32,
        **options: Any,
    ) -> None:
        kind = task or read_task(path)
        if kind in _LANGUAGE_MODELS:
            self.__class__ = _LANGUAGE_MODELS[kind]  # which is a `TransformersModel` too
            LanguageModel.__init__(self, path, tokenizer, metrics, max_new_tokens, **options)
            self._set_head(edit_head)
            return
        super().__init__(**options)
        if metrics:
            raise ValueError(f"metrics {metrics} are of generated text, which {kind} makes none of. Leave metrics out.")
        self.encodes_apart = kind == "sentence-similarity"
        if self.encodes_apart:
            network, self.tokenizer, self.max_length = load_sentence_transformer(path)
        else:
            network = load_network(_KINDS[kind], path)
            self.num_labels = network.config.num_labels
            self.label_names = named_labels(network.config.id2label)
        if kind == "image-classification":
            self.image_transform: Callable[[Any], Tensor] = load_image_transform(path)
        elif not self.encodes_apart:
            self.tokenizer = load_tokenizer(path, tokenizer, network)
            self.max_length = longest_input(self.tokenizer, network)
        head = [] if self.encodes_apart else head_names(network)
        self._finish(network, kind, head, edit_head)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.kind == "image-classification":
            logits = self.network(pixel_values=inputs).logits
        elif self.encodes_apart:
            one, other = (self.embed(text) for text in inputs.unbind(dim=1))
            return F.cosine_similarity(one, other)
        else:
            tokens, *types = inputs.unbind(dim=1) if inputs.ndim == 3 else (inputs,)
            given = split_padding(tokens, self.tokenizer)
            if types:
                given["token_type_ids"] = types[0].clamp(min=0)
            logits = self.network(**given).logits
        return logits.squeeze(-1) if self._is_regression else logits

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed texts by sentence-transformers: token ids of shape (batch, length) to (batch, features)."""
        length = int((tokens >= 0).sum(dim=1).max())
        return self.network(split_padding(tokens[:, :length], self.tokenizer))["sentence_embedding"]


class _TrainedLM(L.LightningModule):
    """A language model that is made as a `TransformersModel`."""

    network: nn.Module

    def _set_head(self, edit_head: bool) -> None:
        network: Any = self.network
        own = network.get_output_embeddings()
        tied = own is None or own.weight is network.get_input_embeddings().weight
        if not edit_head and tied:
            raise ValueError(
                f"edit_head=false does not touch the head, and that of {type(network).__name__} is its embedding. Drop "
                f"it."
            )
        names = [] if edit_head else head_names(network)
        self.head_patterns = [rf"^(network[.])?{re.escape(name)}$" for name in names]
        for name, parameter in network.named_parameters():
            if name in names:
                parameter.requires_grad_(False)


class _TrainedCausalLM(_TrainedLM, CausalLM, TransformersModel):
    __init__ = CausalLM.__init__


class _TrainedSeq2SeqLM(_TrainedLM, Seq2SeqLM, TransformersModel):
    __init__ = Seq2SeqLM.__init__


_LANGUAGE_MODELS: dict[str, type[L.LightningModule]] = {"causal-lm": _TrainedCausalLM, "seq2seq-lm": _TrainedSeq2SeqLM}


class TimmModel(TrainedModel):
    """Fine-tune and evaluate any network of timm with its own trained classifier.

    Args:
        name: A local folder in the layout of timm's hub (``config.json`` with weights), or timm's name of a network.
        pretrained: With a name: a local file of weights, or true for timm's own.
        edit_head: Whether the classifier is trained and edited with the other weights; by default it is.
        **options: Options of `tva.models.optim.FineTuned`.

    Raises:
        FileNotFoundError: The folder or file is not there.
        ValueError: timm does not know the network, or it has no weights.
    """

    def __init__(self, name: str, pretrained: bool | str | None = None, edit_head: bool = True, **options: Any) -> None:
        super().__init__(**options)
        network, self.image_transform, self.label_names, head = load_timm(name, pretrained)
        self._finish(network, "image-classification", head, edit_head)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)


def named_labels(id2label: Any) -> list[str] | None:
    """Return the names of a head's outputs in their order; None where transformers made them up.

    Example:
        >>> named_labels({0: "no", 1: "yes"}), named_labels({0: "LABEL_0", 1: "LABEL_1"})
        (['no', 'yes'], None)
    """
    names = [str(id2label[index]) for index in sorted(id2label)]
    return None if all(name == f"LABEL_{index}" for index, name in enumerate(names)) else names


def open_model(name: str) -> L.LightningModule:
    """Open a model by its folder or name, with the library that it is of.

    Args:
        name: A folder of transformers, sentence-transformers, timm or open_clip; or a name: ``hf-hub:owner/name`` for
            open_clip, ``timm/name`` or a network of timm, else a repository of transformers on the hub.

    Raises:
        FileNotFoundError: The folder is missing.
        ValueError: It is of none of these libraries, or cannot be loaded.
    """
    folder = Path(os.path.expandvars(os.path.expanduser(name)))
    if folder.is_dir():
        files = {file.name for file in folder.iterdir()}
        config = read_json(folder / "config.json", dict) if "config.json" in files else {}
        if "open_clip_config.json" in files:
            return ClipClassifier(f"local-dir:{folder}")
        if "modules.json" in files or "architectures" in config or "model_type" in config:
            return TransformersModel(str(folder))
        if "architecture" in config:
            return TimmModel(str(folder))
        raise ValueError(
            f"{name} must be a model's folder: with the config.json of transformers or timm, modules.json of "
            f"sentence-transformers or open_clip_config.json; it holds {some(sorted(files), 6) or 'nothing'}."
        )
    if name.startswith("hf-hub:"):
        return ClipClassifier(name)
    if name.startswith("timm/") or is_timm(name):
        return TimmModel(f"hf-hub:{name}" if "/" in name else name, pretrained=True)
    return TransformersModel(name)
