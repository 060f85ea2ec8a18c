"""TaskVectorCallback in trainings that others wrote: LoRA-only checkpoints, moved folders, NaN, crashes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from safetensors import safe_open
from small_models import MixedNet, assert_vector_is_checkpoint_minus_base, fit, names
from torch import nn
from torchmetrics import MeanMetric
from tva.callbacks import ControlEvaluation, MergeStatistics, TaskVectorCallback
from tva.callbacks.evaluate_in_fit import Means

from tva import MismatchError, TaskVector, fingerprint, open_weights

LAST = "epoch=1-step=8"
pytestmark = pytest.mark.filterwarnings("ignore:.* operations failed during fit")  # all warnings again, at the end


def read_header(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


# --- weights that are not finite


class Diverging(MixedNet):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.global_step == 6:
            with torch.no_grad():
                self.body[0].weight.fill_(float("nan"))


def test_weights_that_become_nan_are_a_warning_and_training_goes_on():
    options = {"at_train_end": True, "every_n_steps": 7}
    with pytest.warns(UserWarning, match="training continues") as caught:
        trainer, _ = fit(TaskVectorCallback(**options), model=Diverging(), logger=CSVLogger(Path("log")))
    assert trainer.global_step == 8
    messages = [str(warning.message) for warning in caught]
    missing = [message for message in messages if message.startswith("The task vector")]
    assert len(missing) == 3  # at step 7, and two at the end
    assert all("training continues: A task vector must be finite" in message for message in missing)
    assert any(message.startswith("3 operations failed") for message in messages)
    assert names("*.tv.safetensors") == ["epoch=0-step=4.tv.safetensors"]
    assert names(folder="trajectory") == []


def test_a_vector_that_was_asked_for_is_an_error_where_the_weights_are_nan():
    callback = TaskVectorCallback(with_checkpoints=False)
    trainer, _ = fit(callback, model=Diverging())
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        callback.save_vector(trainer, Path("asked.tv.safetensors"))


def test_metrics_that_are_nan_do_not_make_the_header_something_else_than_json():
    class Bad(MixedNet):
        def __init__(self, ratio=1.0):
            super().__init__()
            self.save_hyperparameters()

        def on_train_epoch_end(self):
            self.log_dict({"bad": float("nan"), "high": float("inf"), "good": 1.5})

    fit(model=Bad(ratio=float("nan")), epochs=1)
    header = read_header(Path("epoch=0-step=4.tv.safetensors"))
    metrics = json.loads(header["tva.metrics"], parse_constant=pytest.fail)
    assert metrics["good"] == 1.5
    assert not {"bad", "high"} & metrics.keys()
    assert json.loads(header["tva.hyperparameters"], parse_constant=pytest.fail)["ratio"] == "nan"


# --- checkpoints that do not hold the model as it is


def lora_net(how):
    from peft import LoraConfig, get_peft_model

    class LoraOnly(MixedNet):
        strict_loading = False

        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
            self.body = get_peft_model(self.body, config)

        def on_save_checkpoint(self, checkpoint):
            if how == "hook":
                checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if "lora_" in k}

        def state_dict(self, *args, **options):
            state = super().state_dict(*args, **options)
            return {k: v for k, v in state.items() if "lora_" in k} if how == "override" else state

    return LoraOnly()


def test_a_checkpoint_with_only_lora_weights_has_the_vector_of_the_whole_model():
    vectors = {}
    for how in ("whole", "hook", "override"):
        fit(TaskVectorCallback(at_train_end=True), model=lora_net(how), folder=Path(how))
        vectors[how] = TaskVector.load(f"{how}/{LAST}.tv.safetensors")
        final = TaskVector.load(f"{how}/final.tv.safetensors")
        assert final.origin.finetuned == vectors[how].origin.finetuned
    for how in ("hook", "override"):
        saved = torch.load(f"{how}/{LAST}.ckpt", weights_only=False)["state_dict"]
        assert all("lora_" in name for name in saved)
        assert vectors[how].origin.base == vectors["whole"].origin.base
        assert vectors[how].origin.finetuned == vectors["whole"].origin.finetuned
        for name in ("body.0.weight", "body.2.weight"):
            assert vectors[how].deltas[name].any()
            assert torch.equal(vectors[how].deltas[name], vectors["whole"].deltas[name])


def test_trained_weights_that_a_checkpoint_leaves_out_are_the_models_own():
    class HeadLess(MixedNet):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if "body.0" not in k}

    fit(model=HeadLess(), folder="part")
    fit(folder="whole")
    part, whole = (TaskVector.load(f"{run}/{LAST}.tv.safetensors") for run in ("part", "whole"))
    assert part.origin.finetuned == whole.origin.finetuned
    assert torch.equal(part.deltas["body.0.weight"], whole.deltas["body.0.weight"])
    assert part.untouched == whole.untouched


def test_a_checkpoint_whose_keys_are_renamed_has_a_vector_under_the_models_names():
    class Renaming(MixedNet):
        def on_save_checkpoint(self, checkpoint):
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name.removeprefix("body."): value for name, value in state.items()}

    with pytest.warns(
        UserWarning, match=r"holds '0.weight', .*which the model does not: the vector has the model's own"
    ):
        fit(model=Renaming(), folder="renamed")
    fit(folder="plain")
    renamed, plain = (TaskVector.load(f"{run}/{LAST}.tv.safetensors") for run in ("renamed", "plain"))
    assert renamed.origin.finetuned == plain.origin.finetuned


class Growing(L.Callback):
    def __init__(self, hook):
        setattr(self, hook, self.grow)

    def grow(self, trainer, pl_module):
        pl_module.body[2] = nn.Linear(4, 2)


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
def test_layers_that_are_exchanged_after_the_base_was_taken_are_an_error_before_the_first_step(hook):
    with pytest.raises(
        MismatchError, match=r"base-[0-9a-f]{32}.safetensors was captured: 'body.2.weight' is \[2, 4\] now"
    ):
        fit(callbacks=[Growing(hook)])
    assert names("*.ckpt") == []


def test_pruning_while_training_does_not_end_it():
    model, prune = MixedNet(), ModelPruning("l1_unstructured", amount=0.3)
    with pytest.warns(UserWarning, match=r"step=00000006.* was not written.*continues: The model's keys changed"):
        trainer, _ = fit(TaskVectorCallback(every_n_steps=3), model=model, callbacks=[prune])
    assert trainer.global_step == 8
    assert names(folder="trajectory") == ["step=00000003.tv.safetensors"]  # before the names changed
    vector = assert_vector_is_checkpoint_minus_base(LAST)  # Lightning saves pruned weights under the old names
    assert "body.0.weight" in vector.deltas


def test_states_of_metrics_are_apart_from_the_parameters():
    class Counting(MixedNet):
        def __init__(self):
            super().__init__()
            self.mean = MeanMetric()
            self.mean.persistent(True)

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.mean(loss.detach() * 1000)
            return loss

    fit(model=Counting(), folder="metric")
    fit(folder="plain")
    counting = TaskVector.load(f"metric/{LAST}.tv.safetensors")
    assert {"mean.mean_value", "mean.weight"} <= set(counting.buffers)
    assert not {name for name in counting.deltas if name.startswith("mean.")}
    norms = [read_header(Path(f"{run}/{LAST}.tv.safetensors"))["tva.norm"] for run in ("metric", "plain")]
    assert norms[0] == norms[1]


def test_the_norm_counts_a_tied_tensor_once():
    class Tied(MixedNet):
        def __init__(self):
            super().__init__()
            self.again = self.body

    fit(model=Tied(), folder="tied")
    fit(folder="plain")
    tied, plain = (read_header(Path(f"{run}/{LAST}.tv.safetensors")) for run in ("tied", "plain"))
    assert tied["tva.norm"] == plain["tva.norm"]
    assert_vector_is_checkpoint_minus_base(LAST, folder="tied")
    fit(TaskVectorCallback(exclude=[r"body\..*"]), model=Tied(), folder="part")
    assert read_header(Path(f"part/{LAST}.tv.safetensors"))["tva.norm"] == plain["tva.norm"]


# --- which base


def test_a_run_whose_folder_has_moved_finds_its_base_beside_the_checkpoint():
    fit(epochs=1, folder="old")
    Path("old").rename("new")
    fit(ckpt_path=Path("new/epoch=0-step=4.ckpt"), folder="second")
    vector = TaskVector.load(f"second/{LAST}.tv.safetensors")
    assert vector.origin.base == fingerprint(MixedNet().state_dict())
    (base,) = Path("new").glob("base-*")
    assert torch.equal(vector.deltas["body.0.weight"], after_minus_base(Path(f"second/{LAST}.ckpt"), base))
    base.rename("elsewhere.safetensors")
    with pytest.raises(FileNotFoundError, match="it is not there nor in .*new"):
        fit(ckpt_path=Path("new/epoch=0-step=4.ckpt"), folder="third")


def after_minus_base(checkpoint, base, name="body.0.weight"):
    return (open_weights(checkpoint)[name].double() - open_weights(base)[name].double()).float()


def test_another_fit_of_the_same_model_from_other_weights_has_these_as_its_base():
    callback = TaskVectorCallback()
    _, model = fit(callback, epochs=1, folder="first")
    with torch.no_grad():
        model.body[0].weight.add_(1.0)
    start = fingerprint(model.state_dict())
    with pytest.warns(UserWarning, match="starts neither from the base of the fit before nor from the weights"):
        fit(callback, epochs=1, model=model, folder="second")
    vector = TaskVector.load("second/epoch=0-step=4.tv.safetensors")
    assert vector.origin.base == start
    (base,) = Path("second").glob("base-*")
    expected = after_minus_base(Path("second/epoch=0-step=4.ckpt"), base)
    assert torch.equal(vector.deltas["body.0.weight"], expected)


def test_another_fit_from_the_base_itself_keeps_the_base():
    callback = TaskVectorCallback()
    start = {name: value.clone() for name, value in MixedNet().state_dict().items()}
    _, model = fit(callback, epochs=1, folder="first")
    model.load_state_dict(start)
    fit(callback, epochs=1, model=model, folder="second")
    assert names("base-*", folder="second") == []
    assert TaskVector.load("second/epoch=0-step=4.tv.safetensors").origin.base == fingerprint(start)


def test_another_fit_that_resumes_a_checkpoint_of_no_base_is_an_error():
    fit(L.Callback(), epochs=1, folder="other")
    callback = TaskVectorCallback()
    _, model = fit(callback, epochs=1, folder="first")
    with pytest.raises(ValueError, match="resumes at step 4 from a checkpoint that names no base"):
        fit(callback, model=model, ckpt_path=Path("other/epoch=0-step=4.ckpt"), folder="second")


# --- Trainers


class Asking(L.Callback):
    def __init__(self, callback, path):
        self.callback, self.path = callback, path

    def on_train_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path / "by_hand.ckpt")
        self.saved = self.callback.save_vector(trainer, self.path / "by_hand.tv.safetensors")


def test_a_fast_dev_run_saves_what_lightning_saves_and_no_vector():
    callback = TaskVectorCallback(every_n_steps=1, against="previous", at_train_end=True)
    asking = Asking(callback, Path())
    fit(callback, callbacks=[asking], checkpoint=ModelCheckpoint(Path(), save_last=True), fast_dev_run=True)
    assert asking.saved is None
    assert names("*") == ["by_hand.ckpt", "last.ckpt"]


def test_a_checkpoint_that_is_saved_before_there_is_a_base_has_no_vector():
    class Early(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            trainer.save_checkpoint(Path("early.ckpt"))

    callbacks = [Early(), TaskVectorCallback(), ModelCheckpoint(Path())]  # the first before the callback is asked
    L.Trainer(accelerator="cpu", max_epochs=1, logger=False, callbacks=callbacks).fit(MixedNet())
    assert names("early*") == ["early.ckpt"]


def test_a_vector_can_be_asked_for_after_fit():
    callback = TaskVectorCallback()
    trainer, model = fit(callback)
    saved = callback.save_vector(trainer, Path("after.tv.safetensors"))
    assert saved.finetuned == fingerprint(model.state_dict()).digest
    other = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(RuntimeError, match="needs a Trainer that fits with this callback"):
        callback.save_vector(other, Path("other.tv.safetensors"))


@pytest.mark.parametrize("callback", [TaskVectorCallback(), MergeStatistics(), ControlEvaluation({"a": None})])
def test_a_trainer_of_the_older_package_is_named(callback):
    older = pytest.importorskip("pytorch_lightning")
    from pytorch_lightning.demos.boring_classes import BoringModel

    trainer = older.Trainer(accelerator="cpu", max_steps=1, logger=False, callbacks=[callback], default_root_dir=Path())
    with pytest.raises(
        ValueError, match=f"{type(callback).__name__} needs a Trainer of the package lightning.*import lightning as L"
    ):
        trainer.fit(BoringModel())


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.filterwarnings("ignore:.*SWALR", "ignore:Swapping")
def test_weights_of_the_older_averaging_are_recorded_as_averaged(norm):
    model = MixedNet()
    if not norm:
        model.body[1] = nn.ReLU()
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    checkpoint = ModelCheckpoint(Path(), filename="{epoch}", save_top_k=-1)
    callbacks = [swa, TaskVectorCallback(at_train_end=True), checkpoint]
    options = {"logger": False, "enable_progress_bar": False}
    L.Trainer(accelerator="cpu", max_epochs=3, callbacks=callbacks, **options).fit(model)
    averaged = {file.stem: TaskVector.load(file).origin.averaged for file in Path().glob("*.tv.safetensors")}
    assert averaged["final.tv"]
    assert not averaged["epoch=0.tv"]
    assert not averaged["epoch=2.tv"]
    assert averaged.get("epoch=3.tv", True) is True  # the epoch that estimates the statistics of BatchNorm


def test_steps_that_the_trainer_does_not_count_are_said_at_the_end():
    class Raw(MixedNet):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    with pytest.warns(UserWarning, match="every_n_steps counts the Trainer's steps, and it has counted none"):
        fit(TaskVectorCallback(every_n_steps=2), model=Raw(), epochs=1)


def test_metrics_that_share_their_last_part_keep_their_names():
    means = Means()
    means.log_dict({"val/img/acc": 0.25, "val/text/acc": 0.5, "val/loss": 2.0, "val_f1": 0.75})
    assert means.values(None) == {"img/acc": 0.25, "text/acc": 0.5, "loss": 2.0, "f1": 0.75}
    means = Means()
    means.log_dict({"val/acc": 0.25, "val_acc": 0.5})
    assert means.values(None) == {"val/acc": 0.25, "val_acc": 0.5}


# --- what a killed process leaves


def test_snapshots_of_processes_that_died_are_removed_by_the_next_run():
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here, folder = socket.gethostname(), Path("trajectory")
    folder.mkdir(parents=True)
    gone = [folder / f".previous-abc-4-{dead.pid}@{here}.safetensors"]
    gone.append(folder / f".{gone[0].name}.{dead.pid}.tmp")
    kept = [folder / f".previous-abc-4-{os.getppid()}@{here}.safetensors"]
    kept.append(folder / f".previous-abc-4-{dead.pid}@{here}x.safetensors")  # another machine's
    for file in (*gone, *kept):
        file.write_bytes(b"x")
    fit(TaskVectorCallback(every_n_steps=2, against="previous"))
    assert not any(file.exists() for file in gone)
    assert sorted(folder.glob(".*")) == sorted(kept)


# --- nothing has moved yet


class Still(MixedNet):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def on_train_batch_start(self, batch, batch_idx):
        self.eval()  # so that no statistics move


@pytest.mark.parametrize("logger", [True, False])
def test_a_vector_of_a_model_that_has_not_moved_opens_and_lists_all_names(logger):
    logger = CSVLogger(Path("log")) if logger else False
    fit(TaskVectorCallback(every_n_steps=2, against="previous"), model=Still(), logger=logger)
    vectors = [Path(f"{LAST}.tv.safetensors"), *Path("trajectory").glob("step=*")]
    assert len(vectors) == 5
    for file in vectors:
        vector = TaskVector.load(file)
        assert not vector.deltas
        assert set(vector.untouched) == set(MixedNet().state_dict())
        assert read_header(file)["tva.norm"] == "0.0"
        assert file.stat().st_size < 100_000


def test_a_checkpoint_of_the_initial_weights_and_a_vector_without_any_tensor():
    class Initial(L.Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.save_checkpoint(Path("initial.ckpt"))

    callback = TaskVectorCallback(exclude=[".*"])
    trainer, _ = fit(callback, callbacks=[Initial()], logger=CSVLogger(Path("log")))
    assert trainer.global_step == 8
    assert_vector_is_checkpoint_minus_base("initial")
    assert not TaskVector.load(f"{LAST}.tv.safetensors").deltas.keys() & {"body.0.weight", "body.2.weight"}
