"""Train the model of an edit for a few steps, as baselines and audits do."""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from tva.checkpoints import canonical_state_dict
from tva.edit.editor import Editor
from tva.evaluation.evaluate import quiet


class _Snapshots(L.Callback):
    def __init__(self, at: Collection[int]) -> None:
        self.at = at
        self.states: list[tuple[int, dict[str, Tensor]]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step not in self.at:
            return
        state = {
            name: tensor.detach().cpu().clone() for name, tensor in canonical_state_dict(pl_module.state_dict()).items()
        }
        if all(bool(torch.isfinite(tensor).all()) for tensor in state.values() if tensor.is_floating_point()):
            self.states.append((trainer.global_step, state))
        else:
            trainer.should_stop = True


def train_briefly(
    editor: Editor,
    datamodule: L.LightningDataModule,
    at: Sequence[int],
    *,
    start: Callable[[], None] | None = None,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    seed: int = 0,
    reverse: bool = False,
) -> list[tuple[int, dict[str, Tensor]]]:
    """Train the model on a task; afterwards it has the base's weights again.

    Args:
        editor: Holds the model.
        datamodule: The task, whose ``train_dataloader`` gives the batches.
        at: Optimizer steps after which the weights are kept; the last is that of training.
        start: Sets the weights to start from; by default the base's.
        optimizer: Makes the optimizer of the trained parameters; by default the model's own, with its schedule.
        seed: Of dropout and of a loader that shuffles.
        reverse: Negate the loss.

    Returns:
        Pairs of a step and the weights after it, while they are finite.
    """
    editor.set(None, 0.0)
    if start is not None:
        start()
    model = editor.model
    step, modes = model.training_step, {name: module.training for name, module in model.named_modules()}

    def reversed_step(batch: Any, batch_idx: int) -> Any:
        outputs = step(batch, batch_idx)
        return {**outputs, "loss": -outputs["loss"]} if isinstance(outputs, Mapping) else -outputs

    snapshots = _Snapshots(at)
    with contextlib.ExitStack() as stack:
        if reverse:
            stack.enter_context(overridden(model, "training_step", reversed_step))
        if optimizer is not None:
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            stack.enter_context(overridden(model, "configure_optimizers", lambda: optimizer(trained)))
        stack.enter_context(quiet())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.callback(_put_back, model, modes)
        torch.manual_seed(seed)
        model.train()
        _make_trainer(editor.trainer, at[-1], snapshots).fit(model, datamodule=datamodule)
    model.cpu()
    editor.set(None, 0.0)
    return editor.trainer.strategy.broadcast(snapshots.states)  # processes must not differ by a rounding


def _make_trainer(like: L.Trainer, num_steps: int, snapshots: _Snapshots) -> L.Trainer:
    device = like.strategy.root_device
    return L.Trainer(
        accelerator="cpu" if device.type == "cpu" else "auto",
        devices=1 if device.index is None else [device.index],
        precision=like.precision,
        max_steps=num_steps,
        max_epochs=-1,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[snapshots],
    )


def _put_back(model: L.LightningModule, modes: Mapping[str, bool]) -> None:
    model.zero_grad(set_to_none=True)
    for name, module in model.named_modules():
        module.training = modes.get(name, module.training)


@contextlib.contextmanager
def overridden(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace a method of one object for a while."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
        if before is not None:
            setattr(owner, name, before)
