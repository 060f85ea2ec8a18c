"""Numbers and bytes that no rearrangement of the code may change, as they were first written.

``UPDATE_GOLDEN=1 pytest tests/test_numbers_stay.py`` writes them anew; a change of them belongs in the changelog.
"""

import ast
import json
import os
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tva import edit_model, fingerprint, open_weights, save_weights
from tva.compose import compose
from tva.search import Grid

GOLDEN = Path(__file__).parent / "golden"
RECIPES = [
    "0.5*(a + b)",
    "-a",
    "analogy(a, b, a)",
    "mean(a, b)",
    "ties(a, b, density=0.3)",
    'ties(a, b, trim="tensor")',
    "dare(a, drop=0.7, seed=3) + b",
    "magnitude(a, density=0.25)",
    "breadcrumbs(a, top=0.02, bottom=0.5)",
    "lines(a + b, first=0.2, last=1)",
    "consensus(a, b)",
    "sign_consensus(a, b)",
    "emr(a, b)",
    "pcb(a, b, ratio=0.2)",
    "0.4 * ties(dare(a), dare(b))",
]


def held(name, found):
    """Return the recorded value of this name; record it first where that is asked for."""
    file = GOLDEN / f"{name}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        lines = (
            f"{json.dumps(key)}: {json.dumps(found[key], sort_keys=True, separators=(',', ':'))}"
            for key in sorted(found)
        )
        file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return json.loads(file.read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bytes_of_compose_stay(tmp_path, monkeypatch, dtype):
    monkeypatch.chdir(tmp_path)
    draw = np.random.Generator(np.random.PCG64(0))
    shapes = {f"blocks.{n}.{name}": shape for n in range(3) for name, shape in {"w": (37, 29), "b": (37,)}.items()}
    shapes |= {"embed.weight": (130, 16), "one": (), "empty": (0, 4)}
    base = {name: torch.from_numpy(draw.standard_normal(shape, dtype=np.float32)) for name, shape in shapes.items()}
    save_weights({name: x.to(dtype) for name, x in base.items()}, tmp_path / "base.safetensors")
    for vector in "ab":
        moved = {n: x + 0.125 * torch.from_numpy(draw.standard_normal(x.shape, np.float32)) for n, x in base.items()}
        save_weights({name: x.to(dtype) for name, x in moved.items()}, tmp_path / f"{vector}.safetensors")
    found = {}
    for recipe in RECIPES:
        names = {node.id for node in ast.walk(ast.parse(recipe)) if isinstance(node, ast.Name)}
        vectors = {name: f"{name}.safetensors" for name in "ab" if name in names}
        compose(base="base.safetensors", vectors=vectors, recipe=recipe, output="out.safetensors")
        found[recipe] = fingerprint(open_weights("out.safetensors")).digest
    assert found == held(f"compose-{str(dtype).removeprefix('torch.')}", found)


class Exact(L.LightningModule):
    """A linear classifier of small integers, so that every sum is exact on any machine."""

    def __init__(self):
        super().__init__()
        self.network = torch.nn.Linear(6, 3, bias=False)
        self.network.weight.data = torch.tensor([[4, -2, 1, 0, 2, 1], [-1, 3, 2, 2, 0, -2], [0, 1, -3, 1, 2, 3]]) / 4

    def forward(self, inputs):
        return self.network(inputs)

    def evaluation(self, batch, stage):
        inputs, labels = batch
        correct = (self(inputs).argmax(-1) == labels).float()
        self.log(f"{stage}/accuracy", correct.mean())
        return {"correct": correct}

    def validation_step(self, batch, batch_idx):
        return self.evaluation(batch, "val")

    def test_step(self, batch, batch_idx):
        return self.evaluation(batch, "test")


class Integers(L.LightningDataModule):
    """Small integers as inputs, and labels that a linear map of integers gives most of them."""

    def __init__(self, seed):
        super().__init__()
        draw = np.random.Generator(np.random.PCG64(seed))
        self.inputs = torch.from_numpy(draw.integers(-4, 5, (300, 6))).float()
        teacher = torch.from_numpy(draw.integers(-3, 4, (6, 3))).float()
        self.labels = (self.inputs @ teacher).argmax(-1)

    def part(self, rows):
        return DataLoader(TensorDataset(self.inputs[rows], self.labels[rows]), 50)

    def val_dataloader(self):
        return self.part(slice(0, 150))

    def test_dataloader(self):
        return self.part(slice(150, 300))


def test_numbers_of_an_edit_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    model = Exact()
    base = model.state_dict()["network.weight"].clone()
    steps = {"a": [[1, 0, -1, 2, 0, 1]] * 3, "b": [[0, 2, 1, -1, 1, 0], [1, 1, 0, 0, 2, 1], [2, 0, 1, 1, -1, 1]]}
    for name, step in steps.items():
        save_weights(
            {"network.weight": base + torch.tensor(step) * torch.tensor([[1.0], [-1], [0]])}, f"{name}.safetensors"
        )
    report = edit_model(
        model,
        vectors={name: f"{name}.safetensors" for name in steps},
        recipe="a - b",
        targets={"a": Integers(1), "b": Integers(2)},
        controls={"other": Integers(3)},
        maximize="mean(accuracy)",
        subject_to=["other/accuracy >= 0.5 * base"],
        search=Grid(num=5),
        output="out",
    )
    found = json.loads(json.dumps(report.to_json()))
    for name in ("versions", "command", "created", "base", "vectors", "edited", "data", "model"):
        found[name] = sorted(found[name]) if isinstance(found[name], dict) else None
    keys = sorted(found["evaluations"][0])
    assert all(sorted(entry) == keys for entry in found["evaluations"])
    found["evaluations"] = [keys, *([entry[key] for key in keys] for entry in found["evaluations"])]
    assert_close(found, held("edit", found))
    assert (tmp_path / "out/edited.safetensors").exists() == report.holds


def assert_close(found, expected, path="edit.json"):
    """Compare two JSON values: equal but for the last bits of floats."""
    if isinstance(expected, float) and isinstance(found, float):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9), path
    elif isinstance(expected, dict):
        assert isinstance(found, dict), path
        assert found.keys() == expected.keys(), path
        for key in expected:
            assert_close(found[key], expected[key], f"{path}: {key}")
    elif isinstance(expected, list):
        assert isinstance(found, list), path
        assert len(found) == len(expected), path
        for position, pair in enumerate(zip(found, expected, strict=True)):
            assert_close(*pair, f"{path}[{position}]")
    else:
        assert found == expected, path
