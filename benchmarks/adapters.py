"""What merging LoRA adapters costs: as an adapter, in their core space, and as a dense model.

    python benchmarks/adapters.py --size 1024 --rank 16

Writes a base of square matrices and four adapters, of random numbers, to a temporary folder, and composes them.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch

from tva import save_weights
from tva.compose import compose

RECIPES = ("a + b + c + d", "ties(a, b, c, d)", "tsv(a, b, c, d)", "iso_c(a, b, c, d)")


def write(folder, size, layers, rank):
    save_weights({f"layers.{n}.q.weight": torch.randn(size, size) for n in range(layers)}, folder / "base.safetensors")
    for name in "abcd":
        tensors = {}
        for layer in range(layers):
            start = f"base_model.model.layers.{layer}.q"
            tensors[f"{start}.lora_A.weight"] = torch.randn(rank, size)
            tensors[f"{start}.lora_B.weight"] = torch.randn(size, rank) / size
        save_weights(tensors, folder / name / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none"}
        (folder / name / "adapter_config.json").write_text(json.dumps(config))


def measure(function):
    start = time.process_time()
    function()
    return time.process_time() - start


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, options.size, options.layers, options.rank)
        base, vectors = folder / "base.safetensors", {key: folder / key for key in "abcd"}
        compose(base, vectors, "a", folder / "first.safetensors")  # compiles the kernels
        for recipe in RECIPES:
            dense = measure(lambda recipe=recipe: compose(base, vectors, recipe, folder / "dense.safetensors"))
            adapter = measure(lambda recipe=recipe: compose(base, vectors, recipe, folder / "new", write_as="lora"))
            shutil.rmtree(folder / "new")
            found[recipe] = (dense, adapter)
            print(f"{recipe}: {dense:.2f} s of CPU as a model, {adapter:.2f} s as an adapter")
    return found


if __name__ == "__main__":
    main()
