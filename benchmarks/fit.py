"""Time `tva fit` against a plain PyTorch loop of the paper's recipe, and its best settings against that recipe.

    python benchmarks/fit.py                       # what the framework costs: equal settings, the same batches
    python benchmarks/fit.py --settings best --device cuda --models ViT-B-32-quickgelu ViT-L-14-quickgelu

The recipe: float32, eager, AdamW at 1e-5 with weight decay 0.1 and warm-up, batch 128, gradients clipped at norm 1. In
each repeat both sides train the same model from the same weights on the same batches. They take turns, ``--turn`` steps
each, so that what else happens on the machine hits both; timed are whole steps, reading included, after ``--warmup`` of
them. Told are the medians over repeats with their range, and the median of the paired ratios of images per second.

``--settings equal`` (by default): Lightning's Trainer as `tva fit` makes it, at the recipe's own settings; the weights
of both sides must agree at the end. ``best``: bf16-mixed, TF32, and the model's options compile, channels_last and
fused, with the accuracy on validation data after the same steps, and the share of the chip's peak: FLOPs of forward and
backward of one image by torch.utils.flop_counter, times images per second. The pictures are letters that ship with tva,
at the model's size, decoded once. A model of open_clip without ``--pretrained`` has random weights, so its accuracy
means nothing.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tva.data import ImageTask
from tva.edit.trainer import Trainer
from tva.models import ClipClassifier

RECIPE, FIT = "recipe", "tva fit"
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
    parser.add_argument("--turn", type=int, help="steps of one side before the other's: 1, on a GPU all")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peak_tflops", type=float, help="of the chip in bf16; known for some")
    parser.add_argument("--output", type=Path, help="JSON with every number")
    options = parser.parse_args(argv)
    options.turn = options.turn or (1 if options.device == "cpu" else options.steps)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"{os.cpu_count()} CPU cores"
    print(f"{machine} ({platform.machine()}), {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    found = {name: compare(name, options, machine) for name in options.models}
    if options.output:
        options.output.write_text(json.dumps(found, indent=1))


def compare(name: str, options: argparse.Namespace, machine: str) -> dict[str, Any]:
    """Time both sides, and print what came out."""
    seconds: dict[str, list[float]] = {RECIPE: [], FIT: []}
    accuracy: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(name, options.pretrained or random_weights(name, Path(folder)), options)
        for repeat in range(options.repeats):
            for side, value in bench.train().items():
                seconds[side].append(value)
            if options.settings == "equal":
                bench.check_same()
            elif not repeat:
                accuracy = bench.accuracies()
        flops = flops_per_image(bench.models[RECIPE], bench.image)
    images = options.steps * options.batch_size
    rates = {side: [images / value for value in values] for side, values in seconds.items()}
    ratios = [fit / loop for fit, loop in zip(rates[FIT], rates[RECIPE], strict=True)]
    added = [1e3 * (fit - loop) / options.steps for fit, loop in zip(seconds[FIT], seconds[RECIPE], strict=True)]
    peak = (
        options.peak_tflops * 1e12 if options.peak_tflops else next((v for k, v in PEAK.items() if k in machine), None)
    )
    print(f"{name}, batch {options.batch_size}, {options.steps} steps, {options.repeats} repeats")
    for side, values in rates.items():
        line = f"  {side:8} {statistics.median(values):9.1f} images/s ({min(values):.1f} to {max(values):.1f})"
        line += f", {1e3 * statistics.median(seconds[side]) / options.steps:.1f} ms a step"
        line += f", {flops * statistics.median(values) / 1e12:.3f} TFLOP/s"
        if peak:
            line += f", {flops * statistics.median(values) / peak:.1%} of {peak / 1e12:.0f}"
        if side in accuracy:
            line += f", validation accuracy {accuracy[side]:.4f}"
        print(line)
    print(
        f"  tva fit is {statistics.median(ratios):.3f} x the recipe (paired; {min(ratios):.3f} to {max(ratios):.3f}), "
        f"{statistics.median(added):+.2f} ms a step ({min(added):+.2f} to {max(added):+.2f})",
        flush=True,
    )
    return {
        "images_per_s": rates,
        "ratios": ratios,
        "added_ms_per_step": added,
        "flops_per_image": flops,
        "peak": peak,
        "accuracy": accuracy,
    }


def random_weights(name: str, folder: Path) -> str | None:
    """Write random weights of an open_clip architecture; tva-tiny has its own."""
    if name == "tva-tiny":
        return None
    import open_clip

    torch.manual_seed(0)
    torch.save(open_clip.create_model(name).state_dict(), folder / "random.pt")
    return str(folder / "random.pt")


class Bench:
    """One model on one task, twice: each side trains its own from the same weights."""

    def __init__(self, name: str, pretrained: str | None, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.total = options.warmup + options.steps
        self.best = options.settings == "best"
        fast = {"compile": True, "channels_last": True, "fused": True} if self.best else {}
        self.models = {RECIPE: ClipClassifier(name, pretrained), FIT: ClipClassifier(name, pretrained, **fast)}
        self.data = ImageTask(options.data, batch_size=options.batch_size)
        L.seed_everything(0)
        for model in self.models.values():  # heads and decoded pictures are made once, and no part of what is timed
            self.trainer().validate(model, datamodule=self.data, verbose=False)
        self.base = {key: value.clone() for key, value in self.models[RECIPE].state_dict().items()}
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

    def train(self) -> dict[str, float]:
        """Train both from the base; give the seconds of each one's timed steps."""
        for model in self.models.values():
            model.load_state_dict(self.base)
        turns = Turns(self.loop, self.options, self.sync, self.set_numbers)
        precision = {"precision": "bf16-mixed"} if self.best else {}
        trainer = self.trainer(
            max_steps=self.total, limit_val_batches=0, gradient_clip_val=1.0, callbacks=[turns], **precision
        )
        trainer.fit(self.models[FIT], datamodule=self.data)
        self.set_numbers(fast=False)
        return turns.seconds

    def set_numbers(self, fast: bool) -> None:
        """Let float32 products be TF32, or not; the recipe's never are."""
        fast = fast and self.best
        torch.set_float32_matmul_precision("high" if fast else "highest")
        torch.backends.cudnn.allow_tf32 = fast

    def loop(self) -> Iterator[None]:
        """Train by the plain loop, pausing before each step, when its batch is there."""
        model = self.models[RECIPE]
        encoder, head = model.encoder.to(self.device).train(), model.head.to(self.device)
        parameters = list(encoder.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.1)
        loader, step, epoch = self.data.train_dataloader(), 0, 0
        rate = schedule(self.total)
        while True:
            loader.sampler.set_epoch(epoch)
            for images, labels in loader:
                yield
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
                    yield
                    return
            epoch += 1

    def check_same(self) -> None:
        """Stop unless both sides ended at the same weights."""
        recipe, fit = (self.models[side].cpu().state_dict() for side in (RECIPE, FIT))
        if not all(torch.allclose(recipe[key], fit[key], atol=1e-6) for key in recipe):
            raise SystemExit("The two sides end at different weights, so they did not do the same work.")

    def accuracies(self) -> dict[str, float]:
        """Return the accuracy of both on validation data."""
        name, found = f"val/{self.data.name}/accuracy", {}
        for side, model in self.models.items():
            found[side] = self.trainer().validate(model, datamodule=self.data, verbose=False)[0][name]
        return found


class Turns(L.Callback):
    """Let the plain loop take its turns between the Trainer's steps, and time both.

    Whatever the Trainer does from its first timed step to the end of fitting counts as its own, but for this callback.
    """

    def __init__(
        self,
        loop: Callable[[], Iterator[None]],
        options: argparse.Namespace,
        sync: Callable[[], float],
        set_numbers: Callable[[bool], None],
    ) -> None:
        self.loop, self.options, self.sync, self.set_numbers = loop, options, sync, set_numbers
        self.seconds, self.resumed = {RECIPE: 0.0, FIT: 0.0}, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.steps = self.loop()
        next(self.steps)  # its first batch is there, as the Trainer's

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int) -> None:
        step, warmup, turn = trainer.global_step, self.options.warmup, self.options.turn
        if step >= warmup and (step - warmup) % turn == 0:
            self._count(FIT, step > warmup)
            self._take(min(turn, warmup + self.options.steps - step), timed=True)
        elif step == 0:
            self._take(warmup, timed=False)

    def _take(self, steps: int, timed: bool) -> None:
        self.set_numbers(False)
        self.resumed = self.sync()
        for _ in range(steps):
            next(self.steps)
        self._count(RECIPE, timed)
        self.set_numbers(True)
        self.resumed = self.sync()

    def _count(self, side: str, timed: bool) -> None:
        if timed:
            self.seconds[side] += self.sync() - self.resumed

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._count(FIT, timed=True)


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
