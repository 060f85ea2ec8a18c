"""tva's own models under FSDP2: two gloo processes reach the weights that DDP reaches."""

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from small_models import names, quiet_trainer, run_ranks
from small_text import write_model, write_running_text
from torch import nn
from tva.callbacks import TaskVectorCallback

from tva import TaskVector, open_weights
from tva.data import ImageTask, LanguageTask
from tva.models import CausalLM, ClipClassifier
from tva.models.sharding import repeated_blocks

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*`_get_pg_default_device` will be deprecated"),
    pytest.mark.filterwarnings("ignore:Using `DistributedSampler`"),
    pytest.mark.filterwarnings("ignore:Multiple backends are registered"),
]


def clip(**options):
    task = ImageTask("builtin:digits", batch_size=16, limit_train=64, limit_val=16)
    return ClipClassifier(learning_rate=1e-3, warmup_steps=0, **options), task


def causal(folder):
    task = LanguageTask(str(folder / "prose-{split}.txt"), block_length=16, batch_size=4, val_size=4, limit_train=32)
    return CausalLM(str(folder / "model"), learning_rate=1e-3, warmup_steps=0), task


def fit(folder, strategy, make, *args, **options):
    L.seed_everything(0)
    model, task = make(*args, **options)
    if strategy == "fsdp2":
        strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False, process_group_backend="gloo")
    callbacks = [TaskVectorCallback(dirpath=folder), ModelCheckpoint(folder, filename="last")]
    trainer = quiet_trainer(*callbacks, max_steps=2, devices=2, strategy=strategy, gradient_clip_val=1.0)
    trainer.fit(model, datamodule=task)
    trainer.validate(model, datamodule=task, verbose=False)


@pytest.mark.slow
@pytest.mark.parametrize("make", [clip, causal])
def test_fsdp2_trains_a_model_as_ddp_does(tmp_path, make):
    if make is causal:
        write_model(Path("model"), "causal")  # its embedding and its output are tied
        write_running_text()
    for strategy in ("ddp", "fsdp2"):
        run_ranks(fit, Path(strategy), strategy, make, *([tmp_path] if make is causal else []))
        assert names("last*", folder=Path(strategy)) == ["last.ckpt", "last.tv.safetensors"]
    ddp, fsdp2 = (open_weights(f"{strategy}/last.ckpt") for strategy in ("ddp", "fsdp2"))
    assert set(ddp) == set(fsdp2)
    moved = TaskVector.load("ddp/last.tv.safetensors")
    found = TaskVector.load("fsdp2/last.tv.safetensors")
    assert found.origin.base == moved.origin.base
    assert float(moved.cosine(found)) > 0.999
    for name in moved.deltas:
        torch.testing.assert_close(found.deltas[name], moved.deltas[name], rtol=0, atol=2e-4)


def _refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        fit(folder, "fsdp2", clip, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("options", "message"), [({"tangent": True}, "tangent"), ({"head": "learned"}, "learned")])
def test_what_cannot_be_sharded_is_refused_by_name(options, message):
    run_ranks(_refused, Path(), options, f"with .*{message}.* cannot be sharded. Use strategy: ddp")


def test_blocks_are_those_that_repeat():
    model = ClipClassifier()
    assert len(repeated_blocks(model.encoder)) == len(model.encoder.transformer.resblocks)
    assert repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == []
