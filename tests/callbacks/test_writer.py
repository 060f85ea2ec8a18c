"""Which weights TaskVectorCallback takes: averaged or raw, tied, compiled, LoRA, frozen, statistics, integers."""

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from small_models import Blobs, LinearNet, MixedNet, assert_vector_is_checkpoint_minus_base, fit, names
from torch import nn
from tva.callbacks import TaskVectorCallback

from tva import TaskVector, fingerprint, open_weights, save_weights
from tva.checkpoints import open_finetuned, read_metadata
from tva.vectors.header import Origin
from tva.vectors.write import TensorSource, VectorPlan, emit

LAST = "epoch=1-step=8"


# --- one pass gives what the library gives


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_file_is_what_the_library_computes(dtype):
    generator = torch.Generator().manual_seed(0)
    base = {
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "one": torch.ones(1, 1),
        "large": torch.randn(700, 900, generator=generator),  # several pieces
        "late": torch.zeros(2**19),
        "double": torch.randn(3, generator=generator, dtype=torch.float64),
        "half": torch.randn(5, generator=generator).bfloat16(),
        "transposed": torch.randn(3, 4, generator=generator).T,
        "frozen": torch.ones(4),
        "count": torch.tensor(3),
        "mask": torch.tensor([True, False]),
        "norm.running_mean": torch.zeros(3),
        "excluded": torch.zeros(2),
    }
    tuned = {name: value + 0.5 if value.is_floating_point() else value for name, value in base.items()}
    tuned["frozen"], tuned["count"] = base["frozen"], torch.tensor(8)
    tuned["late"] = base["late"].clone()
    tuned["late"][-1] = 1.0  # all pieces but the last are zero
    save_weights(base, "base.safetensors")
    weights = open_weights("base.safetensors")
    sources = {name: TensorSource.of(value) for name, value in tuned.items()}
    plan = VectorPlan(weights, fingerprint(weights), sources, exclude=["excluded"], dtype=dtype)
    emitted = emit(plan, Path("streamed.tv.safetensors"), Origin(task="t"), Path("copy.safetensors"))
    expected = TaskVector.between(base, tuned, exclude=["excluded"], origin=Origin(task="t"))
    expected.save("whole.tv.safetensors", dtype=dtype)
    ours, theirs = (TaskVector.load(f"{name}.tv.safetensors") for name in ("streamed", "whole"))
    assert ours.deltas.keys() == theirs.deltas.keys()
    assert ours.buffers.keys() == theirs.buffers.keys() == {"norm.running_mean"}
    for name, delta in {**theirs.deltas, **theirs.buffers}.items():
        mine = {**ours.deltas, **ours.buffers}[name]
        assert torch.equal(mine, delta), name
        assert mine.dtype == delta.dtype, name
    assert ours.untouched == theirs.untouched
    assert ours.origin == theirs.origin
    assert emitted.norm == pytest.approx(expected.norm())
    assert fingerprint(open_weights("copy.safetensors")) == fingerprint(tuned)


def test_what_does_not_fit_or_is_not_finite_is_refused_and_leaves_nothing():
    save_weights({"w": torch.zeros(3)}, "base.safetensors")
    weights = open_weights("base.safetensors")
    for value, dtype, message in ((1e6, torch.float16, "do not fit"), (float("inf"), None, "NaN or infinity")):
        plan = VectorPlan(weights, fingerprint(weights), {"w": TensorSource.of(torch.full((3,), value))}, dtype=dtype)
        with pytest.raises(ValueError, match=message):
            emit(plan, Path("v.tv.safetensors"), Origin())
    large = VectorPlan(
        weights, fingerprint(weights), {"w": TensorSource.of(torch.full((3,), 1e30))}
    )  # its square overflows
    assert emit(large, Path("v.tv.safetensors"), Origin()).norm == pytest.approx(3**0.5 * 1e30)
    assert names() == ["base.safetensors", "v.tv.safetensors"]


# --- averaged or raw


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("weights", ["raw", "averaged", "checkpoint"])
def test_averaged_or_raw_weights_as_asked_for_and_recorded(weights, weights_only):
    checkpoint = ModelCheckpoint(dirpath=".", save_weights_only=weights_only)
    seen = {}

    class Look(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            average = trainer.callbacks[0]._average_model.module
            for name, module in (("raw", pl_module), ("averaged", average)):
                seen[name] = fingerprint({k: v.clone() for k, v in module.state_dict().items()}).digest

    callback = TaskVectorCallback(weights=weights)
    fit(EMAWeightAveraging(decay=0.5), callbacks=[callback, Look()], checkpoint=checkpoint)
    vector = TaskVector.load(f"{LAST}.tv.safetensors")
    assert seen["raw"] != seen["averaged"]
    # Lightning stores the raw weights when it stores weights only: its averaging hook is skipped then.
    held = ("raw" if weights_only else "averaged") if weights == "checkpoint" else weights
    assert vector.origin.finetuned == seen[held]
    assert vector.origin.averaged is (held == "averaged")
    assert vector.origin.weights == weights


def test_averaging_and_the_order_of_callbacks():
    with pytest.raises(ValueError, match="weights='averaged' needs a WeightAveraging callback"):
        fit(TaskVectorCallback(weights="averaged"))
    with pytest.raises(ValueError, match="put TaskVectorCallback after it"):
        fit(TaskVectorCallback(at_train_end=True), callbacks=[EMAWeightAveraging()])
    with pytest.raises(ValueError, match="overwrites the raw weights.*put TaskVectorCallback before it"):
        fit(EMAWeightAveraging(), callbacks=[TaskVectorCallback(weights="raw", at_train_end=True)])
    fit(EMAWeightAveraging(decay=0.5), callbacks=[TaskVectorCallback(every_n_steps=8, at_train_end=True)])
    step, final, beside = (
        TaskVector.load(f"{name}.tv.safetensors") for name in ("trajectory/step=00000008", "final", LAST)
    )
    assert step.origin.finetuned == final.origin.finetuned == beside.origin.finetuned
    assert step.origin.averaged
    fit(TaskVectorCallback(weights="raw", at_train_end=True), callbacks=[EMAWeightAveraging()], folder="raw")
    assert TaskVector.load("raw/final.tv.safetensors").origin.averaged is False


# --- kinds of tensors


class Tied(MixedNet):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Linear(3, 4, bias=False)
        self.embedding.weight = self.body[0].weight


def test_tied_weights_have_their_delta_under_each_name():
    fit(model=Tied())
    vector = assert_vector_is_checkpoint_minus_base(LAST)
    assert torch.equal(vector.deltas["embedding.weight"], vector.deltas["body.0.weight"])
    base = open_weights(next(Path().glob("base-*")))
    model = Tied()
    model.load_state_dict(vector.apply_to(base, 1.0))
    assert model.embedding.weight is model.body[0].weight
    assert torch.equal(model.embedding.weight, vector.apply_to(base, 1.0)["body.0.weight"])


def test_a_compiled_submodule_has_the_names_of_a_plain_one():
    model = MixedNet()
    model.body = torch.compile(model.body, backend="eager")
    fit(model=model)
    assert any("_orig_mod" in name for name in model.state_dict())
    assert assert_vector_is_checkpoint_minus_base(LAST).names == set(MixedNet().state_dict())


def test_statistics_are_kept_apart_and_integers_never_move():
    fit(TaskVectorCallback(include=[r".*\.weight"]))
    vector = TaskVector.load(f"{LAST}.tv.safetensors")
    assert set(vector.buffers) == {"body.1.running_mean", "body.1.running_var"}  # include is for parameters
    assert vector.untouched["body.1.num_batches_tracked"] == "integer"
    assert vector.untouched["frozen.weight"] == "frozen"
    assert vector.untouched["body.0.bias"] == "excluded"


# --- LoRA


class LoraNet(LinearNet):
    """A peft model inside, with a module that is trained whole."""

    def __init__(self, **options):
        super().__init__()
        from peft import LoraConfig, get_peft_model

        self.plain = {name: value.clone() for name, value in self.net.state_dict().items()}
        config = LoraConfig(r=2, lora_alpha=3, target_modules=["0"], modules_to_save=["2"], **options)
        self.net = get_peft_model(self.net, config)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.01)

    def train_dataloader(self):
        return Blobs().train_dataloader()

    def val_dataloader(self):
        return Blobs().val_dataloader()


def merged(model):
    """The dense model, by peft's own merge."""
    import copy

    net = copy.deepcopy(model).net.merge_and_unload()
    return net.state_dict()


def test_lora_merged_is_the_dense_delta_under_the_names_of_the_base_model():
    model = LoraNet()
    fit(TaskVectorCallback(at_train_end=True), model=model)
    base = open_weights(next(Path().glob("base-*")))
    assert fingerprint(base) == fingerprint(model.plain)
    vector = TaskVector.load("final.tv.safetensors")
    layer = model.net.base_model.model[0]
    assert torch.equal(vector.deltas["0.weight"], layer.get_delta_weight("default"))
    assert vector.untouched == {"0.bias": "frozen"}
    for name, value in merged(model).items():
        assert torch.allclose(vector.apply_to(base)[name], value, atol=1e-6), name
    assert vector.deltas["2.weight"].any()  # modules_to_save
    beside = sorted(Path().glob("epoch=1*.tv.safetensors"))
    assert TaskVector.load(beside[0]).origin.finetuned == vector.origin.finetuned


def test_lora_along_the_way_against_the_previous():
    model = LoraNet()
    fit(TaskVectorCallback(every_n_steps=3, against="previous", at_train_end=True), model=model)
    steps = [TaskVector.load(file) for file in sorted(Path("trajectory").glob("step=*"))]
    final = TaskVector.load("final.tv.safetensors")
    total = sum(step.deltas["0.weight"] for step in steps)
    assert len(steps) == 2
    assert torch.allclose(total, final.deltas["0.weight"], atol=1e-6)


def test_an_adapter_kept_as_it_is_opens_as_a_fine_tuned_checkpoint():
    model = LoraNet()
    checkpoint = ModelCheckpoint(dirpath=".", save_top_k=1, save_last=True)
    fit(TaskVectorCallback(lora="adapter", task="t"), model=model, checkpoint=checkpoint)
    assert names("*.tv.safetensors") == []
    assert names("*.adapter") == [f"{LAST.replace('8', '6')}.adapter", "last.adapter"]
    base = open_weights(next(Path().glob("base-*")))
    tuned = open_finetuned("last.adapter", base)
    for name, value in merged(model).items():
        assert torch.allclose(tuned[name], value, atol=1e-6), name
    header = read_header(Path("last.adapter/adapter_model.safetensors"))
    assert header["tva.base_fingerprint"] == fingerprint(base).digest
    assert header["tva.task"] == "t"


def read_header(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def test_lora_variants_are_refused_by_name_before_training():
    with pytest.raises(ValueError, match=r"reads only plain LoRA, and not 'net.base_model.model.0 \(.*DoRA\)'"):
        fit(model=LoraNet(use_dora=True))
    assert names("*.ckpt") == []


def test_an_adapter_needs_one_peft_model():
    from peft import LoraConfig, inject_adapter_in_model

    class Injected(LinearNet):
        def __init__(self):
            super().__init__()
            inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), self.net)

        train_dataloader = LoraNet.train_dataloader
        val_dataloader = LoraNet.val_dataloader

    fit(model=Injected(), folder="merge")
    vector = TaskVector.load(next(Path("merge").glob("epoch=1*.tv.safetensors")))
    assert set(vector.names) == set(LinearNet().net.state_dict())
    with pytest.raises(ValueError, match="keeps one adapter of one peft model; found none. Use lora='merge'"):
        fit(TaskVectorCallback(lora="adapter"), model=Injected(), folder="adapter")
    assert read_metadata(next(Path("merge").glob("epoch=1*.tv.safetensors")))["tva.weights"] == "checkpoint"
