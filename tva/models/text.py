"""A transformers encoder under a head of class descriptions."""

from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tva.models.classifier import FrozenHeadClassifier
from tva.models.huggingface import load_network, load_tokenizer, longest_input, split_padding

Pooling = Literal["mean", "cls"]


class TextClassifier(FrozenHeadClassifier):
    """Fine-tune a transformers encoder under a frozen head made of descriptions of the classes.

    The text analogue of a zero-shot head: the base's normalized embeddings of a class's descriptions in each template,
    averaged and normalized, times ``logit_scale``. Descriptions and templates are the data module's, as of
    `tva.data.TextTask`; without descriptions the class names stand for them. A text's features are the mean (or the
    first) of its tokens' last hidden states. Only the encoder is trained, edited and saved; a pooler, which has no part
    in the features, stays frozen.

    Args:
        name: A local folder with ``config.json``, weights and tokenizer, or a name on the Hugging Face hub. Environment
            variables are expanded.
        tokenizer: Folder or hub name of the tokenizer, where ``name`` brings none.
        pooling: ``"mean"`` of all tokens, or the first, ``"cls"``.
        logit_scale: What cosines are multiplied by.
        head: ``"descriptions"``, ``"means"``, ``"probe"`` or ``"learned"``, which starts from the descriptions.
        **options: Options of `FrozenHeadClassifier`.

    Raises:
        FileNotFoundError: The folder is missing.
        ValueError: transformers is not installed or cannot load it, some weights would be random, or the tokenizer is
            that of another model.
    """

    own_head = "descriptions"

    def __init__(
        self,
        name: str,
        tokenizer: str | None = None,
        pooling: Pooling = "mean",
        logit_scale: float = 20.0,
        head: Literal["descriptions", "means", "probe", "learned"] = "descriptions",
        **options: Any,
    ) -> None:
        super().__init__(head=head, **options)
        self.pooling = pooling
        self.logit_scale = logit_scale
        self._name = name
        self.encoder = load_network("AutoModel", name)
        self.tokenizer = load_tokenizer(name, tokenizer, self.encoder)
        self.max_length = longest_input(self.tokenizer, self.encoder)
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler.requires_grad_(False)  # it gets no gradient, which DDP would complain of
        self._finish()

    def load_base(self) -> nn.Module:
        return load_network("AutoModel", self._name)

    def embed(self, encoder: nn.Module, inputs: Tensor) -> Tensor:
        """Embed texts: token ids of shape (batch, length), padded with -1, to features (batch, features)."""
        given = split_padding(inputs, self.tokenizer)
        states = encoder(**given).last_hidden_state  # (batch, length, features)
        if self.pooling == "cls":
            return states[:, 0]
        weights = given["attention_mask"].unsqueeze(-1).to(states.dtype)  # (batch, length, 1)
        return (states * weights).sum(dim=1) / weights.sum(dim=1)

    def head_key(self, datamodule: L.LightningDataModule) -> dict[str, Any]:
        if self.head_kind != "descriptions":
            return {**super().head_key(datamodule), "pooling": self.pooling}
        return {
            "head": "descriptions",
            "base": self._base_digest,
            "texts": self._tokens(datamodule),
            "pooling": self.pooling,
            "logit_scale": self.logit_scale,
        }

    def build_head(self, datamodule: L.LightningDataModule) -> Tensor:
        if self.head_kind != "descriptions":
            return super().build_head(datamodule)
        encode = self._base_features()
        rows = []
        for texts in self._tokens(datamodule):
            features = torch.cat([encode(torch.tensor([ids])) for ids in texts])  # (texts, features)
            rows.append(F.normalize(features.mean(dim=0), dim=0))
        return torch.stack(rows) * self.logit_scale  # (classes, features)

    def _tokens(self, datamodule: L.LightningDataModule) -> list[list[list[int]]]:
        names = list(datamodule.class_names)
        described = getattr(datamodule, "class_descriptions", None) or {}
        templates = getattr(datamodule, "templates", ["{}"])
        missing = [name for name in names if described and name not in described]
        if missing or not templates or any("{}" not in template for template in templates):
            raise ValueError(
                f"{self.task}: a head of class descriptions needs templates that hold {{}}, found {templates}, and "
                f"descriptions of all classes or of none; missing: {missing or 'none'}."
            )
        tokens = []
        for name in names:
            texts = described.get(name, [name])
            texts = [texts] if isinstance(texts, str) else texts
            filled = [template.replace("{}", text) for text in texts for template in templates]
            tokens.append(self.tokenizer(filled, truncation=True, max_length=self.max_length)["input_ids"])
        return tokens
