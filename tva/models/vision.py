"""A timm backbone under a head of class means; the only importer of timm."""

import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tva.arithmetic import check_same
from tva.checkpoints import model_folder, open_weights
from tva.errors import some
from tva.models.classifier import FrozenHeadClassifier

BatchNorm = Literal["fold", "freeze", "train"]


class VisionClassifier(FrozenHeadClassifier):
    """Fine-tune a timm backbone under the class means of the base's features, a linear probe, or a learned head.

    Its own head is ``"means"``: the mean of the base's normalized features over each class's training examples,
    normalized, times ``logit_scale``. It is computed once for a base and a set of examples.

    Args:
        name: timm's name of the network, such as ``tf_efficientnet_lite0``.
        pretrained: A local file of weights, in any format that `tva.open_weights` reads; or true for timm's own
            (downloaded when first used). A network without weights is refused. Environment variables are expanded.
        image_size: Height and width that images are scaled to (the shorter side; the middle is taken); by default the
            network's own.
        batch_norm: How BatchNorm is handled. ``"fold"``: it is folded into the convolutions first, which changes no
            output, so that the base has no statistics to edit. ``"freeze"``: its statistics stay the base's.
            ``"train"``: they move in training, and the edit's ``statistics`` says how they are edited.
        logit_scale: What cosines are multiplied by.
        head: ``"means"``, ``"probe"`` or ``"learned"``.
        channels_last: Lay the weights of convolutions out by pixel; several times faster on CPUs.
        **options: Options of `FrozenHeadClassifier`.

    Raises:
        ValueError: timm does not know the network, there are no weights, they are another network's, or BatchNorm
            cannot be folded.
        FileNotFoundError: The file of weights is not there.
    """

    image_transform: Callable[[Any], Tensor]  # from a PIL image to the encoder's input

    def __init__(
        self,
        name: str,
        pretrained: bool | str | None = None,
        image_size: int | None = None,
        batch_norm: BatchNorm = "fold",
        logit_scale: float = 20.0,
        head: Literal["means", "probe", "learned"] = "means",
        channels_last: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(head=head, channels_last=channels_last, **options)
        self.batch_norm = batch_norm
        self.logit_scale = logit_scale
        self._base = (name, pretrained, image_size, batch_norm)
        self.encoder, self.image_transform = load_encoder(*self._base)
        self._finish()

    @property
    def source(self) -> str | None:
        """Folder that the network was loaded from, or the file of its weights in such a folder."""
        name, pretrained = self._base[:2]
        if isinstance(pretrained, str):
            path = os.path.expandvars(pretrained)
            return path if model_folder(Path(path)) is not None else None
        return name.partition(":")[2] if name.startswith("local-dir:") else None

    def load_base(self) -> nn.Module:
        return load_encoder(*self._base)[0].to(memory_format=torch.channels_last)

    def on_train_epoch_start(self) -> None:
        # Not by overriding train(): re-estimating statistics needs them to move outside of fitting.
        if self.batch_norm == "freeze":
            for module in self.encoder.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()


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
    return encoder.eval(), create_transform(**config, is_training=False)


def is_timm(name: str) -> bool:
    """Return whether timm has a network of this name."""
    import timm

    return ":" not in name and "/" not in name and timm.is_model(name)


def load_timm(name: str, pretrained: bool | str | None) -> tuple[nn.Module, Any, list[str] | None, list[str]]:
    """Load a network of timm with its own classifier, in evaluation mode on the CPU.

    Args:
        name: A local folder in the layout of timm's hub, or timm's name of a network.
        pretrained: With a name: a local file of weights, or true for timm's own.

    Returns:
        The network; the transform from a PIL image to its input; the names of its classes, where it has them; and the
        names of its classifier's parameters.

    Raises:
        ValueError: timm cannot make it, or it has no weights.
    """
    import timm
    from timm.data import create_transform, resolve_model_data_config

    place = os.path.expandvars(os.path.expanduser(name))
    if os.path.isdir(place):
        name, pretrained = f"local-dir:{place}", True
    elif ":" not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models())
        raise ValueError(
            f"{name} must be a folder with config.json and weights, or a network of timm {timm.__version__}"
            + (f", such as {some(near)}." if near else ".")
        )
    if not pretrained:
        raise ValueError(f"{name} needs weights. Pass pretrained= a local file, or true for timm's own.")
    try:
        network = timm.create_model(name, pretrained=pretrained is True)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"timm could not make {name} with its weights: {error}") from error
    if isinstance(pretrained, str):
        weights = open_weights(os.path.expandvars(pretrained))
        check_same(network.state_dict(), weights, f"the network {name}", f"the file {pretrained}")
        network.load_state_dict(dict(weights.items()), strict=True)
    config = network.pretrained_cfg
    classifiers = config.get("classifier") or ()
    tops = tuple(f"{top}." for top in ((classifiers,) if isinstance(classifiers, str) else classifiers))
    head = [parameter for parameter, _ in network.named_parameters() if tops and parameter.startswith(tops)]
    transform = create_transform(**resolve_model_data_config(network), is_training=False)
    return network.float().eval(), transform, list(config.get("label_names") or []) or None, head


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
