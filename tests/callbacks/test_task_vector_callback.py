"""TaskVectorCallback in Trainers as people have them: one device, DDP, EMA, weights only, resumed."""

import os
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from small_models import MixedNet as Net
from small_models import assert_vector_is_checkpoint_minus_base, fit, names, run_ranks
from torch import nn
from tva.callbacks import TaskVectorCallback

from tva import MismatchError, TaskVector, fingerprint, open_weights, save_weights


def test_a_vector_is_written_beside_every_checkpoint():
    fit()
    assert names("*.ckpt") == ["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt"]
    assert names("*.tv.safetensors") == ["epoch=0-step=4.tv.safetensors", "epoch=1-step=8.tv.safetensors"]
    assert fingerprint(open_weights(next(Path().glob("base-*")))) == fingerprint(Net().state_dict())
    vector = assert_vector_is_checkpoint_minus_base("epoch=1-step=8")
    assert set(vector.buffers) == {"body.1.running_mean", "body.1.running_var"}
    assert vector.untouched == {
        "body.1.num_batches_tracked": "integer",
        "frozen.weight": "frozen",
        "frozen.bias": "frozen",
    }
    assert (vector.origin.step, vector.origin.epoch, vector.origin.averaged) == (8, 1, False)
    assert vector.origin.metrics["loss"] > 0


def test_a_vector_goes_when_save_top_k_drops_its_checkpoint():
    fit(epochs=4, checkpoint=ModelCheckpoint(dirpath=".", save_top_k=1, save_last=True))
    assert names("*.ckpt") == ["epoch=3-step=16.ckpt", "last.ckpt"]
    assert names("*.tv.safetensors") == ["epoch=3-step=16.tv.safetensors", "last.tv.safetensors"]
    assert_vector_is_checkpoint_minus_base("last")


def test_the_end_of_a_fit_says_where_the_vectors_are(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("tva.callbacks.task_vector.rank_zero_info", said.append)
    fit()
    (base,) = tmp_path.glob("base-*")
    assert said == [f"Task vector: {tmp_path}/epoch=1-step=8.tv.safetensors, the last of 2, against the base {base}"]
    fit(TaskVectorCallback(with_checkpoints=False), folder="none")
    assert len(said) == 1


def test_resuming_keeps_the_original_base():
    fit(epochs=1, folder="first")
    fit(epochs=2, ckpt_path=Path("first/epoch=0-step=4.ckpt"), folder="second")
    vector = TaskVector.load("second/epoch=1-step=8.tv.safetensors")
    assert vector.origin.base == fingerprint(Net().state_dict())
    assert names("base-*", folder="second") == []  # written once, in the first run
    fit(epochs=2, folder="whole")
    whole = TaskVector.load("whole/epoch=1-step=8.tv.safetensors")
    assert vector.origin.finetuned == whole.origin.finetuned


def test_resuming_without_the_base_is_an_error_that_asks_for_it():
    fit(epochs=1, folder="first")
    for file in Path("first").glob("base-*"):
        file.rename("moved.safetensors")
    checkpoint = Path("first/epoch=0-step=4.ckpt")
    with pytest.raises(FileNotFoundError, match=r"base=PATH"):
        fit(ckpt_path=checkpoint, folder="second")
    fit(TaskVectorCallback(base=Path("moved.safetensors")), ckpt_path=checkpoint, folder="third")
    vector = TaskVector.load("third/epoch=1-step=8.tv.safetensors")
    assert vector.origin.base == fingerprint(Net().state_dict())
    save_weights({name: value + 1 for name, value in Net().state_dict().items()}, "other.safetensors")
    with pytest.raises(ValueError, match="was trained from the base"):
        fit(TaskVectorCallback(base=Path("other.safetensors")), ckpt_path=checkpoint, folder="fourth")


def test_a_checkpoint_written_without_the_callback_needs_a_base_to_resume():
    fit(L.Callback(), epochs=1, folder="first")
    with pytest.raises(ValueError, match="resumes at step 4 from a checkpoint that names no base"):
        fit(ckpt_path=Path("first/epoch=0-step=4.ckpt"), folder="second")


def test_a_second_fit_on_the_same_objects_keeps_the_base_of_the_first():
    callback = TaskVectorCallback()
    _, model = fit(callback, epochs=1, folder="first")
    fit(callback, epochs=1, model=model, folder="second")
    vector = TaskVector.load("second/epoch=0-step=4.tv.safetensors")
    assert vector.origin.base == fingerprint(Net().state_dict())


@pytest.mark.parametrize("order", ["ours first", "ours last"])
@pytest.mark.parametrize("weights_only", [False, True])
def test_the_weights_are_those_of_the_checkpoint_with_averaging_too(order, weights_only):
    checkpoint = ModelCheckpoint(dirpath=".", filename="last", save_weights_only=weights_only)
    ours, averaging = TaskVectorCallback(), EMAWeightAveraging(decay=0.5)
    first, second = (ours, averaging) if order == "ours first" else (averaging, ours)
    fit(first, callbacks=[second], checkpoint=checkpoint)
    vector = assert_vector_is_checkpoint_minus_base("last")
    # Lightning stores the raw weights when it stores weights only: its averaging hook is skipped then.
    assert vector.origin.averaged is (not weights_only)


def test_a_fast_dev_run_writes_nothing():
    fit(fast_dev_run=True)
    assert names() == []


def test_include_exclude_and_dtype():
    fit(TaskVectorCallback(include=[r"body\..*"], exclude=[r".*\.bias"], dtype="bfloat16", task="zeros"))
    vector = TaskVector.load("epoch=1-step=8.tv.safetensors")
    assert set(vector.deltas) == {"body.0.weight", "body.1.weight", "body.2.weight"}
    assert vector.untouched["body.0.bias"] == vector.untouched["frozen.weight"] == "excluded"
    assert open_weights("epoch=1-step=8.tv.safetensors")["body.0.weight"].dtype == torch.bfloat16
    assert vector.origin.task == "zeros"
    base = open_weights(next(Path().glob("base-*")))
    assert torch.equal(vector.apply_to(base)["body.0.bias"], base["body.0.bias"])


def test_base_given_as_a_path():
    base = {name: value + 1 if value.is_floating_point() else value for name, value in Net().state_dict().items()}
    torch.save({"state_dict": base}, "base.ckpt")
    fit(TaskVectorCallback(base=Path("base.ckpt")), epochs=1, folder="run")
    assert names("base-*", folder="run") == []
    vector = TaskVector.load("run/epoch=0-step=4.tv.safetensors")
    assert torch.equal(vector.deltas["frozen.weight"], Net().frozen.weight.detach() - base["frozen.weight"])


def test_compiled_submodules_have_the_names_of_plain_ones():
    class Wrapped(nn.Module):  # names as torch.compile gives them, without compiling
        def __init__(self, module):
            super().__init__()
            self._orig_mod = module

        def forward(self, inputs):
            return self._orig_mod(inputs)

    model = Net()
    model.body = Wrapped(model.body)
    fit(model=model, epochs=1)
    assert assert_vector_is_checkpoint_minus_base("epoch=0-step=4").names == set(Net().state_dict())


def test_a_module_that_leaves_frozen_parts_out_of_its_checkpoint():
    class Partial(Net):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k.startswith("body")}

    fit(model=Partial(), epochs=1)
    vector = TaskVector.load("epoch=0-step=4.tv.safetensors")
    assert vector.untouched["frozen.weight"] == "frozen"
    assert "body.0.weight" in vector.deltas


# --- mistakes


def test_a_base_of_another_architecture_is_refused_before_training():
    torch.save(Net(width=5).state_dict(), "wide.pt")
    with pytest.raises(MismatchError, match=r"'body.0.weight' is \[4, 3\] in the model but \[5, 3\]"):
        fit(TaskVectorCallback(base=Path("wide.pt")), folder="run")
    assert not list(Path("run").glob("*.ckpt"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": "body"}, r"must be a list of regular expressions.*\['body'\]"),
        ({"exclude": ["("]}, "not a regular expression"),
        ({"dtype": "int8"}, "one of float32, bfloat16, float16"),
    ],
)
def test_options_that_cannot_be_understood(options, message):
    with pytest.raises(ValueError, match=message):
        TaskVectorCallback(**options)


def test_two_callbacks_in_one_trainer_are_refused():  # by Lightning: they would write the same files
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `TaskVectorCallback`"):
        fit(callbacks=[TaskVectorCallback(dtype="float16")])


def test_the_strategy_is_left_as_it_was():
    trainer, _ = fit(epochs=1)
    assert trainer.strategy.save_checkpoint.__qualname__ == "Strategy.save_checkpoint"


# --- two processes


def _fit_ddp(folder, ckpt_path=None, epochs=2):
    fit(devices=2, strategy="ddp", ckpt_path=ckpt_path, epochs=epochs, folder=folder)


def test_ddp_writes_one_right_vector_fresh_and_resumed():
    run_ranks(_fit_ddp, Path("first"))
    assert names("*.ckpt", folder="first") == ["epoch=0-step=2.ckpt", "epoch=1-step=4.ckpt"]
    assert_vector_is_checkpoint_minus_base("epoch=0-step=2", folder="first")
    whole = assert_vector_is_checkpoint_minus_base("epoch=1-step=4", folder="first")
    run_ranks(_fit_ddp, Path("second"), Path("first/epoch=0-step=2.ckpt"))
    resumed = TaskVector.load("second/epoch=1-step=4.tv.safetensors")
    assert resumed.origin.base == fingerprint(Net().state_dict())
    assert resumed.origin.finetuned == whole.origin.finetuned


def _fail_on_rank_zero(folder):
    callback = TaskVectorCallback(with_checkpoints=False)

    class Asking(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            callback.save_vector(trainer, "/proc/no/such/folder.tv.safetensors")

    expected = OSError if os.environ["LOCAL_RANK"] == "0" else RuntimeError
    with pytest.raises(expected, match="/proc/no"):
        fit(callback, callbacks=[Asking()], devices=2, strategy="ddp", folder=folder)
    (folder / f"failed-{os.environ['LOCAL_RANK']}").touch()


def test_a_failure_on_rank_zero_reaches_the_other_rank():
    run_ranks(_fail_on_rank_zero, Path())
    assert names("failed-*") == ["failed-0", "failed-1"]
