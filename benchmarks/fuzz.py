"""Run parsers and readers under a coverage-guided fuzzer; an exception that is not an error in words is a finding.

    pip install atheris
    python -m benchmarks run fuzz --seeds 0 [--runs 20000] [--only recipe]

Each target runs in a process of its own, as the fuzzer ends its process; an input that fails is kept as a file.
"""

import contextlib
import json
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.ledger import ROOT, markdown

TARGETS = ("recipe", "yaml", "json", "pattern", "pickle", "safetensors", "torch", "mergekit")
OPTIONS = {"runs": 20_000, "only": ""}
DEPENDS = ("benchmarks/fuzz.py", "tva/checkpoints", "tva/compose", "tva/patterns.py")
SEEDS: dict[str, list[bytes]] = {
    "recipe": [b"0.4 * ties(dare(a, drop=0.9), b, density=0.2) - s * a", b"analogy(a, b, a) / 2", b"mean(a, b)"],
    "yaml": [b"a: &a [1, 2]\nb: *a\n", b"{a: 1e400, b: !!python/name:os.system x}"],
    "json": [b'{"weight_map": {"a": "model.safetensors"}}', b"[[[[1]]]]"],
    "pattern": [b"^layers[.](0|1)[.].*weight$", b"(a|aa)+b"],
    "mergekit": [b"merge_method: ties\nbase_model: b\nmodels:\n- {model: a, parameters: {weight: [0, 1]}}\n"],
}


def target(name: str, folder: Path) -> Callable[[bytes], None]:
    """Return what is run on each input; errors in words are caught, everything else is a finding."""
    import torch

    from tva.checkpoints.foreign import parse_json
    from tva.checkpoints.foreign_yaml import check_yaml
    from tva.checkpoints.formats import pytorch, safetensors
    from tva.checkpoints.inert_pickle import InertUnpickler
    from tva.compose.mergekit import MergekitFile
    from tva.compose.syntax import Expression
    from tva.patterns import pattern_of

    def text(data: bytes) -> str:
        return data.decode("utf-8", "surrogateescape").encode("utf-8", "replace").decode()

    def unpickle(data: bytes) -> None:
        InertUnpickler(data).load()

    def on_file(ending: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
        def run(data: bytes) -> None:
            (folder / f"input{ending}").write_bytes(data)
            weights = read(folder / f"input{ending}")
            for each in list(weights)[:3] if hasattr(weights, "entry") else ():
                weights[each]

        return run

    runs: dict[str, Callable[[bytes], object]] = {
        "recipe": lambda data: Expression(text(data), ["a", "b"], {"s": 0.5}),
        "yaml": lambda data: check_yaml(text(data)),
        "json": lambda data: parse_json(data, "input", {str: (str, [int], {"a": float})}),
        "pattern": lambda data: pattern_of(text(data), "input").search("layers.0.weight"),
        "pickle": unpickle,
        "safetensors": on_file(".safetensors", safetensors.open),
        "torch": on_file(".pt", pytorch.open),
        "mergekit": on_file(".yml", MergekitFile),
    }
    if name in ("pickle", "torch", "safetensors"):
        torch.save({"a": torch.ones(3), "b": [1, {"c": "d"}]}, folder / "seed.pt")
        torch.save({"a": torch.ones(3)}, folder / "old.pt", _use_new_zipfile_serialization=False)
        header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
        SEEDS["safetensors"] = [struct.pack("<Q", len(header)) + header + bytes(8)]
        SEEDS["torch"] = [(folder / file).read_bytes() for file in ("seed.pt", "old.pt")]
        import zipfile

        SEEDS["pickle"] = [zipfile.ZipFile(folder / "seed.pt").read("seed/data.pkl")]

    def one(data: bytes) -> None:
        damaged = Exception if name == "pickle" else ValueError  # whose reader catches what these bytes raise
        with contextlib.suppress(ValueError, OSError, *_yaml_errors(name), damaged):
            runs[name](data)

    return one


def _yaml_errors(name: str) -> tuple[type[Exception], ...]:
    import yaml

    return (yaml.YAMLError,) if name == "yaml" else ()


def fuzz(name: str, runs: int, seed: int) -> None:
    """Fuzz one target; the process ends with it."""
    import atheris

    with atheris.instrument_imports(include=["tva"]), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        one = target(name, folder)
        (folder / "corpus").mkdir()
        for at, content in enumerate(SEEDS[name]):
            (folder / "corpus" / str(at)).write_bytes(content)
        options = [f"-runs={runs}", f"-seed={seed + 1}", "-max_len=4096", "-timeout=10", "-rss_limit_mb=4096"]
        atheris.Setup([sys.argv[0], *options, f"-artifact_prefix=fuzz-{name}-", str(folder / "corpus")], one)
        atheris.Fuzz()


def measure(seed: int, runs: int, only: str) -> dict[str, Any]:
    """Return executions, branches covered and findings of each target."""
    found: dict[str, Any] = {}
    for name in (only,) if only else TARGETS:
        words = [sys.executable, "-m", "benchmarks.fuzz", name, str(runs), str(seed)]
        ended = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
        done = re.search(r"Done (\d+) runs in (\d+) second", ended.stderr)
        covered = re.findall(r"cov: (\d+) ft: (\d+)", ended.stderr)
        failed = not done or ended.returncode != 0
        if failed:
            print(f"{name}: {ended.stderr[-3000:]}", flush=True)
        branches = int(covered[-1][0]) if covered else 0
        found[name] = {"executions": int(done[1]) if done else 0, "branches": branches, "findings": int(failed)}
    return found


def tables(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, str]:
    """Return one row a target, with the counts of all seeds."""
    rows = []
    for name in next(iter(runs.values())):
        found = [run[name] for run in runs.values()]
        executions, findings = (sum(each[key] for each in found) for key in ("executions", "findings"))
        rows.append([name, f"{executions:,}", str(max(each["branches"] for each in found)), str(findings)])
    return {"targets": markdown(["target", "executions", "branches covered", "findings"], rows)}


if __name__ == "__main__":
    fuzz(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
