"""GradientAscent: the same step as without it, in the other direction."""

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from tva.callbacks import GradientAscent


class Net(BoringModel):
    returns_mapping = True

    def training_step(self, batch, batch_idx):
        loss = self(batch).square().mean()
        self.log("train/loss", loss)
        return {"loss": loss, "logged": loss.detach()} if self.returns_mapping else loss

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 2 and getattr(self, "breaks", False):
            raise KeyError("broken")


def step(*callbacks, **attributes):
    torch.manual_seed(0)
    model = Net()
    for name, value in attributes.items():
        setattr(model, name, value)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"max_steps": 1, "limit_val_batches": 0, "logger": False, "enable_checkpointing": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    if attributes.get("breaks"):
        options["max_steps"] = 5
    torch.manual_seed(1)
    trainer = L.Trainer(callbacks=list(callbacks), **options)
    try:
        trainer.fit(model)
    finally:
        assert "training_step" not in vars(model)
    moved = {name: tensor - before[name] for name, tensor in model.state_dict().items()}
    return moved, float(trainer.callback_metrics["train/loss"])


@pytest.mark.parametrize("returns_mapping", [True, False])
def test_a_step_goes_the_other_way_and_logs_the_same(returns_mapping):
    down, loss = step(returns_mapping=returns_mapping)
    up, same = step(GradientAscent(), returns_mapping=returns_mapping)
    assert loss == same
    for name, delta in down.items():
        assert delta.abs().max() > 0
        torch.testing.assert_close(up[name], -delta, rtol=1e-4, atol=1e-7)


def test_the_models_own_step_is_back_after_an_error():
    with pytest.raises(KeyError, match="broken"):
        step(GradientAscent(), breaks=True)
