"""TaskVectorCallback under strategies that shard, on two gloo processes; what is not supported is refused at setup."""

import contextlib
import os
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceXLAStrategy, XLAStrategy
from small_models import (
    Gloo,
    MixedNet,
    ShardedNet,
    assert_vector_is_checkpoint_minus_base,
    fit,
    fsdp1,
    names,
    run_ranks,
)
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tva.callbacks import TaskVectorCallback
from tva.callbacks.sharding import Shards

from tva import MismatchError, TaskVector, fingerprint, open_weights

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning",
    "ignore:.*FSDP.state_dict_type.*:FutureWarning",
    "ignore:Please use DTensor instead:FutureWarning",
    "ignore:.*load_state_dict. is deprecated:FutureWarning",
    "ignore:.*`_get_pg_default_device` will be deprecated",
    "ignore:Multiple backends are registered",
)


def join_ranks():
    dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=2)


def fit_sharded(folder, kind, ckpt_path=None, epochs=2, callback=None, **options):
    if kind.startswith("fsdp2"):
        distributed = kind.endswith("sharded")
        strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=distributed)
        model = ShardedNet()
    else:
        strategy = fsdp1(state_dict_type=kind.split()[1], use_orig_params=True, auto_wrap_policy={nn.Linear})
        model = MixedNet(width=5)
    if kind.endswith("sharded"):  # torch saves the running statistics of any rank, unless they are the same
        model.body[1].momentum = 0.0
    fit(
        callback,
        model=model,
        strategy=strategy,
        devices=2,
        ckpt_path=ckpt_path,
        epochs=epochs,
        **options,
        folder=folder,
    )


KINDS = ["fsdp2 full", "fsdp2 sharded", "fsdp1 full", "fsdp1 sharded"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_vector_is_that_of_the_gathered_checkpoints_fresh_and_resumed(kind):
    run_ranks(fit_sharded, Path("first"), kind)
    assert names("*.tv.safetensors", folder="first") == [
        "epoch=0-step=2.tv.safetensors",
        "epoch=1-step=4.tv.safetensors",
    ]
    start = (ShardedNet() if "fsdp2" in kind else MixedNet(width=5)).state_dict()
    base = open_weights(next(Path("first").glob("base-*")))
    assert fingerprint(base) == fingerprint(start)
    half = assert_vector_is_checkpoint_minus_base("epoch=0-step=2", folder="first")
    whole = assert_vector_is_checkpoint_minus_base("epoch=1-step=4", folder="first")
    assert half.deltas["body.0.weight"].any()
    assert half.untouched["frozen.weight"] == "frozen"
    assert set(half.buffers) == ({"body.1.running_mean", "body.1.running_var"} if kind.endswith("full") else set())
    run_ranks(fit_sharded, Path("second"), kind, Path("first/epoch=0-step=2.ckpt"))
    assert names("base-*", folder="second") == []  # that of the first run
    resumed = TaskVector.load("second/epoch=1-step=4.tv.safetensors")
    assert resumed.origin.base == fingerprint(start)
    assert resumed.origin.run == whole.origin.run
    for name, delta in whole.deltas.items():  # the second run's data loader starts its shuffling anew
        assert torch.allclose(resumed.deltas[name], delta, atol=0.2), name


def _shards_of(folder, tensors, kind):
    """Send tensors to rank 0 in another order than they lie there, and compare."""
    join_ranks()
    rank = dist.get_rank()
    strategy = _Gloo()
    mesh = init_device_mesh("cpu", (2,)) if kind == "rows" else init_device_mesh("cpu", (1, 2))
    placements = [Shard(0)] if kind == "rows" else [Replicate(), Shard(1)]
    state = {name: distribute_tensor(tensor, mesh, placements) for name, tensor in tensors.items()}
    if rank == 1:
        state = dict(reversed(list(state.items())))
    state["whole"] = torch.ones(2)
    shards = Shards(strategy, state)
    order = sorted(tensors, reverse=True)

    def read():
        return {name: torch.cat(list(shards.parts(name))) for name in order}

    got = shards.on_rank_zero(lambda: (order, read))
    for name, tensor in tensors.items():
        assert torch.equal(got[name], tensor.reshape(-1)), name
    (folder / f"done-{rank}").touch()
    dist.destroy_process_group()


class _Gloo(Gloo, ModelParallelStrategy):
    """Just enough of a strategy for two ranks."""


@pytest.mark.parametrize("kind", ["rows", "columns of a two-dimensional mesh"])
def test_odd_tensors_arrive_whole_in_the_order_that_rank_zero_wants(kind):
    tensors = {
        "even": torch.randn(4, 3),
        "uneven": torch.randn(5, 3),
        "one row": torch.randn(1, 3),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(3, 2).bfloat16(),
        "counts": torch.arange(6).reshape(3, 2),
    }
    run_ranks(_shards_of, Path(), tensors, kind)
    assert names() == ["done-0", "done-1"]


def _other_names(folder):
    join_ranks()
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    tensor = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    with pytest.raises(MismatchError, match="same tensors, but ranks 1 differ from rank 0"):
        Shards(_Gloo(), {"a": tensor} if rank == 0 else {"a": tensor, "b": tensor})
    (folder / f"done-{rank}").touch()
    dist.destroy_process_group()


def test_ranks_with_other_names_are_an_error_on_all_of_them():
    run_ranks(_other_names, Path())
    assert names() == ["done-0", "done-1"]


def _fail_while_streaming(folder, kind):
    class Diverging(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.mul_(float("nan"))

        def on_train_epoch_end(self, trainer, pl_module):
            callback.save_vector(trainer, folder / "asked.tv.safetensors")

    callback = TaskVectorCallback(with_checkpoints=False)
    expected = ValueError if os.environ["LOCAL_RANK"] == "0" else RuntimeError
    with pytest.raises(expected, match="hold NaN or infinity"):
        fit_sharded(folder, kind, callback=callback, callbacks=[Diverging()])
    (folder / f"failed-{os.environ['LOCAL_RANK']}").touch()


@pytest.mark.parametrize("kind", ["fsdp2 sharded", pytest.param("fsdp1 sharded", marks=pytest.mark.slow)])
def test_a_failure_of_rank_zero_while_others_send_reaches_all(kind):
    run_ranks(_fail_while_streaming, Path(), kind)
    assert names("failed-*") == ["failed-0", "failed-1"]
    assert names("*.tv.safetensors") == []


def _diverge(folder, kind):
    class Diverging(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 3:
                with torch.no_grad():
                    for parameter in pl_module.parameters():
                        parameter.mul_(float("nan"))

    warned = pytest.warns(UserWarning, match="training continues: A task vector must be finite|operations failed")
    with warned if os.environ["LOCAL_RANK"] == "0" else contextlib.nullcontext():
        fit_sharded(folder, kind, callbacks=[Diverging()])
    (folder / f"done-{os.environ['LOCAL_RANK']}").touch()


@pytest.mark.parametrize("kind", ["fsdp2 sharded", pytest.param("fsdp1 full", marks=pytest.mark.slow)])
def test_weights_that_become_nan_do_not_stop_training_on_any_rank(kind):
    run_ranks(_diverge, Path(), kind)
    assert names("done-*") == ["done-0", "done-1"]
    assert names("*.tv.safetensors") == ["epoch=0-step=2.tv.safetensors"]


def _full_disk(folder, kind):
    def full(*_):
        raise OSError(28, "No space left on device")

    from tva.checkpoints.stream_writer import LateHeaderFile

    callback = TaskVectorCallback()
    callback.on_vector_saved = lambda *_: setattr(LateHeaderFile, "_store", full)  # from the second vector on
    rank_zero = os.environ["LOCAL_RANK"] == "0"
    with pytest.warns(UserWarning, match="not") if rank_zero else contextlib.nullcontext() as caught:
        fit_sharded(folder, kind, callback=callback)
    if rank_zero:
        messages = [str(warning.message) for warning in caught]
        assert any("step=4.tv.safetensors was not written" in m and "training continues" in m for m in messages)
        assert any("1 operations failed" in m for m in messages)
    (folder / f"done-{os.environ['LOCAL_RANK']}").touch()


@pytest.mark.parametrize("kind", ["fsdp2 sharded", pytest.param("fsdp1 full", marks=pytest.mark.slow)])
def test_a_full_disk_does_not_stop_training_on_any_rank(kind):
    run_ranks(_full_disk, Path(), kind)
    assert names("*.ckpt") == ["epoch=0-step=2.ckpt", "epoch=1-step=4.ckpt"]
    assert names("*.tv.safetensors") == ["epoch=0-step=2.tv.safetensors"]
    assert names(".*") == []
    assert names("done-*") == ["done-0", "done-1"]


def _die(folder):
    class Dying(L.Callback):
        def on_train_batch_end(self, *_):
            if os.environ["LOCAL_RANK"] == "1":
                os._exit(3)

    with pytest.raises(RuntimeError, match="(?i)connection|rank"):
        fit_sharded(folder, "fsdp2 sharded", callback=TaskVectorCallback(every_n_steps=1), callbacks=[Dying()])
    os._exit(4)


def test_when_a_rank_dies_the_others_end_soon():
    ranks = run_ranks(_die, Path(), join=False).processes
    for rank in ranks:
        rank.join(600)  # gloo itself waits for half an hour
    assert [rank.exitcode for rank in ranks] == [4, 3]


def _along_the_way(folder, kind):
    callback = TaskVectorCallback(every_n_steps=1, against="previous", at_train_end=True, with_checkpoints=False)
    fit_sharded(folder, kind, callback=callback)


@pytest.mark.parametrize("kind", ["fsdp2 sharded", pytest.param("fsdp1 sharded", marks=pytest.mark.slow)])
def test_vectors_along_the_way_add_up_under_sharding(kind):
    run_ranks(_along_the_way, Path(), kind)
    steps = [TaskVector.load(file) for file in sorted(Path("trajectory").glob("step=*"))]
    final = TaskVector.load("final.tv.safetensors")
    assert len(steps) == 4
    assert names(".*", folder="trajectory") == []
    for name, delta in final.deltas.items():
        total = sum(step.deltas[name] for step in steps)
        assert torch.allclose(total, delta, atol=1e-6), name
    tuned = open_weights("epoch=1-step=4.ckpt")
    assert final.origin.finetuned == steps[-1].origin.finetuned == fingerprint(tuned).digest


def test_no_rank_holds_more_than_one_tensor_above_its_shards():
    run_ranks(_measure_memory, Path())
    for rank in (0, 1):
        above, largest = map(int, Path(f"memory-{rank}").read_text().split())
        # 24.4 MB: the base's tensor, mapped from its file, and chunks; 32.8 if one were received whole, 41.2 if two
        most = largest * 7 // 4 if rank == 0 else 2**20
        assert above <= most, f"rank {rank}: {above} bytes above its shards, largest tensor {largest}"


class Held(TorchDispatchMode):
    """Counts the bytes of storages that operations make and that still live, and of all that Python and numpy hold.

    Both are counted at each operation, so that neither depends on how fast the other rank is.
    """

    def __init__(self, shards):
        super().__init__()
        self.own = {shard.untyped_storage()._cdata for shard in shards}
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, DTensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.own:
                    self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: (storage, size) for key, (storage, size) in self.live.items() if not storage.expired()}
        held = sum(size for _, size in self.live.values())
        self.peak = max(self.peak, held + tracemalloc.get_traced_memory()[0])
        return made


def _measure_memory(folder):
    """Count what this process holds at each operation while five tensors of 16 MiB are streamed."""
    from tva.callbacks.base_weights import BaseWeights
    from tva.callbacks.lora import LoraView

    from tva.vectors.header import Origin
    from tva.vectors.write import VectorPlan, emit

    join_ranks()
    rank, rows = dist.get_rank(), 2**12
    mesh = init_device_mesh("cpu", (2,))
    state = {f"w{n}": distribute_tensor(torch.full((rows, 2**10), float(n)), mesh, [Shard(0)]) for n in range(5)}
    with torch.no_grad():
        tuned = {name: tensor + 1 for name, tensor in state.items()}
    strategy, base = _Gloo(), BaseWeights(None)
    held = Held([tensor.to_local() for tensor in (*state.values(), *tuned.values())])
    tracemalloc.start()
    with held:
        base.settle(Shards(strategy, state), state, LoraView(nn.Linear(1, 1)), str(folder))
        shards = Shards(strategy, tuned)

        def prepare():
            sources = {name: shards.source(name) for name in tuned}
            plan = VectorPlan(base.weights, base.tree, sources)
            return plan.order, lambda: emit(plan, folder / "v.tv.safetensors", Origin()).norm

        norm = shards.on_rank_zero(prepare)
    assert norm == pytest.approx((5 * rows * 2**10) ** 0.5)
    (folder / f"memory-{rank}").write_text(f"{held.peak} {rows * 2**10 * 4}")
    dist.destroy_process_group()


# --- what is refused, at setup


def _lora(folder):
    from peft import LoraConfig, inject_adapter_in_model

    model = MixedNet()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), model.body)
    with pytest.raises(ValueError, match="LoRA modules cannot be read under OnCpu. Use DDP"):
        fit(model=model, strategy=fsdp1(use_orig_params=True), devices=2, folder=folder)
    (folder / f"done-{os.environ['LOCAL_RANK']}").touch()


def test_lora_under_a_strategy_that_shards_is_refused_on_all_ranks():
    run_ranks(_lora, Path())
    assert names() == ["done-0", "done-1"]


@pytest.mark.parametrize("kind", [XLAStrategy, SingleDeviceXLAStrategy])
def test_a_strategy_that_is_not_supported_is_refused_by_name_at_setup(kind):
    trainer = SimpleNamespace(strategy=kind.__new__(kind), callbacks=[])  # there is no such device here
    with pytest.raises(ValueError, match=f"supports SingleDeviceStrategy.*uses {kind.__name__}"):
        TaskVectorCallback().setup(trainer, None, "fit")
