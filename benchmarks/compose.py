"""Time `tva compose` against mergekit and against the disk, on synthetic Llama-shaped checkpoints.

    python -m benchmarks run compose --seeds 0 --folder /somewhere/with/space [--layers 26] [--repeats 3]
        [--mergekit PYTHON] [--jobs sum,ties,dare,tiny]

``--mergekit`` names the Python of an environment in which mergekit 0.1.5 is installed (``python -m venv E && E/bin/pip
install mergekit==0.1.5``). 26 layers make 0.4 B parameters. Whole processes are timed, each from page cache; every job
runs ``--repeats`` times, tools in turn. Before each, what others have written goes to the disk and out of the page
cache, and the inputs are read into it. Peak anonymous memory is polled from /proc every 10 ms. ``cat`` is the time that
reading the same inputs and writing as many bytes as the output takes: the limit.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.ledger import markdown
from tva import fingerprint, open_weights, save_weights
from tva.compose.apply import compose

OPTIONS = {"folder": "runs/compose", "layers": 26, "repeats": 3, "mergekit": "", "jobs": "sum,dare,ties,tiny"}
DEPENDS = ("benchmarks/compose.py", "tva/compose", "tva/merge", "tva/checkpoints", "tva/vectors/lazy.py")
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


def timed(command: list[str]) -> tuple[float, float]:
    """Run a command; return its wall time in seconds and peak anonymous memory in GB."""
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


def agreement(folder: Path) -> dict[str, float]:
    """Compare both tools' outputs: the share of elements that are equal, and the largest difference."""
    ours, other = open_weights(folder / "ours.safetensors"), open_weights(folder / "theirs")
    equal = total = largest = 0
    for name in other:
        left, right = ours[name].float(), other[name].float()
        equal += int((left == right).sum())
        total += left.numel()
        largest = max(largest, float((left - right).abs().max()))
    return {"equal": equal / total, "largest": largest}


def time_tiny(folder: Path) -> dict[str, float]:
    """Time models of many tiny tensors; seconds by the number of tensors."""
    found = {}
    for count in (4_000, 16_000):
        for seed, name in enumerate(("base", "a")):
            generator = torch.Generator().manual_seed(seed)
            state = {f"h.{i}.w": torch.randn(64, generator=generator) for i in range(count)}
            save_weights(state, folder / f"tiny-{name}.safetensors")
        started = time.monotonic()
        vectors = {"a": str(folder / "tiny-a.safetensors")}
        compose(str(folder / "tiny-base.safetensors"), vectors, "0.5 * a", str(folder / "tiny-out.safetensors"))
        found[str(count)] = time.monotonic() - started
    return found


def checkpoints(folder: Path, layers: int, seed: int) -> list[Path]:
    """Make the base and four fine-tunes, if they are not there."""
    base = None
    for number, name in enumerate(NAMES):
        if not (folder / name / "model.safetensors").exists():
            if base is None and name != "base":
                base = dict(open_weights(folder / "base"))
            made = make_checkpoint(folder / name, layers, 10 * seed + number, base)
            base = made if name == "base" else base
    return [folder / name / "model.safetensors" for name in NAMES]


NAMES = ("base", "a", "b", "c", "d")


def commands(folder: Path, job: str, mergekit: str) -> dict[str, list[str]]:
    """Return the command of each tool."""
    recipe, method, parameters = JOBS[job]
    ours = [sys.executable, "-m", "tva", "compose", "--base", str(folder / "base"), "--recipe", recipe]
    ours += [word for name in NAMES[1:] for word in (f"--vectors.{name}", str(folder / name))]
    ours += ["--output", str(folder / "ours.safetensors")]
    if not mergekit:
        return {"tva": ours}
    models = [{"model": str(folder / name), "parameters": parameters} for name in NAMES[1:]]
    config = {**method, "base_model": str(folder / "base"), "models": models, "dtype": "float32"}
    path = folder / f"{job}.yaml"
    path.write_text(yaml.safe_dump({**config, "out_dtype": "bfloat16"}))
    script = [mergekit, "-m", "mergekit.scripts.run_yaml"]
    return {"tva": ours, "mergekit": [*script, str(path), str(folder / "theirs"), "--random-seed", "0"]}


def measure(seed: int, folder: str, layers: int, repeats: int, mergekit: str, jobs: str) -> dict[str, Any]:
    """Return all times in seconds and peaks in GB, by job and tool."""
    place = Path(folder) / f"seed={seed}"
    files = checkpoints(place, layers, seed)
    copy = f"cat {' '.join(map(str, files))} > /dev/null; cp {files[0]} {place}/copy; sync {place}/copy"
    found: dict[str, Any] = {"billions": files[0].stat().st_size / 2e9, "cat_s": [], "jobs": {}}
    for _ in range(repeats):
        settle(place, files)
        found["cat_s"].append(timed(["sh", "-c", copy])[0])
    found["imports_s"] = [timed([sys.executable, "-c", IMPORTS])[0] for _ in range(repeats)]
    for job in jobs.split(","):
        if job == "tiny":
            found["tiny_s"] = time_tiny(place)
            continue
        results: dict[str, Any] = {}
        digests = set()
        for _ in range(repeats):
            for name, command in commands(place, job, mergekit).items():
                settle(place, files)
                seconds, peak = timed(command)
                results.setdefault(name, {"s": [], "peak_gb": []})
                results[name]["s"].append(seconds)
                results[name]["peak_gb"].append(peak)
            digests.add(fingerprint(open_weights(place / "ours.safetensors")).digest)
        found["jobs"][job] = {**results, "same_bytes": len(digests) == 1, **(agreement(place) if mergekit else {})}
    return found


SHOWN = {
    "sum": "sum of four task vectors",
    "dare": "DARE of each, then the sum",
    "ties": "TIES, density 0.2, trimmed by tensor",
}


def tables(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, str]:
    """Return the table, and the sum's seconds and peak for a sentence."""
    rows = []
    for run in runs.values():
        for job, found in run["jobs"].items():
            ours, theirs = found["tva"], found.get("mergekit")
            row = [f"{SHOWN[job]}, {run['billions']:.1f} B", f"{_range(ours['s'])} s"]
            if theirs:
                ratio = statistics.median(theirs["s"]) / statistics.median(ours["s"])
                peaks = f"{max(ours['peak_gb']):.2f} against {max(theirs['peak_gb']):.2f} GB"
                row += [f"{_range(theirs['s'])} s", f"{ratio:.1f} ×", peaks, f"{found['equal']:.2%}"]
            rows.append(row if theirs else [*row, "", "", f"{max(ours['peak_gb']):.2f} GB", ""])
        for count, seconds in run.get("tiny_s", {}).items():
            shown = f"{seconds / int(count) * 1000:.2f} s per 1,000"
            rows.append([f"{int(count):,} tensors of 64 elements", shown, "", "", "", ""])
    first = next(iter(runs.values()))
    total = first["jobs"]["sum"]["tva"]
    limit = f"{_range(first['cat_s'])} s, and interpreter and imports {_range(first['imports_s'])} s"
    return {
        "times": markdown(["job", "tva", "mergekit 0.1.5", "ratio", "peak memory", "equal elements"], rows),
        "limit": limit,
        "sum": f"{statistics.median(total['s']):.1f} s and {max(total['peak_gb']):.2f} GB",
    }


def _range(values: Any) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})"
