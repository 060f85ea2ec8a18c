"""Time `tva compose` against mergekit and against the disk, undo files against copies, and measure compressed files.

    python -m benchmarks run compose --seeds 0 1 2 --mergekit PYTHON [--folder /somewhere/with/space] [--layers 8]
        [--vector TASK_VECTOR]

``--mergekit`` names the Python of an environment with mergekit 0.1.5 (``python -m venv E && E/bin/pip install
mergekit==0.1.5``). Checkpoints are synthetic, of a Llama's shapes in bfloat16; each seed draws others. Whole processes
are timed, tools in turn. Before each, what others have written goes to the disk and out of the page cache, and the
inputs are read into it. Peak anonymous memory is polled from /proc every 10 ms. A copy is the time that reading the
same inputs and writing as many bytes as the output takes: the limit.
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
from tva import TaskVector, fingerprint, open_weights, save_weights
from tva.vectors.compress import compress

OPTIONS = {"folder": "runs/compose", "layers": 8, "mergekit": "", "vector": ""}
DEPENDS = (
    "benchmarks/compose.py",
    *(f"tva/compose/{name}.py" for name in ("apply", "engine", "chunks", "undo", "revert")),
    "tva/merge/methods/ties.py",
    "tva/checkpoints/stream_writer.py",
    *(f"tva/vectors/{name}.py" for name in ("lazy", "compress", "encoding")),
)
TOKENS, WIDTH, HIDDEN = 32_000, 1024, 2816
JOBS = {
    "sum": ("0.25 * (a + b + c + d)", {"merge_method": "task_arithmetic"}, {"weight": 0.25}),
    "ties": (
        '0.5 * ties(a, b, c, d, density=0.2, trim="tensor", undecided="positive")',
        {"merge_method": "ties", "parameters": {"lambda": 0.5}},
        {"weight": 1.0, "density": 0.2},
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
    return {
        "tva": ours,
        "mergekit": [*script, str(path), str(folder / "theirs"), "--random-seed", "0", "--no-copy-tokenizer"],
    }


def measure(seed: int, folder: str, layers: int, mergekit: str, vector: str) -> dict[str, Any]:
    """Return times in seconds, peaks in GB, and sizes and errors of files."""
    place = Path(folder) / f"seed={seed}"
    files = checkpoints(place, layers, seed)
    found: dict[str, Any] = {"billions": files[0].stat().st_size / 2e9}
    copy = f"cat {' '.join(map(str, files))} > /dev/null; cp {files[0]} {place}/copy; sync {place}/copy"
    found["copy_s"] = settled(place, files, ["sh", "-c", copy])[0]
    for job in JOBS:
        found[job] = {name: settled(place, files, words) for name, words in commands(place, job, mergekit).items()}
        found[job] |= agreement(place) if mergekit else {}
    return {**found, "undo": undo(place, files, mergekit), "compressed": compressed(place, seed, vector)}


def settled(place: Path, files: list[Path], command: list[str]) -> tuple[float, float]:
    """Run a command as every run begins."""
    settle(place, files)
    return timed(command)


def undo(place: Path, files: list[Path], mergekit: str) -> dict[str, float]:
    """Time composing with an undo file and going back, and compare sizes."""
    with_undo = [*commands(place, "sum", mergekit)["tva"], "--keep_undo"]
    output, back = place / "ours.safetensors", place / "back.safetensors"
    kept = settled(place, files, with_undo)[0]
    revert = [sys.executable, "-m", "tva", "revert", str(output), "--output", str(back)]
    found = {"kept_s": kept, "revert_s": settled(place, [output, place / "ours.undo.safetensors"], revert)[0]}
    assert fingerprint(open_weights(back)).digest == fingerprint(open_weights(files[0])).digest
    return {**found, "share": (place / "ours.undo.safetensors").stat().st_size / output.stat().st_size}


ENCODINGS = ("bf16", "int8", "sign", "top_k(density=0.1)", "low_rank(rank=16)")


def compressed(place: Path, seed: int, vector: str) -> dict[str, dict[str, list[float]]]:
    """Return size, as a share of float32, and error of each encoding, of Gaussian noise and of a real vector."""
    noise = place / "noise.tv.safetensors"
    drawn = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(seed))
    TaskVector({"weight": drawn}).save(noise)
    found: dict[str, dict[str, list[float]]] = {}
    for name, path in {"noise": str(noise), **({"vector": vector} if vector else {})}.items():
        dense = TaskVector.load(path).deltas
        whole = torch.cat([delta.flatten().double() for delta in dense.values()])
        for encoding in ENCODINGS:
            compress(path, place / "small.tv.safetensors", encoding=encoding)
            read = TaskVector.load(place / "small.tv.safetensors").deltas
            rest = torch.cat([read[key].flatten().double() for key in dense]) - whole
            size = (place / "small.tv.safetensors").stat().st_size / (4 * len(whole))
            found.setdefault(name, {})[encoding] = [size, float(rest.norm() / whole.norm())]
    return found


SHOWN = {"sum": "sum of four task vectors", "ties": "TIES of four, density 0.2, trimmed by tensor"}


def tables(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, str]:
    """Return the tables of times and of compressed files."""
    found = list(runs.values())
    rows = []
    for job, shown in SHOWN.items():
        ours, theirs = ([run[job][tool][0] for run in found] for tool in ("tva", "mergekit"))
        peaks = [" / ".join(f"{max(run[job][tool][1] for run in found):.2f}" for tool in ("tva", "mergekit"))]
        equal = f"{100 * min(run[job]['equal'] for run in found):.2f}%"
        rows.append([shown, _range(ours), _range(theirs), _ratio(theirs, ours), *peaks, equal])
    copies, sums = [run["copy_s"] for run in found], [run["sum"]["tva"][0] for run in found]
    kept, back = ([run["undo"][key] for run in found] for key in ("kept_s", "revert_s"))
    rows.append(["reading the inputs and copying one", "", _range(copies), _ratio(copies, sums), "", ""])
    undone = [
        ["the sum with `--keep_undo`", _range(kept), f"{_ratio(kept, sums)} the sum without"],
        ["`tva revert` of it", _range(back), f"{_ratio(back, sums)} the sum"],
        ["size of the undo file", "", f"{_range([100 * run['undo']['share'] for run in found])}% of the output"],
    ]
    sizes = [
        [f"`{encoding}`", *(_size(run) for run in _kinds(found, encoding))]
        for encoding in found[0]["compressed"]["noise"]
    ]
    heads = ["job", "tva, s", "other, s", "other ÷ tva", "peak of both, GB", "equal elements"]
    return {
        "times": markdown(heads, rows),
        "undo": markdown(["what", "s", "compared"], undone),
        "compressed": markdown(["encoding", "Gaussian noise, 1024 × 1024", "digits of the demo"], sizes),
        "billions": f"{found[0]['billions']:.2f}",
    }


def _kinds(found: list[Mapping[str, Any]], encoding: str) -> list[list[list[float]]]:
    kinds = found[0]["compressed"]
    return [[run["compressed"][kind][encoding] for run in found if kind in run["compressed"]] for kind in kinds]


def _size(values: list[list[float]]) -> str:
    size, error = (statistics.median(column) for column in zip(*values, strict=True))
    return f"{100 * size:.1f}%, error {error:.2g}"


def _ratio(above: list[float], below: list[float]) -> str:
    return f"{_range([one / other for one, other in zip(above, below, strict=True)])} ×"


def _range(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})"
