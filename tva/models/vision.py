"""A timm backbone under a head of class means; the one door to timm."""

from __future__ import annotations

import difflib
import os
import weakref
from collections.abc import Iterator
from typing import Any, Literal

import lightning as L
import torch
import xxhash
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tva.models.adapters import Lora
from tva.models.classifier import FrozenHeadClassifier
from tva.state_dict import check_same, some
from tva.weights import fingerprint, open_weights

BatchNorm = Literal["fold", "freeze", "train"]


class VisionClassifier(FrozenHeadClassifier):
    """Fine-tune a timm backbone under the class means of the base's features.

    The head is the mean of the base's normalized features over each class's training examples, normalized, times
    ``logit_scale``. It is computed once for a base and a set of examples and kept in ``~/.cache/tva`` (``TVA_CACHE``).
    The examples are those of the data module's ``prototype_dataloader``, else of its ``train_dataloader``.

    Args:
        name: timm's name of the network, such as ``tf_efficientnet_lite0``.
        pretrained: A local file of weights, in any format that `tva.open_weights` reads; or true for timm's own
            (downloaded when first used). A network without weights is refused. Environment variables are filled in.
        image_size: Height and width that images are scaled to (the shorter side; the middle is taken); by default the
            network's own.
        batch_norm: What becomes of BatchNorm. ``"fold"``: it is folded into the convolutions first, which changes no
            output, so that the base has no statistics to edit. ``"freeze"``: its statistics stay the base's.
            ``"train"``: they move in training, and the edit's ``statistics`` says how they are edited.
        logit_scale: What cosines are multiplied by.
        weights: Checkpoint of this module to start from, such as the output of ``tva edit``; the head stays that of
            ``pretrained``.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: AdamW's.
        warmup_steps: Optimizer steps of linear warm-up, before cosine decay to 0.
        train_only: ``"attention"``, ``"linear"`` or ``"bias"``, or a list of these and of regular expressions: train
            these parameters of the encoder alone.
        lora: Train low-rank additions alone: ``r``, ``alpha``, ``target_modules``, ``dropout``; needs
            ``pip install tva[lora]``.
        tangent: Linearize the encoder in its weights; its vectors are marked as tangent.

    Raises:
        ValueError: timm does not know the network, there are no weights, they are another network's, or BatchNorm
            cannot be folded.
        FileNotFoundError: The file of weights is not there.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool | str | None = None,
        image_size: int | None = None,
        batch_norm: BatchNorm = "fold",
        logit_scale: float = 20.0,
        weights: str | None = None,
        learning_rate: float = 1e-5,
        weight_decay: float = 0.1,
        warmup_steps: int = 200,
        train_only: str | list[str] | None = None,
        lora: Lora | None = None,
        tangent: bool = False,
    ) -> None:
        super().__init__(weights, learning_rate, weight_decay, warmup_steps, train_only, lora, tangent)
        self.save_hyperparameters()
        self.batch_norm = batch_norm
        self.logit_scale = logit_scale
        self._base = (name, pretrained, image_size, batch_norm)
        self.encoder, self.image_transform = load_encoder(*self._base)
        self._base_digest = fingerprint(self.encoder.state_dict()).digest
        self._data_digests: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        self.encoder.train()
        self._load_weights()

    def on_train_epoch_start(self) -> None:
        # Not by overriding train(): re-estimating statistics needs them to move outside of fitting.
        if self.batch_norm == "freeze":
            for module in self.encoder.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    # --- the head

    def head_key(self, datamodule: L.LightningDataModule) -> dict[str, Any]:
        if datamodule not in self._data_digests:
            self._data_digests[datamodule] = _digest(datamodule)
        return {
            "head": "class means",
            "base": self._base_digest,
            "examples": self._data_digests[datamodule],
            "class_names": list(datamodule.class_names),
            "logit_scale": self.logit_scale,
        }

    def build_head(self, datamodule: L.LightningDataModule) -> Tensor:
        device = self.trainer.strategy.root_device
        with torch.random.fork_rng(devices=[]):
            encoder, _ = load_encoder(*self._base)
        found = fingerprint(encoder.state_dict()).digest
        if found != self._base_digest:
            raise ValueError(
                f"The head needs the base {self._base_digest} that this model was made from, but "
                f"{self._base[1]} now holds {found}. Put the base back, or make the model again."
            )
        encoder.to(device)
        task, names = getattr(datamodule, "name", type(datamodule).__name__), list(datamodule.class_names)
        sums = torch.zeros(len(names), encoder.num_features, dtype=torch.float64)  # (classes, features)
        counts = torch.zeros(len(names), dtype=torch.int64)
        for images, labels in _prototypes(datamodule):
            features = F.normalize(encoder(images.to(device)), dim=-1).cpu().double()  # (batch, features)
            sums.index_add_(0, labels, features)
            counts += torch.bincount(labels, minlength=len(names))
        empty = [name for name, count in zip(names, counts.tolist(), strict=True) if count == 0]
        if empty:
            raise ValueError(
                f"{task}: a head of class means needs training examples of each of the {len(names)} classes, and "
                f"there are none of {some(empty)}. Raise limit_train, or let prototype_where reach them ({{}} takes "
                f"all training examples)."
            )
        return F.normalize(sums, dim=-1) * self.logit_scale  # the mean's direction is the sum's


def _prototypes(datamodule: L.LightningDataModule) -> Iterator[tuple[Tensor, Tensor]]:
    loader = getattr(datamodule, "prototype_dataloader", datamodule.train_dataloader)
    with torch.random.fork_rng(devices=[]):  # a loader draws a seed; training must not depend on what is in the cache
        batches = iter(loader())
    yield from batches


def _digest(datamodule: L.LightningDataModule) -> str:
    """Hash the transformed images and labels that a head is made of, in any order."""
    examples = []
    for images, labels in _prototypes(datamodule):
        for image, label in zip(images, labels.tolist(), strict=True):
            examples.append(xxhash.xxh3_128_hexdigest(image.contiguous().numpy(), seed=label))
    return xxhash.xxh3_128_hexdigest("".join(sorted(examples)).encode())


# --- timm


def load_encoder(
    name: str, pretrained: bool | str | None, image_size: int | None = None, batch_norm: BatchNorm = "fold"
) -> tuple[nn.Module, Any]:
    """Load a timm backbone with weights; one without is refused.

    Args:
        name: As for `VisionClassifier`.
        pretrained: As for `VisionClassifier`.
        image_size: As for `VisionClassifier`.
        batch_norm: As for `VisionClassifier`.

    Returns:
        The backbone in float32 on the CPU, in evaluation mode, giving pooled features (batch, features); the transform
        from a PIL image to its input.
    """
    import timm
    from timm.data import create_transform, resolve_model_data_config

    if ":" not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models())
        raise ValueError(
            f"timm {timm.__version__} has no network {name!r}. Use one of timm.list_models()"
            + (f", such as {some(near)}." if near else ".")
        )
    if not pretrained:
        raise ValueError(
            f"{name} needs weights: an untrained network has no features to take class means of. Pass pretrained= a "
            f"local file, or true for timm's own."
        )
    try:
        encoder = timm.create_model(name, pretrained=pretrained is True, num_classes=0)
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"timm could not make {name} with its own weights: {error} Pass pretrained= a local file, or connect to "
            f"the network."
        ) from error
    if isinstance(pretrained, str):
        _load_strictly(encoder, name, os.path.expandvars(pretrained))
    config = resolve_model_data_config(encoder)
    native = config["input_size"][-1]
    image_size = image_size or native
    if image_size != native and encoder.pretrained_cfg.get("fixed_input_size"):
        raise ValueError(f"{name} takes images of {native} pixels only, not {image_size}. Leave image_size out.")
    config |= {"input_size": (3, image_size, image_size), "crop_pct": 1.0}  # a digit reaches to the border
    if batch_norm == "fold":
        fold_batch_norm(encoder, image_size)
    # Convolutions run several times faster on CPUs in this layout; shapes and names stay.
    return encoder.eval().to(memory_format=torch.channels_last), create_transform(**config, is_training=False)


def _load_strictly(encoder: nn.Module, name: str, path: str) -> None:
    weights = open_weights(path)
    classifiers = encoder.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    classifiers = tuple(f"{classifier}." for classifier in classifiers)
    found = {key: weights[key] for key in weights if not key.startswith(classifiers)}
    counters = "num_batches_tracked"  # of no use in inference, and missing in some files
    check_same(
        {key: value for key, value in encoder.state_dict().items() if not key.endswith(counters)},
        {key: value for key, value in found.items() if not key.endswith(counters)},
        f"the network {name}",
        f"the file {path}",
    )
    encoder.load_state_dict(found, strict=True)


@torch.no_grad()
def fold_batch_norm(encoder: nn.Module, image_size: int) -> None:
    """Fold every BatchNorm of a network into the convolution before it, in place; exact but for rounding.

    Which convolution that is is seen in a forward pass; folding is done, and compared with the network as it was, in
    float64.

    Args:
        encoder: Network on the CPU; left in float32 and evaluation mode.
        image_size: Height and width of images that it takes.

    Raises:
        ValueError: A BatchNorm does not follow a convolution directly, or the folded network gives other features.
    """
    encoder.eval().double()
    names = {module: name for name, module in encoder.named_modules()}
    outputs: list[tuple[Tensor, nn.Module]] = []
    pairs: dict[nn.Module, nn.Module] = {}

    def made(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append((output, module))

    def fed(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for output, conv in outputs:
            if output is inputs[0]:
                pairs[module] = conv

    norms = [module for module in names if isinstance(module, _BatchNorm)]
    hooks = [module.register_forward_pre_hook(fed) for module in norms]
    hooks += [module.register_forward_hook(made) for module in names if isinstance(module, nn.Conv2d)]
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = encoder(images)  # (2, features)
    for hook in hooks:
        hook.remove()
    alone = [names[norm] for norm in norms if norm not in pairs or norm.running_mean is None]
    if alone:
        raise ValueError(
            f"batch_norm='fold' needs a convolution right before every BatchNorm, and a BatchNorm with statistics; "
            f"{some(alone)} is not so. Use batch_norm='freeze' or 'train'."
        )
    for norm, conv in pairs.items():
        encoder.set_submodule(names[conv], fuse_conv_bn_eval(conv, norm))
        # timm's BatchNorm brings its own activation
        rest = [module for part in ("drop", "act") if isinstance(module := getattr(norm, part, None), nn.Module)]
        encoder.set_submodule(names[norm], nn.Sequential(*rest))
    after = encoder(images)
    if not torch.allclose(after, before, rtol=1e-6, atol=1e-6 * float(before.abs().max())):
        raise ValueError(
            f"batch_norm='fold' would change this network's features by up to {float((after - before).abs().max()):g}. "
            f"Use batch_norm='freeze' or 'train'."
        )
    encoder.float()
