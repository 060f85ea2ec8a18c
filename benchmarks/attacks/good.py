"""Sound files of every kind that tva reads, from which the hostile ones are made, and a model to edit."""

import collections
import contextlib
import enum
import io
import json
import os
from pathlib import Path

import lightning as L
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tva import save_weights
from tva.cli.main import main as tva
from tva.edit.trainer import edit_model

ENCODINGS = ("int8", "sign", "top_k(density=0.1)", "low_rank(rank=4)", "bf16")


class Stage(enum.Enum):
    """Stands for DeepSpeed's own enumeration, which its files hold."""

    two = 2
    three = 3


class Blobs(L.LightningDataModule):
    """Two Gaussian blobs, one a class."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.name, self.seed = f"blobs{seed}", seed

    def _loader(self, part: int) -> DataLoader:
        generator = torch.Generator().manual_seed(10 * self.seed + part)
        labels = torch.arange(60) % 2
        inputs = torch.randn(60, 16, generator=generator) + (2.0 * labels[:, None] - 1) * (self.seed + 1)
        return DataLoader(TensorDataset(inputs, labels), batch_size=20)

    def train_dataloader(self) -> DataLoader:
        return self._loader(0)

    def val_dataloader(self) -> DataLoader:
        return self._loader(1)

    def test_dataloader(self) -> DataLoader:
        return self._loader(2)


class Net(L.LightningModule):
    """A network of two layers, of which the first can be made large."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.encoder = nn.Linear(16, width)
        self.head = nn.Linear(width, 2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / width**0.5)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(inputs).relu())

    def training_step(self, batch: tuple[torch.Tensor, ...], batch_idx: int) -> torch.Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(self(inputs), labels)

    def validation_step(self, batch: tuple[torch.Tensor, ...], batch_idx: int) -> None:
        inputs, labels = batch
        self.log("val/accuracy", (self(inputs).argmax(-1) == labels).float().mean())

    def test_step(self, batch: tuple[torch.Tensor, ...], batch_idx: int) -> None:
        inputs, labels = batch
        self.log("test/accuracy", (self(inputs).argmax(-1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def moved(weights: dict[str, torch.Tensor], by: float, seed: int) -> dict[str, torch.Tensor]:
    """Move all floating tensors by noise."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + by * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in weights.items()
    }


def make_good(folder: Path) -> None:
    """Write all sound files into an empty folder, and read each once."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    base: dict[str, torch.Tensor] = {}
    for layer in range(3):
        base[f"encoder.layers.{layer}.weight"] = torch.randn(24, 16, generator=generator)
        base[f"encoder.layers.{layer}.bias"] = torch.randn(24, generator=generator)
    base["bn.running_mean"] = torch.randn(8, generator=generator)
    base["bn.running_var"] = torch.rand(8, generator=generator) + 0.5
    base["bn.num_batches_tracked"] = torch.tensor(3)
    base["head.weight"] = torch.randn(60, 60, generator=generator)
    tuned = moved(base, 0.01, 1)
    with contextlib.nullcontext():
        os.chdir(folder)
        save_weights(base, "base.safetensors", {"format": "pt"})
        save_weights(tuned, "tuned.safetensors", {"format": "pt"})
        save_weights(moved(base, 0.02, 2), "tuned2.safetensors")
        torch.save(tuned, "tuned.pt")
        torch.save(tuned, "legacy.pt", _use_new_zipfile_serialization=False)
        lightning = {"epoch": 3, "global_step": 7, "pytorch-lightning_version": "2.6.6"}
        torch.save({"state_dict": tuned, **lightning, "hyper_parameters": {"lr": 0.1}}, "tuned.ckpt")
        dcp.save({"state_dict": tuned}, checkpoint_id="dcp", no_dist=True)
        for stage in Stage:
            _deepspeed(Path(f"zero{stage.value}"), stage, tuned)
        _adapter(Path("lora"), generator)
        with contextlib.redirect_stdout(io.StringIO()):
            _by_commands()


def _deepspeed(folder: Path, stage: Stage, weights: dict[str, torch.Tensor], ranks: int = 2) -> None:
    """Write what DeepSpeed's ZeRO does: a flat part of all parameters a rank, and the buffers whole."""
    inside = folder / "global_step3"
    inside.mkdir(parents=True)
    (folder / "latest").write_text("global_step3")
    parameters = {name: value for name, value in weights.items() if name.startswith(("encoder", "head"))}
    buffers = {name: value for name, value in weights.items() if name not in parameters}

    def part(flat: torch.Tensor, rank: int, multiple: int) -> torch.Tensor:
        return torch.cat([flat, torch.zeros(-len(flat) % multiple)]).chunk(ranks)[rank]

    for rank in range(ranks):
        if stage is Stage.three:
            groups = {"fp32_flat_groups": [torch.cat([part(p.reshape(-1), rank, ranks) for p in parameters.values()])]}
            module = {name: torch.empty(0) for name in parameters}
        else:
            flat = torch.cat([p.reshape(-1) for p in parameters.values()])
            groups = {"single_partition_of_fp32_groups": [part(flat, rank, 2 * ranks)]}
            module = {name: value.half() for name, value in parameters.items()}
        count = ranks if stage is Stage.three else [ranks]
        optimizer = {"optimizer_state_dict": {"zero_stage": stage, "partition_count": count, **groups}}
        torch.save(optimizer, inside / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        shapes = collections.OrderedDict((name, value.shape) for name, value in parameters.items())
        states = {
            "module": {**module, **buffers},
            "buffer_names": list(buffers),
            "param_shapes": [shapes],
            "shared_params": {},
            "frozen_param_shapes": None,
            "frozen_param_fragments": None,
        }
        start = f"zero_pp_rank_{rank}_" if stage is Stage.three else ""
        torch.save(states, inside / f"{start}mp_rank_00_model_states.pt")


def _adapter(folder: Path, generator: torch.Generator) -> None:
    folder.mkdir()
    tensors = {}
    for layer in range(3):
        name = f"base_model.model.encoder.layers.{layer}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, 16, generator=generator) / 10
        tensors[f"{name}.lora_B.weight"] = torch.randn(24, 4, generator=generator) / 10
    save_weights(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["0", "1", "2"], "bias": "none"}
    config |= {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "fan_in_fan_out": False}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": True}))


def _by_commands() -> None:
    """Write what tva itself writes, and read what others write."""
    base = ["--base", "base.safetensors"]
    for name, tuned in (("a", "tuned.safetensors"), ("b", "tuned2.safetensors")):
        tva(["extract", *base, "--finetuned", tuned, "--output", f"{name}.tv.safetensors"])
    for encoding in ENCODINGS:
        output = f"{encoding.split('(')[0]}.tv.safetensors"
        tva(["compress", "a.tv.safetensors", "--encoding", encoding, "--output", output])
    compose = ["compose", *base, "--vectors.a", "a.tv.safetensors", "--recipe", "0.4*a"]
    tva([*compose, "--output", "edited.safetensors", "--keep_undo"])
    tva([*compose, "--output", "shards", "--max_shard_size", "12kB"])
    Path("shards/config.json").write_text('{"architectures": ["Net"], "torch_dtype": "float32"}')
    for other in ("tuned.pt", "legacy.pt", "tuned.ckpt", "dcp", "zero2", "zero3", "lora", "shards"):
        tva(["compose", *base, "--vectors.x", other, "--recipe", "x", "--output", "read.safetensors"])
    tva(["compose", *base, "--vectors.a", "a.tv.safetensors", "--recipe", "ties(a)", "--output", "read.safetensors"])
    tva(["verify", "edited.safetensors"])
    tva(["vectors", "ls", "."])
    tva(["compare", "a.tv.safetensors", "b.tv.safetensors"])
    Path("read.safetensors").unlink()
    model = Net()
    save_weights(moved(model.state_dict(), 0.3, 3), "net.safetensors")
    save_weights(model.state_dict(), "net_base.safetensors")
    tva(["extract", "--base", "net_base.safetensors", "--finetuned", "net.safetensors", "--output", "n.tv.safetensors"])
    options = {"recipe": "n", "targets": {"one": Blobs(1)}, "controls": {}, "maximize": "one/accuracy"}
    edit_model(Net(), output="run", vectors={"n": "n.tv.safetensors"}, **options)
