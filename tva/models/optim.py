"""Training options of all models: the paper's optimizer, layer-wise learning rates, and savings of memory or time."""

import ctypes
import math
import os
import platform
import re
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from torch import nn

from tva.layers import block_of
from tva.models.adapters import Lora, adapt


class FineTuned(L.LightningModule):
    """A module with the options of training that all models share.

    Args:
        weights: Checkpoint of this module to start from, such as the output of ``tva edit``.
        learning_rate: Peak learning rate of AdamW, after linear warm-up; it decays to 0 along a cosine.
        weight_decay: AdamW's weight decay, on every trained parameter.
        warmup_steps: Optimizer steps of linear warm-up.
        layer_decay: Factor on the learning rate from each layer to the one below it, such as 0.75.
        fused: Use AdamW's fused kernel, which is faster.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        compile: Compile the network with ``torch.compile`` at first use; weights keep their names.
        train_only: Part of the network to train, like the next two options; see `tva.models.adapters.adapt`.
        lora: See there.
        tangent: See there.

    Source: the recipe is that of Ilharco et al., "Editing models with task arithmetic", ICLR 2023; layer-wise decay
    that of Clark et al., "ELECTRA", ICLR 2020.
    """

    def __init__(
        self,
        weights: str | None = None,
        learning_rate: float = 1e-5,
        weight_decay: float = 0.1,
        warmup_steps: int = 200,
        layer_decay: float | None = None,
        fused: bool = False,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        train_only: str | list[str] | None = None,
        lora: Lora | None = None,
        tangent: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if layer_decay is not None and not 0 < layer_decay <= 1:
            raise ValueError(
                f"layer_decay must be in (0, 1], such as 0.75: each layer's learning rate is that times the one above "
                f"it; found {layer_decay}."
            )
        self.weights = weights
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.layer_decay = layer_decay
        self.fused = fused
        self.task = "task"
        self._savings = (gradient_checkpointing, compile)
        self._adaptation = (train_only, lora, tangent)

    def _adapt(self, part: str) -> None:
        """Set the options of the network, which is an attribute by now; the last line of a constructor."""
        prepare(getattr(self, part).train(), *self._savings)
        adapt(self, self.weights, *self._adaptation, part=part)

    def configure_optimizers(self) -> dict[str, Any]:
        named = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        if self.layer_decay is None:
            groups: list[dict[str, Any]] = [{"params": list(named.values())}]
        else:
            depths = layer_depths(named)
            top = max(depths.values())
            groups = [
                {
                    "params": [parameter for name, parameter in named.items() if depths[name] == depth],
                    "lr": self.learning_rate * self.layer_decay ** (top - depth),
                }
                for depth in sorted(set(depths.values()))
            ]
        if self.device.type == "cpu":
            keep_freed_memory()
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, weight_decay=self.weight_decay)
        for group in optimizer.param_groups if self.fused else ():
            group["fused"] = True  # here, as Lightning 2.6 clips no gradients of an optimizer that was made with it
        total = self.trainer.estimated_stepping_batches
        warmup = min(self.warmup_steps, total)

        def scale(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def keep_freed_memory() -> bool:
    """Let glibc keep what a step frees for the next, where it would give the memory back and fault it in again.

    That costs milliseconds a step on a CPU, and varies with what else is allocated. The environment's ``MALLOC_…_`` go
    before; other C libraries are left as they are.

    Returns:
        Whether it does.

    Source: mallopt(3).
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h; 32 MiB is the most that the second takes
    return all([libc.mallopt(mmap_threshold, 32 << 20), libc.mallopt(trim_threshold, 2**31 - 1)])


def layer_depths(names: Iterable[str]) -> dict[str, int]:
    """Return how deep each parameter is: 0 before the first numbered layer, then one more with each.

    Args:
        names: In the order of registration, which is that of the forward pass in timm, open_clip and transformers,
            except for open_clip's ``proj``, which comes last. What follows a layer without a number goes with it.

    Example:
        >>> layer_depths(["e.proj", "e.embed.weight", "e.blocks.0.weight", "e.blocks.1.weight", "e.norm.weight"])
        {'e.proj': 2, 'e.embed.weight': 0, 'e.blocks.0.weight': 1, 'e.blocks.1.weight': 2, 'e.norm.weight': 2}
    """
    depth, last, depths = 0, None, {}
    for name in names:
        block = block_of(name)
        if re.search(r"(^|\.)\d+$", block) and block != last:
            depth, last = depth + 1, block
        depths[name] = depth
    return {name: depth if name.rpartition(".")[2] == "proj" else found for name, found in depths.items()}


def prepare(network: nn.Module, gradient_checkpointing: bool = False, compiled: bool = False) -> None:
    """Set options of memory and speed that change neither names nor values of weights, in place.

    Args:
        network: A network of timm, open_clip or transformers.
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping them.
        compiled: Compile the network with ``torch.compile`` when it is first used.

    Raises:
        ValueError: The network knows no gradient checkpointing.
    """
    if gradient_checkpointing:
        try:
            for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):  # the new name first
                if hasattr(network, name):  # transformers
                    getattr(network, name)({"use_reentrant": False})
                    break
            else:
                network.set_grad_checkpointing(True)
        except (AttributeError, AssertionError, ValueError) as error:
            raise ValueError(
                f"{type(network).__name__} knows no gradient checkpointing: {error} Leave gradient_checkpointing out."
            ) from error
    if compiled:
        network.compile()  # of the module itself, so that no name in the state dict gets a prefix
