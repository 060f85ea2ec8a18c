"""tva compose on several workers: the bytes of one process, whole or not at all."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_executors import Inline

from tva.checkpoints.spec import Spec, encode_header
from tva.cli.main import main
from tva.compose import apply
from tva.compose.apply import compose
from tva.errors import MismatchError
from tva.executors import make_executor
from tva.vectors.extract import extract

RECIPES = {
    "sum": "0.3 * (a + b)",
    "ties over the model": 'ties(a, b, density=0.2, trim="model")',
    "pcb": "pcb(a, b)",
    "emr": "emr(a, b, task=1)",
    "random and nested": "0.4 * dare(a, seed=3) + slerp(a, b, t=0.3) + 0.1 * model_stock(a, b)",
    "whole tensors": "tsv(a, b)",
}


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = {f"layers.{layer}.w": (40, 50) for layer in range(5)} | {"embed": (30, 20), "norm": (7,)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file({**base, "steps": torch.tensor(3)}, "base.safetensors")
    for name in "ab":
        tuned = {key: value + 0.1 * torch.randn(value.shape, generator=generator) for key, value in base.items()}
        save_file({**tuned, "steps": torch.tensor(3)}, f"{name}.safetensors")
    extract("base.safetensors", "a.safetensors", "a.tv.safetensors")
    return {"base": "base.safetensors", "vectors": {"a": "a.tv.safetensors", "b": "b.safetensors"}}


def on(executor, monkeypatch):
    monkeypatch.setattr(apply, "open_workers", lambda engine, *_, **__: None if engine == "local" else executor)


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_workers_write_the_bytes_of_one_process(inputs, recipe, monkeypatch):
    executor = Inline()
    on(executor, monkeypatch)
    options = {"recipe": recipe, "max_shard_size": "20KB"}
    alone = compose(**inputs, output="alone", **options)
    report = compose(**inputs, output="spread", engine="ray", **options)
    assert contents(Path("spread")) == contents(Path("alone"))
    assert len(contents(Path("spread"))) == executor.calls + 1 == 4  # and the index
    assert executor.checked == [Path()]
    assert (report.edited, report.effects, report.notes) == (alone.edited, alone.effects, alone.notes)


def test_a_vector_file_is_not_read_again_to_check_it(inputs, monkeypatch):
    on(Inline(), monkeypatch)
    damaged = Path("a.tv.safetensors")
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged: its tensors have the fingerprint"):
        compose(**inputs, recipe="a", output="out", max_shard_size="20KB", engine="ray")
    assert not list(Path().glob("*out*"))


def test_an_error_in_a_worker_is_the_commands(inputs, monkeypatch):
    on(Inline(), monkeypatch)
    tensors = {f"layers.{layer}.w": torch.ones(40, 50) for layer in range(5)} | {"steps": torch.tensor(3)}
    save_file({**tensors, "embed": torch.ones(30, 20), "norm": torch.ones(7)}, "other.safetensors")
    inputs["base"] = "other.safetensors"
    with pytest.raises(MismatchError, match="The task vector a was taken from the base"):
        compose(**inputs, recipe="a", output="out", max_shard_size="20KB", engine="ray")
    assert not list(Path().glob("*out*"))


def test_an_interrupted_run_leaves_no_name_and_goes_on_from_whole_shards(inputs, monkeypatch):
    on(Inline(most=2), monkeypatch)
    options = {"recipe": "0.3 * (a + b)", "max_shard_size": "20KB"}
    with pytest.raises(KeyboardInterrupt):
        compose(**inputs, output="out", engine="ray", **options)
    assert not Path("out").exists()
    executor = Inline()
    on(executor, monkeypatch)
    report = compose(**inputs, output="out", engine="ray", resume=True, **options)
    assert executor.calls == 1
    assert report.resumed > 0
    compose(**inputs, output="alone", **options)
    assert contents(Path("out")) == contents(Path("alone"))


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("out.safetensors", {}, r"output=.*out.safetensors is written by one process.*give a folder"),
        ("out", {"requantize": True}, "requantize is written by one process. Leave engine out, or requantize"),
        ("out", {"write_as": "lora"}, "write_as is written by one process"),
        ("out", {"engine": "slurm"}, "engine must be 'local', 'local:N', 'ray' or 'ray:ADDRESS'; found 'slurm'"),
        ("out", {"engine": "ray:127.0.0.1:9"}, "No Ray cluster answers at '127.0.0.1:9'.*ray start --head"),
    ],
)
def test_what_an_engine_cannot_do_is_said_first(inputs, output, options, message):
    if "127" in options.get("engine", ""):
        pytest.importorskip("ray")
    with pytest.raises(ValueError, match=message):
        compose(**inputs, recipe="a", output=output, **{"engine": "local:2", **options})
    assert not list(Path().glob("*out*"))


@pytest.mark.slow
def test_processes_of_this_machine_write_the_bytes_of_one(inputs):
    options = {"recipe": 'ties(a, b, trim="model")', "max_shard_size": "20KB"}
    compose(**inputs, output="alone", **options)
    compose(**inputs, output="spread", engine="local:2", **options)
    assert contents(Path("spread")) == contents(Path("alone"))


@pytest.mark.slow
def test_a_process_stays_for_later_calls_and_one_that_is_killed_ends_the_run_with_a_reason():
    executor = make_executor("local:1", devices="cpu", processes=True)
    (first,), (second,) = (list(executor.run(_pid, [0])) for _ in range(2))
    assert first == second != (0, os.getpid())
    ((item, found),) = executor.run(_end, [9])
    assert item == 9
    assert isinstance(found, OSError)
    assert "ended from outside" in str(found)
    ((_, third),) = executor.run(_pid, [0])
    assert third not in (first[1], os.getpid())
    executor.close()


def _end(status, worker):
    os._exit(status)


def _pid(_, worker):
    return os.getpid()


# --- plans


def header_only(path, layers, width):
    """Write a checkpoint of zeros that takes no room on the disk."""
    layout = {f"model.layers.{layer}.w": Spec("bfloat16", (width, width)) for layer in range(layers)}
    header = encode_header(layout, {"format": "pt"})
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(spec.num_bytes for spec in layout.values()))
    return str(path)


def test_a_plan_of_a_trillion_parameters_says_what_each_node_does(capsys):
    base = header_only(Path("base.safetensors"), 400, 50_000)
    vector = header_only(Path("a.safetensors"), 400, 50_000)
    words = ["compose", "--base", base, "--vectors.a", vector, "--vectors.b", vector, "--output", "out"]
    words += ["--plan", "true", "--engine", "local:16"]
    main([*words, "--recipe", "a + b", "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["num_elements"] == 10**12
    assert [node["shards"] for node in plan["nodes"]] == [25] * 16
    assert {node["write_bytes"] for node in plan["nodes"]} == {2 * 10**12 // 16}
    assert {node["read_bytes"] for node in plan["nodes"]} == {6 * 10**12 // 16}
    assert plan["first_read_bytes"] == 0
    main([*words, "--recipe", 'ties(a, b, trim="model")'])
    shown = " ".join(capsys.readouterr().out.split())
    assert "first one process reads 12 TB; then 16 nodes compute 400 shards: each at most 25, reading" in shown
    assert not Path("out").exists()
