"""TaskVectorCallback in Trainers as they are found: late layers, several optimizers, no checkpoints, used again."""

import copy
import pickle
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small_models import MixedNet, assert_vector_is_checkpoint_minus_base, fit, fsdp1, names, quiet_trainer, run_ranks
from torch import nn
from tva.callbacks import TaskVectorCallback

from tva import TaskVector, fingerprint, open_weights

LAST = "epoch=1-step=8"


class Late(MixedNet):
    """Its layers are made in configure_model, as FSDP advises."""

    def __init__(self):
        super().__init__()
        self.body = None

    def configure_model(self):
        if self.body is None:
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1))


def test_layers_that_configure_model_makes():
    fit(model=Late())
    model = Late()
    model.configure_model()
    vector = assert_vector_is_checkpoint_minus_base(LAST)
    assert vector.origin.base == fingerprint(model.state_dict())
    assert vector.deltas["body.0.weight"].any()


def _late_under_fsdp(folder):
    strategy = fsdp1(state_dict_type="sharded", use_orig_params=True, auto_wrap_policy={nn.Linear})
    fit(model=Late(), strategy=strategy, devices=2, folder=folder)


@pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning",
    "ignore:.*FSDP.state_dict_type.*:FutureWarning",
    "ignore:Please use DTensor instead:FutureWarning",
    "ignore:.*`_get_pg_default_device` will be deprecated",
    "ignore:Multiple backends are registered",
)
def test_layers_that_configure_model_makes_under_fsdp():
    run_ranks(_late_under_fsdp, Path())
    model = Late()
    model.configure_model()
    vector = assert_vector_is_checkpoint_minus_base("epoch=1-step=4")
    assert vector.origin.base == fingerprint(model.state_dict())
    assert vector.deltas["body.0.weight"].any()


class TwoOptimizers(MixedNet):
    """Manual optimization, each optimizer one step per batch: Lightning's global_step counts both."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.AdamW(self.body[part].parameters(), lr=0.05) for part in (0, 2)]


def test_manual_optimization_with_several_optimizers_counts_the_steps_of_all():
    fit(TaskVectorCallback(every_n_steps=3, at_train_end=True), model=TwoOptimizers())
    assert names("*.ckpt") == ["epoch=0-step=8.ckpt", "epoch=1-step=16.ckpt"]
    vector = assert_vector_is_checkpoint_minus_base("epoch=1-step=16")
    assert vector.deltas["body.0.weight"].any()
    assert vector.deltas["body.2.weight"].any()
    assert vector.untouched["body.1.weight"] == "frozen"  # no optimizer has it
    # two steps per batch: the first batch at or after each multiple of three
    assert [int(name[5:13]) for name in names(folder="trajectory")] == [4, 6, 10, 12, 16]


def trainer_without_checkpoints(callback, **options):
    return L.Trainer(accelerator="cpu", max_epochs=1, callbacks=[callback], **options)


@pytest.mark.parametrize("options", [{"barebones": True}, {"enable_checkpointing": False, "logger": False}])
@pytest.mark.filterwarnings("ignore:.*self.log.*barebones", "ignore:.*Trainer\\(barebones=True\\)")
def test_a_trainer_that_keeps_no_checkpoints(options):
    trainer_without_checkpoints(TaskVectorCallback(at_train_end=True), **options).fit(MixedNet())
    assert TaskVector.load("final.tv.safetensors").origin.step == 4
    with pytest.warns(UserWarning, match="keeps no checkpoints.*every_n_steps or at_train_end=True"):
        trainer_without_checkpoints(TaskVectorCallback(), **options).fit(MixedNet())
    assert names("*.tv.safetensors") == ["final.tv.safetensors"]
    trainer_without_checkpoints(TaskVectorCallback(with_checkpoints=False), **options).fit(MixedNet())


class Lazy(MixedNet):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 1))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_parameters_need_a_batch_before_fit():
    with pytest.raises(ValueError, match="'body.0.weight', 'body.0.bias' get their values from the first batch"):
        fit(model=Lazy())
    model = Lazy()
    model.body(torch.zeros(1, 3))
    start = fingerprint(model.state_dict())
    fit(model=model, folder="second")
    assert assert_vector_is_checkpoint_minus_base(LAST, folder="second").origin.base == start


def trainer(folder, callback, epochs=2):
    return quiet_trainer(callback, ModelCheckpoint(dirpath=folder, save_top_k=-1), max_epochs=epochs)


class Validated(MixedNet):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.body(batch[0]).pow(2).mean())

    val_dataloader = MixedNet.train_dataloader


def test_validate_before_fit_and_a_second_fit_of_the_same_trainer():
    callback, model = TaskVectorCallback(at_train_end=True), Validated()
    start = fingerprint(model.state_dict())
    run = trainer(Path(), callback)
    run.validate(model, verbose=False)
    assert names() == []
    run.fit(model)
    assert assert_vector_is_checkpoint_minus_base(LAST).origin.base == start
    run.validate(model, verbose=False)
    run.fit_loop.max_epochs = 4
    run.fit(model)
    again = assert_vector_is_checkpoint_minus_base("epoch=3-step=16")
    assert again.origin.base == start
    assert names("final*") == ["final-v1.tv.safetensors", "final.tv.safetensors"]


def test_a_callback_used_again_for_another_model_has_that_models_base(tmp_path):
    callback = TaskVectorCallback()
    for seed in (1, 2):  # as folds of a cross-validation
        model = MixedNet()
        torch.manual_seed(seed)
        nn.init.normal_(model.body[0].weight)
        start = fingerprint(model.state_dict())
        trainer(tmp_path / str(seed), callback, epochs=1).fit(model)
        assert TaskVector.load(f"{seed}/epoch=0-step=4.tv.safetensors").origin.base == start
        base = open_weights(f"{seed}/base-{start.digest}.safetensors")
        assert fingerprint(base) == start


def test_a_callback_that_has_been_used_can_be_copied():
    callback = TaskVectorCallback()
    fit(callback, epochs=1)
    assert copy.copy(callback).every_n_steps is None
    assert TaskVectorCallback.__getstate__(callback)["_model"] is None
    assert pickle.loads(pickle.dumps(TaskVectorCallback(every_n_steps=3))).every_n_steps == 3
