"""ControlEvaluation and ScalingCurve in Trainers as people have them."""

import csv
import doctest
from pathlib import Path

import lightning as L
import pytest
import torch
import tva.callbacks.control_evaluation
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from small_models import Blobs, LinearNet, fit, fsdp1, names, run_ranks
from torch import nn
from torchmetrics.classification import MulticlassAccuracy
from tva.callbacks import ControlEvaluation, ScalingCurve, TaskVectorCallback

from tva import TaskVector, fingerprint, open_weights


class MetricNet(LinearNet):
    """Logs a torchmetrics object, computes another by itself, draws random numbers, and keeps a head for its data."""

    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(num_classes=2, average="micro")
        self.own = MulticlassAccuracy(num_classes=2, average="micro")
        self.noise = nn.Dropout(0.5)
        self.register_buffer("sign", None, persistent=False)

    def setup(self, stage):
        self.seed = self.trainer.datamodule.hparams.seed
        self.sign = torch.ones(())

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        return nn.functional.cross_entropy(self(self.noise(inputs)) * self.sign, labels)

    def validation_step(self, batch, batch_idx):
        inputs, labels = batch
        torch.rand(1)
        logits = self(inputs)
        self.accuracy(logits, labels)
        self.own.update(logits, labels)
        self.log(f"val/blobs{self.seed}/accuracy", self.accuracy)
        self.log_dict({"val_loss": nn.functional.cross_entropy(logits, labels)}, sync_dist=True)

    def on_validation_epoch_end(self):
        self.log("val_own", self.own.compute(), sync_dist=True)
        self.own.reset()


def run(*callbacks, folder=".", model=None, **options):
    model = model or MetricNet()
    checkpoint = options.pop("checkpoint", None) or ModelCheckpoint(dirpath=folder, filename="last")
    first, *rest = callbacks
    trainer = L.Trainer(
        max_epochs=options.pop("epochs", 2),
        accelerator="cpu",
        devices=options.pop("devices", 1),
        callbacks=[first, *rest, checkpoint],
        logger=CSVLogger(folder, name="logs", version=0),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    torch.manual_seed(3)
    trainer.fit(model, datamodule=Blobs(seed=0))
    return trainer, model


def table(folder="."):
    with open(f"{folder}/logs/version_0/metrics.csv") as file:
        return list(csv.DictReader(file))


def column(name, folder="."):
    return [(int(row["step"]), float(row[name])) for row in table(folder=folder) if row.get(name)]


def accuracy_of(state, seed):
    model = LinearNet()
    model.load_state_dict({name: value for name, value in state.items() if name.startswith("net.")})
    inputs, labels = (torch.cat(parts) for parts in zip(*Blobs(seed=seed).val_dataloader(), strict=True))
    with torch.no_grad():
        return float((model(inputs).argmax(-1) == labels).float().mean())


# --- ControlEvaluation


def test_controls_are_evaluated_before_during_and_after():
    control = ControlEvaluation({"other": Blobs(seed=5), "same": Blobs(seed=0)}, every_n_steps=2)
    trainer, model = run(control)
    start = accuracy_of(MetricNet().state_dict(), 5)
    seen = column("control/other/accuracy")
    assert [step for step, _ in seen] == [0, 2, 3, 4, 6]
    assert seen[0][1] == pytest.approx(start)
    assert seen[-1][1] == pytest.approx(accuracy_of(model.state_dict(), 5))
    assert column("control/other/own") == seen
    assert column("control/same/accuracy")[-1][1] == pytest.approx(float(trainer.callback_metrics["val_own"]))
    assert len(column("control/other/loss")) == 5
    assert model.seed == 0  # of fit's data, not of the control's
    assert "log" not in vars(model)


def test_training_is_the_same_bit_for_bit_with_and_without_controls():
    _, with_ = run(ControlEvaluation({"other": Blobs(seed=5)}, every_n_steps=1), folder="with")
    _, without = run(L.Callback(), folder="without")
    assert fingerprint(with_.state_dict()) == fingerprint(without.state_dict())
    keys = ["val/blobs0/accuracy", "val_own", "val_loss"]
    for key in keys:  # nor does what fit itself logs change
        assert column(key, folder="with") == column(key, folder="without") != []


def test_a_control_can_stop_training():
    control = ControlEvaluation({"other": Blobs(seed=5)})
    stop = EarlyStopping("control/other/loss", patience=0, min_delta=1e6)
    checkpoint = ModelCheckpoint(dirpath=".", monitor="control/other/accuracy", save_on_train_epoch_end=True)
    trainer, _ = run(control, stop, checkpoint=checkpoint, epochs=5)
    assert trainer.current_epoch < 5
    scores = [value for _, value in column("control/other/accuracy")[1:]]
    assert float(checkpoint.best_model_score) == pytest.approx(min(scores))


def _controls_ddp(folder):
    run(ControlEvaluation({"other": Blobs(seed=5, num_examples=25)}), strategy="ddp", devices=2, folder=folder)


def test_every_rank_evaluates_all_of_a_control():
    run_ranks(_controls_ddp, Path())
    model = MetricNet()
    inputs, labels = (torch.cat(p) for p in zip(*Blobs(seed=5, num_examples=25).val_dataloader(), strict=True))
    expected = float((model(inputs).argmax(-1) == labels).float().mean())
    assert column("control/other/accuracy")[0][1] == pytest.approx(expected)


class Silent(LinearNet):
    def validation_step(self, batch, batch_idx):
        pass


class Rebuilding(LinearNet):
    def setup(self, stage):
        self.net = nn.Linear(4, 2)


class Two(Blobs):
    def val_dataloader(self):
        return [self._loader(1), self._loader(2)]


@pytest.mark.parametrize(
    ("model", "control", "message"),
    [
        (Silent, Blobs(seed=5), "Silent logged no metric in its validation_step"),
        (Rebuilding, Blobs(seed=5), "Rebuilding.setup makes new parameters at every call"),
        (LinearNet, Two(seed=5), "control 'other' must have one validation loader; Two gives list"),
    ],
)
def test_what_no_control_can_be_evaluated_with(model, control, message):
    with pytest.raises(ValueError, match=message):
        run(ControlEvaluation({"other": control}), model=model())


def test_options_of_controls():
    with pytest.raises(ValueError, match="controls must name at least one data module"):
        ControlEvaluation({})
    with pytest.raises(ValueError, match="every_n_steps must be at least 1; found 0"):
        ControlEvaluation({"a": Blobs()}, every_n_steps=0)


# --- ScalingCurve


def test_the_curve_is_what_editing_by_hand_gives():
    curve = ScalingCurve([0.0, 0.5, 1.0, -1.0])
    _, model = run(TaskVectorCallback(), curve)
    base = {f"net.{name}": tensor for name, tensor in open_weights(next(Path().glob("base-*"))).items()}
    vector = TaskVector.load("last.tv.safetensors")
    for coef, values in zip(curve.coefs, curve.values, strict=True):
        assert values["accuracy"] == pytest.approx(accuracy_of(vector.apply_to(base, coef), 0)), coef
    assert fingerprint(model.state_dict()) == fingerprint(open_weights("last.ckpt"))  # as it was
    with open("scaling_curve.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["coef"]) for row in rows] == [0.0, 0.5, 1.0, -1.0]
    assert Path("scaling_curve.png").read_bytes()[:4] == b"\x89PNG"
    logged = dict(column("scaling/accuracy"))
    assert logged == pytest.approx(
        {round(100 * c): v["accuracy"] for c, v in zip(curve.coefs, curve.values, strict=True)}
    )
    assert names(".*") == []


def _curve_ddp(folder):
    run(TaskVectorCallback(), ScalingCurve([0.0, 1.0]), strategy="ddp", devices=2, folder=folder)


def test_the_curve_under_ddp_is_over_all_examples():
    run_ranks(_curve_ddp, Path())
    logged = dict(column("scaling/accuracy"))
    assert logged[0] == pytest.approx(accuracy_of(MetricNet().state_dict(), 0))
    assert logged[100] == pytest.approx(accuracy_of(open_weights("last.ckpt"), 0))


def _curve_fsdp(folder):
    with pytest.raises(ValueError, match="ScalingCurve needs the whole model on every rank, and OnCpu shards it"):
        fit(TaskVectorCallback(), callbacks=[ScalingCurve()], strategy=fsdp1(), devices=2, folder=folder)


def test_what_no_curve_can_be_drawn_of():
    from peft import LoraConfig, inject_adapter_in_model

    run_ranks(_curve_fsdp, Path())
    with pytest.raises(ValueError, match="needs a TaskVectorCallback in the same Trainer"):
        run(ScalingCurve())
    with pytest.raises(ValueError, match="needs one validation loader in fit, and a validation_step; found none"):
        fit(TaskVectorCallback(), callbacks=[ScalingCurve()])
    with pytest.raises(ValueError, match=r"MetricNet logs \[.*\] in validation, and not 'f1'"):
        run(TaskVectorCallback(), ScalingCurve(metric="f1"), folder="metric")
    lora = MetricNet()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), lora.net)
    with pytest.raises(ValueError, match="cannot move a model with LoRA modules"):
        run(TaskVectorCallback(), ScalingCurve(), model=lora, folder="lora")
    with pytest.raises(ValueError, match="at least one scaling coefficient"):
        ScalingCurve([])


def test_docstrings_run():
    results = doctest.testmod(tva.callbacks.control_evaluation, extraglobs={"L": L})
    assert results.attempted > 0
    assert results.failed == 0
