"""Time `tva fit` against a plain PyTorch loop of the paper's recipe, and its best settings against that recipe.

    python benchmarks/fit.py                       # what the framework costs: equal settings, the same batches
    python benchmarks/fit.py --settings best --device cuda --models ViT-B-32-quickgelu ViT-L-14-quickgelu

The recipe: float32, eager, AdamW at 1e-5 with weight decay 0.1 and warm-up, batch 128, gradients clipped at norm 1. In
each repeat both sides train the same model from the same weights on the same batches, in turn, the other first every
second time; timed are whole steps, reading included, after ``--warmup`` of them. Told are the medians over repeats with
their range, and the median of the paired ratios of images per second.

``--settings equal`` (by default): Lightning's Trainer as `tva fit` makes it, at the recipe's own settings; the weights
of both sides must agree at the end. ``best``: bf16-mixed, TF32, torch.compile, channels_last and fused AdamW, with the
accuracy on validation data after the same steps, and the share of the chip's peak: FLOPs of forward and backward of one
image by torch.utils.flop_counter, times images per second. The pictures are letters that ship with tva, at the model's
size, decoded once. A model of open_clip without ``--pretrained`` has random weights, so its accuracy means nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tva.data import ImageTask
from tva.models import ClipClassifier
from tva.trainer import Trainer

PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}  # dense bf16, by makers


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", choices=["equal", "best"], default="equal")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--models", nargs="+", default=["tva-tiny"])
    parser.add_argument("--pretrained", help="open_clip's tag or a file; without it weights are random")
    parser.add_argument("--data", default="builtin:letters", help="what ImageTask takes")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40, help="timed steps of each side in a repeat")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peak_tflops", type=float, help="of the chip in bf16; known for some")
    parser.add_argument("--output", type=Path, help="JSON with every number")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"{os.cpu_count()} CPU cores"
    print(f"{machine} ({platform.machine()}), {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    found = {name: compare(name, options, machine) for name in options.models}
    if options.output:
        options.output.write_text(json.dumps(found, indent=1))


def compare(name: str, options: argparse.Namespace, machine: str) -> dict[str, Any]:
    """Time both sides in turn, and print what came out."""
    with tempfile.TemporaryDirectory() as folder:
        pretrained = options.pretrained or random_weights(name, Path(folder))
        bench = Bench(name, pretrained, options)
        sides: dict[str, Callable[[], float]] = {"recipe": bench.loop, "tva fit": bench.fit}
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        accuracy: dict[str, float] = {}
        for repeat in range(options.repeats):
            ends = {}
            for side in sides if repeat % 2 else reversed(sides):
                seconds[side].append(sides[side]())
                ends[side] = {key: value.detach().cpu().clone() for key, value in bench.model.state_dict().items()}
                if options.settings == "best" and not repeat:
                    accuracy[side] = bench.accuracy()
            if options.settings == "equal":
                same = all(
                    torch.allclose(ends["recipe"][key], ends["tva fit"][key], atol=1e-6) for key in ends["recipe"]
                )
                if not same:
                    raise SystemExit("The two sides end at different weights, so they did not do the same work.")
        flops = flops_per_image(bench.model, bench.image)
    images = options.steps * options.batch_size
    rates = {side: [images / value for value in values] for side, values in seconds.items()}
    ratios = [fit / loop for fit, loop in zip(rates["tva fit"], rates["recipe"], strict=True)]
    peak = (
        options.peak_tflops * 1e12 if options.peak_tflops else next((v for k, v in PEAK.items() if k in machine), None)
    )
    print(f"{name}, batch {options.batch_size}, {options.steps} steps, {options.repeats} repeats")
    for side, values in rates.items():
        line = f"  {side:8} {statistics.median(values):9.1f} images/s ({min(values):.1f} to {max(values):.1f})"
        line += f", {flops * statistics.median(values) / 1e12:.3f} TFLOP/s"
        if peak:
            line += f", {flops * statistics.median(values) / peak:.1%} of {peak / 1e12:.0f}"
        if side in accuracy:
            line += f", validation accuracy {accuracy[side]:.4f}"
        print(line)
    print(
        f"  tva fit is {statistics.median(ratios):.3f} x the recipe (paired; {min(ratios):.3f} to {max(ratios):.3f})",
        flush=True,
    )
    return {"images_per_s": rates, "ratios": ratios, "flops_per_image": flops, "peak": peak, "accuracy": accuracy}


def random_weights(name: str, folder: Path) -> str | None:
    """Write random weights of an open_clip architecture; tva-tiny has its own."""
    if name == "tva-tiny":
        return None
    import open_clip

    torch.manual_seed(0)
    torch.save(open_clip.create_model(name).state_dict(), folder / "random.pt")
    return str(folder / "random.pt")


class Bench:
    """One model on one task, trained by either side from the same weights."""

    def __init__(self, name: str, pretrained: str | None, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.total = options.warmup + options.steps
        self.model = ClipClassifier(name, pretrained)
        self.data = ImageTask(options.data, batch_size=options.batch_size)
        L.seed_everything(0)
        trainer = self.trainer()  # the head and the decoded pictures are made once, and no part of what is timed
        trainer.validate(self.model, datamodule=self.data, verbose=False)
        self.base = {key: value.clone() for key, value in self.model.state_dict().items()}
        for images, _ in self.data.train_dataloader():
            self.image = images[:1]

    def trainer(self, **changes: Any) -> Trainer:
        return Trainer(
            accelerator="gpu" if self.device.type == "cuda" else "cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **changes,
        )

    def sync(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(self, fast: bool) -> None:
        """Put the base back, and the numbers' format as a side wants it."""
        self.model.load_state_dict(self.base)
        torch.set_float32_matmul_precision("high" if fast else "highest")
        torch.backends.cudnn.allow_tf32 = fast

    def loop(self) -> float:
        """Train by the plain loop; give the seconds of the timed steps."""
        self.start(fast=False)
        encoder, head = self.model.encoder.to(self.device).train(), self.model.head.to(self.device)
        parameters = list(encoder.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.1)
        loader, step, epoch, started = self.data.train_dataloader(), 0, 0, 0.0
        rate = schedule(self.total)
        while step < self.total:
            loader.sampler.set_epoch(epoch)
            for images, labels in loader:
                if step == self.options.warmup:
                    started = self.sync()
                for group in optimizer.param_groups:
                    group["lr"] = 1e-5 * rate(step)
                images, labels = (value.to(self.device, non_blocking=True) for value in (images, labels))
                optimizer.zero_grad()
                logits = F.normalize(encoder(images), dim=-1) @ head.T  # (batch, classes)
                F.cross_entropy(logits, labels).backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                step += 1
                if step == self.total:
                    break
            epoch += 1
        return self.sync() - started

    def fit(self) -> float:
        """Train by Lightning's Trainer as `tva fit` makes it; give the seconds of the timed steps."""
        best = self.options.settings == "best"
        self.start(fast=best)
        clock = Clock(self.options.warmup, self.sync)
        model = self.model
        changes: dict[str, Any] = {}
        if best:
            model.to(memory_format=torch.channels_last)
            model.encoder.compile()
            changes, clock.fused = {"precision": "bf16-mixed"}, True
        trainer = self.trainer(
            max_steps=self.total, limit_val_batches=0, gradient_clip_val=1.0, callbacks=[clock], **changes
        )
        trainer.fit(model, datamodule=self.data)
        model.encoder._compiled_call_impl = None  # eager again
        return clock.seconds

    def accuracy(self) -> float:
        """Accuracy on validation data of the model as it is."""
        trainer = self.trainer()
        return trainer.validate(self.model, datamodule=self.data, verbose=False)[0][f"val/{self.data.name}/accuracy"]


class Clock(L.Callback):
    """Time from the first timed step's batch to the end of the last, reading of batches included."""

    def __init__(self, warmup: int, sync: Callable[[], float]) -> None:
        self.warmup, self.sync, self.seconds, self.started, self.fused = warmup, sync, 0.0, 0.0, False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.fused:
            for group in trainer.optimizers[0].param_groups:
                group["fused"] = True

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int) -> None:
        if trainer.global_step == self.warmup and not self.started:
            self.started = self.sync()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds = self.sync() - self.started


def schedule(total: int) -> Callable[[int], float]:
    """Warm-up over 200 steps, or all if there are fewer, then cosine decay, as ClipClassifier has it."""
    import math

    warmup = min(200, total)

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return scale


def flops_per_image(model: ClipClassifier, image: torch.Tensor) -> float:
    """Count forward and backward of one image; attention by its plain formula, which the counter knows everywhere."""
    encoder = model.encoder.cpu().float().train()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        encoder(image.cpu()).sum().backward()
    encoder.zero_grad()
    return float(counter.get_total_flops())


if __name__ == "__main__":
    main()
