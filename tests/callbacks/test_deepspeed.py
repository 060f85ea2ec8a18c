"""TaskVectorCallback under DeepSpeed ZeRO: on two gloo processes where deepspeed is installed, else with stand-ins."""

import importlib.util
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy
from small_models import Gloo, MixedNet, ShardedNet, assert_vector_is_checkpoint_minus_base, fit, names, run_ranks
from torch import nn
from tva.callbacks import MergeStatistics, ScalingCurve, TaskVectorCallback
from tva.callbacks.deepspeed import zero_state
from tva.callbacks.sharding import Shards, live_state

from tva import TaskVector, fingerprint, open_weights

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="trains with DeepSpeed itself: pip install deepspeed"
)

# --- DeepSpeed itself, on the CPU, which Lightning refuses to start


class OnCpu(DeepSpeedStrategy):
    root_device = torch.device("cpu", 0)  # DeepSpeed asks for an index

    def setup_environment(self):
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self):
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class TiedNet(ShardedNet):
    def __init__(self, precision="32-true"):
        super().__init__(width=7)
        if precision != "32-true":  # torch has no BatchNorm on the CPU for rounded weights with full statistics
            self.body[1] = nn.LayerNorm(7)

    def configure_model(self):
        pass


def fit_zero(folder, stage, precision="32-true", ckpt_path=None, callback=None, epochs=2, **options):
    import warnings

    warnings.simplefilter("ignore")  # DeepSpeed's own
    os.environ["DS_ACCELERATOR"] = "cpu"
    strategy = OnCpu(stage=stage, logging_level=40)
    model = options.pop("model", None) or TiedNet(precision)
    return fit(
        callback,
        model=model,
        strategy=strategy,
        devices=2,
        precision=precision,
        ckpt_path=ckpt_path,
        epochs=epochs,
        checkpoint=ModelCheckpoint(dirpath=folder, save_top_k=-1),
        folder=folder,
        **options,
    )


def own_weights(folder):
    """What DeepSpeed's own script makes of its folder."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return get_fp32_state_dict_from_zero_checkpoint(str(folder))


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_vector_is_that_of_the_checkpoints_in_full_precision_fresh_and_resumed(stage, precision):
    run_ranks(fit_zero, Path("first"), stage, precision)
    assert names("*.tv.safetensors", folder="first") == [
        "epoch=0-step=2.tv.safetensors",
        "epoch=1-step=4.tv.safetensors",
    ]
    start = TiedNet(precision)
    start = (start.bfloat16() if precision == "bf16-mixed" else start).state_dict()
    base = open_weights(next(Path("first").glob("base-*")))
    assert set(base) == set(start)
    for name, value in start.items():
        assert torch.equal(base[name], value.to(base[name].dtype)), name
    for name in ("epoch=0-step=2", "epoch=1-step=4"):
        vector = assert_vector_is_checkpoint_minus_base(name, folder="first")
        theirs = own_weights(Path(f"first/{name}.ckpt"))
        for key, delta in vector.deltas.items():
            assert torch.equal(delta, theirs[key].float() - base[key].float()), key
        assert vector.deltas["body.0.weight"].dtype == torch.float32
        assert torch.equal(vector.deltas["tied.weight"], vector.deltas["body.0.weight"])
        assert vector.untouched["frozen.weight"] == "frozen"
    if precision == "bf16-mixed":  # in full precision: rounded weights would give rounded deltas
        delta = vector.deltas["body.0.weight"] + base["body.0.weight"]
        assert not torch.equal(delta, delta.bfloat16().float())
    run_ranks(fit_zero, Path("second"), stage, precision, Path("first/epoch=0-step=2.ckpt"))
    assert names("base-*", folder="second") == []  # that of the first run
    resumed = TaskVector.load("second/epoch=1-step=4.tv.safetensors")
    assert resumed.origin.base == fingerprint(base)
    assert resumed.origin.run == vector.origin.run
    assert resumed.origin.finetuned == fingerprint(open_weights("second/epoch=1-step=4.ckpt")).digest


def _along_the_way(folder, stage):
    callback = TaskVectorCallback(every_n_steps=1, against="previous", at_train_end=True, with_checkpoints=False)
    fit_zero(folder, stage, callback=callback)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_vectors_along_the_way_add_up_under_zero(stage):
    run_ranks(_along_the_way, Path(), stage)
    steps = [TaskVector.load(file) for file in sorted(Path("trajectory").glob("step=*"))]
    final = TaskVector.load("final.tv.safetensors")
    assert len(steps) == 4
    for name, delta in final.deltas.items():
        assert torch.allclose(sum(step.deltas[name] for step in steps), delta, atol=1e-6), name
    assert final.origin.finetuned == fingerprint(open_weights("epoch=1-step=4.ckpt")).digest


def _lora(folder, stage):
    from peft import LoraConfig, inject_adapter_in_model

    model = MixedNet()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), model.body)
    if stage == 3:
        with pytest.raises(ValueError, match="LoRA modules cannot be read under OnCpu. Use DDP"):
            fit_zero(folder, stage, model=model)
    else:
        fit_zero(folder, stage, model=model)
        expected = model.body[0].get_delta_weight("default")
        vector = TaskVector.load(folder / "epoch=1-step=4.tv.safetensors")
        assert torch.equal(vector.deltas["body.0.weight"], expected)
        assert vector.untouched["body.2.weight"] == "frozen"
    (folder / f"done-{os.environ['LOCAL_RANK']}").touch()


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_lora_under_zero_is_merged_or_refused(stage):
    run_ranks(_lora, Path(), stage)
    assert names("done-*") == ["done-0", "done-1"]


# --- the same interface without DeepSpeed: what its parameters carry, on ranks whose stretches end anywhere


PARAMETERS = {"a": (5, 3), "b": (7,), "none": (0,), "one": (), "frozen": (3, 2)}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        for number, (name, shape) in enumerate(PARAMETERS.items()):
            count = torch.Size(shape).numel()
            values = torch.arange(count, dtype=torch.float32).reshape(shape) + 100 * number + 1 / 3
            setattr(self, name, nn.Parameter(values, requires_grad=name != "frozen"))
        self.tied = self.a
        self.register_buffer("count", torch.tensor(3))


def as_stage_1_or_2(model, rank, world):
    """One flat group in full precision, of which the ranks hold equal stretches; the module holds rounded copies."""
    trained = [parameter for parameter in dict.fromkeys(model.parameters()) if parameter.requires_grad]
    total = sum(parameter.numel() for parameter in trained)
    each = -(-total // world)
    low, high, position = rank * each, (rank + 1) * each, 0
    for parameter in trained:
        start, stop = max(position, low), min(position + parameter.numel(), high)
        full = parameter.detach().clone().reshape(-1)
        parameter._hp_mapping = None
        if start < stop:
            fragment = full[start - position : stop - position]
            address = SimpleNamespace(start=start - position, numel=stop - start)
            parameter._hp_mapping = SimpleNamespace(
                lp_fragment_address=address, get_hp_fragment=lambda fragment=fragment: fragment
            )
        position += parameter.numel()
        parameter.data = parameter.data.bfloat16()


def as_stage_3(model, rank, world):
    """Each parameter padded and split; the module holds nothing."""
    for number, parameter in enumerate(dict.fromkeys(model.parameters())):
        full, count = parameter.detach().clone(), parameter.numel()
        each = -(-count // world)
        padded = torch.cat([full.reshape(-1), torch.full((each * world - count,), float("nan"))])
        parameter.ds_id, parameter.ds_shape, parameter.ds_numel = number, full.shape, count
        parameter.ds_process_group, parameter.full = None, full
        parameter.mine = padded[rank * each : (rank + 1) * each]
        if parameter.requires_grad:
            parameter._z3_optimizer = None
        parameter.data = torch.empty(0)


@contextmanager
def gathered(parameters):
    (parameter,) = parameters
    dist.barrier()  # every rank takes part
    parameter.data = parameter.full
    yield
    parameter.data = torch.empty(0)


def stand_in_for_deepspeed(monkeypatch):
    utils = SimpleNamespace(safe_get_local_fp32_param=lambda parameter: parameter.mine)
    monkeypatch.setitem(sys.modules, "deepspeed.utils", utils)
    module = SimpleNamespace(utils=utils, zero=SimpleNamespace(GatheredParameters=gathered))
    monkeypatch.setitem(sys.modules, "deepspeed", module)


class Zero(Gloo, DeepSpeedStrategy):
    """Just enough of a strategy for two ranks."""

    def __init__(self, stage):
        self.config = {"zero_optimization": {"stage": stage}}


def _read(folder, stage):
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = Net()
    (as_stage_3 if stage == 3 else as_stage_1_or_2)(model, rank, 2)
    strategy = Zero(stage)
    state = live_state(strategy, model)
    assert all(state[name].shape == value.shape for name, value in Net().state_dict().items())
    shards = Shards(strategy, state)
    order = list(reversed(shards.tensors))
    got = shards.on_rank_zero(lambda: (order, lambda: {name: list(shards.parts(name)) for name in order}))
    for name, value in Net().state_dict().items():
        mine = torch.cat([torch.empty(0), *got[name]]) if name in got else state[name].reshape(-1)
        assert torch.equal(mine, value.reshape(-1)), name
    assert ("frozen" in got) is (stage == 3)
    (folder / f"done-{rank}").touch()
    dist.destroy_process_group()


@pytest.mark.parametrize("stage", [1, 3])
def test_partitions_arrive_whole_wherever_they_are_cut(monkeypatch, stage):
    stand_in_for_deepspeed(monkeypatch)
    run_ranks(_read, Path(), stage)
    assert names() == ["done-0", "done-1"]


def test_partitions_over_only_some_ranks_are_refused_by_name(monkeypatch):
    model = Net()
    as_stage_1_or_2(model, 0, 2)  # the other half is nowhere
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 1)
    with pytest.raises(ValueError, match=r"over all ranks alike, and 'a', 'b', 'one'.* is split otherwise \(MiCS"):
        zero_state(model)


def test_callbacks_that_need_the_whole_model_are_refused_under_zero_3():
    trainer = SimpleNamespace(strategy=Zero(3), callbacks=[])
    with pytest.raises(ValueError, match="ScalingCurve needs the whole model on every rank, and Zero shards it"):
        ScalingCurve().setup(trainer, None, "fit")
    with pytest.raises(ValueError, match="MergeStatistics needs the whole model on every rank.*uses Zero"):
        MergeStatistics().setup(trainer, None, "fit")
