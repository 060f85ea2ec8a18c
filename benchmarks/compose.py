"""Time `tva compose` against mergekit and against the disk, on synthetic Llama-shaped checkpoints.

    python benchmarks/compose.py --folder /somewhere/with/space [--layers 12] [--repeats 3] [--mergekit PYTHON]

``--mergekit`` names the Python of an environment in which mergekit 0.1.5 is installed (``python -m venv E && E/bin/pip
install mergekit==0.1.5``). Whole processes are timed, each from page cache; every job runs ``--repeats`` times, tools
in turn. Before each, what others have written goes to the disk and out of the page cache, and the inputs are read into
it. Peak anonymous memory is polled from /proc every 10 ms. ``cat`` is the time that reading the same inputs and writing
as many bytes as the output takes: the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml

from tva import fingerprint, open_weights, save_weights
from tva.compose.apply import compose

# As the command does it: without collecting garbage, and without taking down what was loaded.
IMPORTS = "import gc, os; gc.disable(); import tva.compose, tva.cli.commands.compose, jsonargparse; os._exit(0)"
TOKENS, WIDTH, HIDDEN = 32_000, 1024, 2816
JOBS = {
    "sum": ("0.25 * (a + b + c + d)", {"merge_method": "task_arithmetic"}, {"weight": 0.25}),
    "ties": (
        '0.5 * ties(a, b, c, d, density=0.2, trim="tensor", undecided="positive")',
        {"merge_method": "ties", "parameters": {"lambda": 0.5}},
        {"weight": 1.0, "density": 0.2},
    ),
    "dare": (
        "0.25 * (dare(a, drop=0.5) + dare(b, drop=0.5) + dare(c, drop=0.5) + dare(d, drop=0.5))",
        {"merge_method": "dare_linear", "parameters": {"rescale": True}},
        {"weight": 0.25, "density": 0.5},
    ),
}


def make_checkpoint(folder: Path, layers: int, seed: int, base: dict[str, torch.Tensor] | None) -> dict:
    """Write a bfloat16 Llama with random weights, or one a small step from ``base``."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (TOKENS, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{part}_proj.weight": (WIDTH, WIDTH) for part in "qkvo"}
        shapes |= {f"{prefix}.mlp.{part}_proj.weight": (HIDDEN, WIDTH) for part in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (WIDTH, HIDDEN)
        shapes |= {f"{prefix}.{part}_layernorm.weight": (WIDTH,) for part in ("input", "post_attention")}
    shapes["lm_head.weight"] = (TOKENS, WIDTH)
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        state[name] = (noise * 0.02 if base is None else base[name].float() + noise * 0.002).bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(state, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "vocab_size": TOKENS,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return state


def settle(folder: Path, inputs: list[Path]) -> None:
    """Begin as every run does: nothing waits to be written, and the page cache holds the inputs and no outputs."""
    os.sync()
    for file in [*folder.glob("*/*.safetensors"), *folder.glob("*.safetensors"), folder / "copy"]:
        if file not in inputs and file.exists():
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    subprocess.run(["cat", *inputs], stdout=subprocess.DEVNULL, check=True)


def measure(command: list[str]) -> tuple[float, float]:
    """Run a command; give its wall time in seconds and peak anonymous memory in GB."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, int(status.split("RssAnon:")[1].split()[0]))
        except (OSError, IndexError):
            pass
        time.sleep(0.01)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{process.stderr.read().decode()[-2000:]}")
    return time.monotonic() - started, peak * 1024 / 1e9


def agreement(folder: Path, theirs: list[str] | None) -> str:
    """Compare both tools' outputs: the share of elements that are equal, and the largest difference."""
    if not theirs:
        return ""
    ours, other = open_weights(folder / "ours.safetensors"), open_weights(folder / "theirs")
    equal = total = largest = 0
    for name in other:
        left, right = ours[name].float(), other[name].float()
        equal += int((left == right).sum())
        total += left.numel()
        largest = max(largest, float((left - right).abs().max()))
    return f"; equal to mergekit's in {equal / total:.4%} of elements, largest difference {largest:.1e}"


def time_tiny(folder: Path) -> None:
    """Time models of many tiny tensors."""
    for count in (4_000, 16_000):
        for seed, name in enumerate(("base", "a")):
            generator = torch.Generator().manual_seed(seed)
            state = {f"h.{i}.w": torch.randn(64, generator=generator) for i in range(count)}
            save_weights(state, folder / f"tiny-{name}.safetensors")
        started = time.monotonic()
        vectors = {"a": str(folder / "tiny-a.safetensors")}
        compose(str(folder / "tiny-base.safetensors"), vectors, "0.5 * a", str(folder / "tiny-out.safetensors"))
        print(f"tiny  {count:,} tensors of 64 elements: {(time.monotonic() - started) / count * 1e3:.2f} s per 1,000")


def main() -> None:
    """Make the checkpoints if need be, run every job, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=26, help="26 make 0.4 B parameters")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--mergekit", help="Python of an environment with mergekit 0.1.5")
    parser.add_argument("--jobs", nargs="+", default=[*JOBS, "tiny"], choices=[*JOBS, "tiny"])
    options = parser.parse_args()
    names, base = ["base", "a", "b", "c", "d"], None
    for seed, name in enumerate(names):
        if not (options.folder / name / "model.safetensors").exists():
            if base is None and name != "base":
                base = dict(open_weights(options.folder / "base"))
            made = make_checkpoint(options.folder / name, options.layers, seed, base)
            base = made if name == "base" else base
    files = [options.folder / name / "model.safetensors" for name in names]
    size = files[0].stat().st_size
    print(f"{platform.machine()}, {platform.processor()}, torch {torch.__version__}, {size / 1e9:.2f} GB a checkpoint")
    copy = (
        f"cat {' '.join(map(str, files))} > /dev/null; cp {files[0]} {options.folder}/copy; sync {options.folder}/copy"
    )
    floors = []
    for _ in range(options.repeats):
        settle(options.folder, files)
        floors.append(measure(["sh", "-c", copy])[0])
    floor = statistics.median(floors)
    imports = statistics.median(measure([sys.executable, "-c", IMPORTS])[0] for _ in range(options.repeats))
    spread = f"({min(floors):.2f}–{max(floors):.2f})"
    print(f"cat of the inputs and a copy of the output: {floor:.2f} s {spread}; interpreter, imports: {imports:.2f} s")
    for job in options.jobs:
        if job == "tiny":
            time_tiny(options.folder)
            continue
        recipe, method, parameters = JOBS[job]
        ours = [sys.executable, "-m", "tva", "compose", "--base", str(options.folder / "base"), "--recipe", recipe]
        ours += [word for name in names[1:] for word in (f"--vectors.{name}", str(options.folder / name))]
        ours += ["--output", str(options.folder / "ours.safetensors")]
        theirs = None
        if options.mergekit:
            models = [{"model": str(options.folder / name), "parameters": parameters} for name in names[1:]]
            config = {**method, "base_model": str(options.folder / "base"), "models": models, "dtype": "float32"}
            path = options.folder / f"{job}.yaml"
            path.write_text(yaml.safe_dump({**config, "out_dtype": "bfloat16"}))
            tool = Path(options.mergekit).parent / "mergekit-yaml"
            theirs = [str(tool), str(path), str(options.folder / "theirs"), "--random-seed", "0"]
        results: dict[str, list[tuple[float, float]]] = {}
        digests = set()
        for _ in range(options.repeats):
            for name, command in (("tva", ours), ("mergekit", theirs)):
                if command:
                    settle(options.folder, files)
                    results.setdefault(name, []).append(measure(command))
            digests.add(fingerprint(open_weights(options.folder / "ours.safetensors")).digest)
        print(f"{job:5} the same bytes in every run: {len(digests) == 1}" + agreement(options.folder, theirs))
        for name, runs in results.items():
            times, peaks = [t for t, _ in runs], [p for _, p in runs]
            line = f"{job:5} {name:9} {statistics.median(times):7.2f} s ({min(times):.2f}–{max(times):.2f})"
            line += f", peak {max(peaks):.2f} GB"
            if name == "tva":
                line += f", without imports {(statistics.median(times) - imports) / floor:.1f} × cat"
            else:
                line += f", {statistics.median(times) / statistics.median(t for t, _ in results['tva']):.1f} × tva"
            print(line, flush=True)


if __name__ == "__main__":
    main()
