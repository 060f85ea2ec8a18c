"""Training with the loss negated, as a setting of a fit."""

from collections.abc import Mapping
from typing import Any

import lightning as L


class GradientAscent(L.Callback):
    """Negate the loss of a fit: the model is trained to be bad at its task.

    Its task vector, added with coefficient 1, is the paper's baseline for forgetting. The loss has no bound and the
    weights diverge, so give the Trainer few steps or ``gradient_clip_val``. What the model logs is not negated.

    Source: the gradient ascent rows of Ilharco et al., ICLR 2023, tables 1 and 2.
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = pl_module.training_step

        def negated(*args: Any, **kwargs: Any) -> Any:
            outputs = step(*args, **kwargs)
            if isinstance(outputs, Mapping):
                return {**outputs, "loss": -outputs["loss"]}
            return None if outputs is None else -outputs

        pl_module.training_step = negated

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore(pl_module)

    def _restore(self, pl_module: L.LightningModule) -> None:
        pl_module.__dict__.pop("training_step", None)
