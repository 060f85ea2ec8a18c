"""Tiny Lightning classes that configs in the tests name by their path."""

import contextlib
import itertools
import os
import socket
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tva.callbacks import TaskVectorCallback

from tva import TaskVector, fingerprint, open_weights


class Blobs(L.LightningDataModule):
    """Two Gaussian blobs, one a class, in a direction that the seed decides; keeps its arguments as hparams."""

    def __init__(self, seed: int = 0, num_examples: int = 60) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.name = f"blobs{seed}"

    def _loader(self, part: int) -> DataLoader:
        generator = torch.Generator().manual_seed(1000 * self.hparams.seed + part)
        direction = torch.randn(4, generator=torch.Generator().manual_seed(self.hparams.seed + 9))
        labels = torch.arange(self.hparams.num_examples) % 2
        inputs = torch.randn(len(labels), 4, generator=generator) + 2 * (2 * labels[:, None] - 1) * direction
        return DataLoader(TensorDataset(inputs, labels), batch_size=20)

    def train_dataloader(self):
        return self._loader(0)

    def val_dataloader(self):
        return self._loader(1)

    def test_dataloader(self):
        return self._loader(2)


class LinearNet(L.LightningModule):
    """A LightningModule as people have them: it knows nothing of tva, logs under its own names, keeps hparams."""

    def __init__(self, width: int = 8, learning_rate: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        generator = torch.Generator().manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        return nn.functional.cross_entropy(self(inputs), labels)

    def validation_step(self, batch, batch_idx):
        inputs, labels = batch
        self.log("val_accuracy", (self(inputs).argmax(-1) == labels).float().mean())

    def test_step(self, batch, batch_idx):
        inputs, labels = batch
        self.log("test_accuracy", (self(inputs).argmax(-1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)


class LinearizedNet(LinearNet):
    """Any LightningModule of which a part is linearized."""

    def __init__(self, tangent: bool = True, shift: float = 0.0) -> None:
        from tva.models.tangent import linearize

        super().__init__()
        self.save_hyperparameters()
        if tangent:
            linearize(self.net)
        with torch.no_grad():
            self.net[0].bias.add_(shift)


class ControlCallback(L.Callback):
    """A callback that holds a data module of its own, as a control evaluation does."""

    seen: dict[str, int] = {}  # noqa: RUF012 (read by the test after the run)

    def __init__(self, control: L.LightningDataModule) -> None:
        self.control = control

    def on_fit_start(self, trainer, pl_module):
        self.seen.update(control=self.control.hparams.seed, data=trainer.datamodule.hparams.seed)


class MixedNet(L.LightningModule):
    """A network with all kinds of tensors: trained, frozen, BatchNorm statistics, an integer buffer."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        (inputs,) = batch
        loss = self.body(inputs).pow(2).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)

    def train_dataloader(self):
        torch.manual_seed(1)
        return DataLoader(TensorDataset(torch.randn(16, 3)), batch_size=4)


def quiet_trainer(*callbacks, **options):
    """Make a Trainer of the CPU that prints nothing, and writes checkpoints only where a callback does."""
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet["enable_checkpointing"] = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return L.Trainer(callbacks=list(callbacks), **quiet | options)


def fit(callback=None, *, folder=".", epochs=2, model=None, ckpt_path=None, callbacks=(), checkpoint=None, **options):
    """Fit with a TaskVectorCallback, on the CPU and quietly; a checkpoint an epoch."""
    checkpoint = checkpoint or ModelCheckpoint(dirpath=folder, save_top_k=-1)
    options = {"max_epochs": epochs, "devices": 1, "default_root_dir": folder} | options
    trainer = quiet_trainer(callback or TaskVectorCallback(), *callbacks, checkpoint, **options)
    model = model or MixedNet()
    trainer.fit(model, ckpt_path=ckpt_path)
    return trainer, model


def names(pattern="*", folder="."):
    """Names of the files in a folder."""
    return sorted(file.name for file in Path(folder).glob(pattern))


def assert_vector_is_checkpoint_minus_base(name, folder="."):
    """Compare a vector, bit for bit, with the one taken by hand from the checkpoint."""
    folder = Path(folder)
    (base_file,) = folder.glob("base-*.safetensors")
    base, tuned = open_weights(base_file), open_weights(folder / f"{name}.ckpt")
    vector = TaskVector.load(folder / f"{name}.tv.safetensors")
    for key, delta in {**vector.deltas, **vector.buffers}.items():
        assert torch.equal(delta, tuned[key] - base[key]), key
    assert vector.origin.base.digest == fingerprint(base).digest
    assert vector.origin.finetuned == fingerprint(tuned).digest
    return vector


_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 4  # each has ports of its own
PORTS = itertools.count(20_000 + 2500 * _worker + 31 * os.getpid() % 2000)  # below those the system gives to sockets


def free_port():
    """Return a port that nobody has; each is given once, and the ranks' own connections cannot take it meanwhile."""
    for port in PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def run_ranks(function, *args, join=True):
    """Run ``function(*args)`` on two gloo ranks that Lightning believes were launched from outside."""
    return mp.start_processes(_rank, (free_port(), function, args), nprocs=2, join=join, start_method="fork")


def _rank(rank, port, function, args):
    os.environ.update(
        LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    function(*args)


class ShardedNet(MixedNet):
    """Sharded by FSDP2 over the ranks; rows that do not divide evenly, tied weights."""

    def __init__(self, width: int = 5) -> None:
        super().__init__(width)
        self.tied = nn.Linear(3, width, bias=False)
        self.tied.weight = self.body[0].weight

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.body[2], mesh=mesh)
            fully_shard(self, mesh=mesh)
            register_fsdp_forward_method(self, "training_step")


class Gloo:
    """What the callback asks a strategy for, with two ranks of a process group that a test has made."""

    is_global_zero = property(lambda self: dist.get_rank() == 0)
    world_size = property(lambda self: dist.get_world_size())
    root_device = property(lambda self: torch.device("cpu"))

    def broadcast(self, obj, src=0):
        objects = [obj]
        dist.broadcast_object_list(objects, src)
        return objects[0]


def fsdp1(**options):
    """FSDP version 1 on the CPU, which Lightning itself refuses to start."""
    from lightning.pytorch.strategies import FSDPStrategy
    from torch.distributed.fsdp import FullyShardedDataParallel

    class OnCpu(FSDPStrategy):
        def _setup_model(self, model):
            return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)

    return OnCpu(**options)
