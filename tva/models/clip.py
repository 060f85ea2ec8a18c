"""An open_clip image encoder under a zero-shot head; the only importer of open_clip in models."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tva.checkpoints import fingerprint
from tva.checkpoints.foreign import read_json
from tva.models.classifier import FrozenHeadClassifier

TINY = "tva-tiny"


class ClipClassifier(FrozenHeadClassifier):
    """Fine-tune the image encoder of a CLIP model under the zero-shot head of its text encoder.

    The head is the text tower's embedding of each class name in each prompt template, averaged and normalized, times
    the model's logit scale. It is computed once for a list of classes and kept in ``~/.cache/tva`` (``TVA_CACHE``).
    Only the image encoder is trained, edited and saved.

    Args:
        name: ``tva-tiny``, which ships with this package; an open_clip architecture such as ``ViT-B-32-quickgelu``;
            ``hf-hub:OWNER/NAME``; ``local-dir:FOLDER`` with ``open_clip_config.json``; or a model config's ``.json``.
        pretrained: open_clip's tag, such as ``openai`` (downloaded when first used), or a local file of weights.
            ``tva-tiny``, ``hf-hub:`` and ``local-dir:`` bring their own.
        head: ``"zero_shot"``, ``"means"``, ``"probe"`` or ``"learned"``, which starts from the zero-shot head.
        **options: Options of `FrozenHeadClassifier`. With ``weights`` the head stays that of ``pretrained``.

    Raises:
        ValueError: The architecture is unknown, or it has no weights: an untrained network has no zero-shot head.

    Example:
        >>> model = ClipClassifier()
        >>> sorted(model.state_dict())[0]
        'encoder.class_embedding'
    """

    own_head = "zero_shot"
    image_transform: Callable[[Any], Tensor]  # from a PIL image to the encoder's input

    def __init__(
        self,
        name: str = TINY,
        pretrained: str | None = None,
        head: Literal["zero_shot", "means", "probe", "learned"] = "zero_shot",
        **options: Any,
    ) -> None:
        super().__init__(head=head, **options)
        self._base = (name, pretrained)
        clip, self.image_transform, self._tokenizer = load_clip(name, pretrained)
        self.encoder = clip.visual
        clip.visual = nn.Identity()
        self.logit_scale = float(clip.logit_scale.detach().exp())
        self._text = (clip,)  # the text tower, in a tuple that hides it from the state dict and the optimizer
        self._finish()

    @functools.cached_property
    def train_transform(self) -> Callable[[Any], Tensor]:
        """CLIP's own transform for training, a random crop of 90 to 100% of the area; `ImageTask` uses it if asked."""
        import open_clip

        settings = getattr(self.encoder, "preprocess_cfg", None)
        if settings is None:  # as of tva-tiny
            return open_clip.image_transform(self.encoder.image_size, is_train=True)
        return open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**settings), is_train=True)

    @property
    def source(self) -> str | None:
        """Folder or hub repository that the model was loaded from, if it was one."""
        kind, _, place = self._base[0].partition(":")
        return {"local-dir": place, "hf-hub": f"hf://{place}"}.get(kind) if self._base[1] is None else None

    def load_base(self) -> nn.Module:
        return load_clip(*self._base)[0].visual.eval()

    @functools.cached_property
    def _text_digest(self) -> str:
        return fingerprint(self._text[0].state_dict()).digest

    def head_key(self, datamodule: L.LightningDataModule) -> dict[str, Any]:
        if self.head_kind != "zero_shot":
            return super().head_key(datamodule)
        return {
            "text": self._text_digest,
            "class_names": list(datamodule.class_names),
            "templates": _templates(datamodule),
        }

    def build_head(self, datamodule: L.LightningDataModule) -> Tensor:
        if self.head_kind != "zero_shot":
            return super().build_head(datamodule)
        device = self.trainer.strategy.root_device
        text = self._text[0].to(device)
        rows = []
        for class_name in datamodule.class_names:
            prompts = [template.format(class_name) for template in _templates(datamodule)]
            features = F.normalize(text.encode_text(self._tokenizer(prompts).to(device)), dim=-1)  # (prompts, features)
            rows.append(F.normalize(features.mean(dim=0), dim=0))
        head = torch.stack(rows) * text.logit_scale.exp()  # (classes, features)
        text.cpu()
        return head


def _templates(datamodule: L.LightningDataModule) -> list[str]:
    templates = list(getattr(datamodule, "templates", ["a photo of a {}."]))
    odd = [template for template in templates if "{}" not in template]
    if odd or not templates:
        raise ValueError(f"Prompt templates must hold {{}} where the class name goes; found {odd or 'none at all'}.")
    return templates


def load_clip(name: str, pretrained: str | None = None) -> tuple[nn.Module, Any, Any]:
    """Load a CLIP model with weights; an untrained one is refused.

    Args:
        name: As for `ClipClassifier`.
        pretrained: As for `ClipClassifier`.

    Returns:
        The model in float32 on the CPU; the transform from a PIL image to its input; its tokenizer.
    """
    if name == TINY and pretrained is None:
        from tva.models import tiny

        return tiny.load()
    import open_clip

    if name.endswith(".json"):
        name = _register(Path(name))
    elif ":" not in name and name not in open_clip.list_models():
        raise ValueError(
            f"open_clip has no architecture {name!r}. Use {TINY!r}, one of open_clip.list_models() (such as "
            f"'ViT-B-32-quickgelu'), a model config file that ends in .json, or local-dir:FOLDER."
        )
    if ":" not in name and pretrained is None:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ValueError(
            f"{name} needs weights: pass pretrained=, a local file or one of open_clip's tags for it "
            f"({', '.join(tags) or 'none'})."
        )
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            name, pretrained=pretrained, require_pretrained=True
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"The weights {pretrained or name!r} of {name} could not be loaded: {error} Pass pretrained= a tag of "
            f"open_clip.list_pretrained_tags_by_model({name!r}) while online, or a local file."
        ) from error
    return model.eval(), transform, open_clip.get_tokenizer(name)


def _register(config: Path) -> str:
    import open_clip

    if not config.is_file():
        raise FileNotFoundError(f"A model config was expected at {config}, but nothing is there.")
    found = read_json(config, dict)
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in found]
    if missing:
        raise ValueError(f"{config} is not an open_clip model config: it lacks {', '.join(missing)}.")
    open_clip.add_model_config(config)
    return config.stem
