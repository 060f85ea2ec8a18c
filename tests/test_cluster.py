"""Fits, composes and edits on a Ray cluster that loses one of its two nodes halfway: the results of one process."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_edit import Net, Task, edit, vectors  # noqa: F401 (a fixture)

from tva.cli.commands.fit_many import make_fits, run_fits
from tva.compose.apply import compose
from tva.executors import RayExecutor, make_executor
from tva.search import Grid

pytestmark = pytest.mark.slow
STORE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
SLOW_FIT = """
import sys, time, yaml, pathlib
config = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
folder = pathlib.Path(config["trainer"]["default_root_dir"])
with open(folder / "runs", "a") as file:
    file.write(" ".join(sys.argv[3:]) + "\\n")
(folder / "last.ckpt").touch()
time.sleep(1.5)
"""


@pytest.fixture(scope="module")
def cluster():
    """A head of one core, to which tests add a node."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={**STORE, "include_dashboard": False})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that a worker fits on a node of one core
    yield made
    torch.set_num_threads(threads)
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def losing_a_node(cluster, monkeypatch):
    """A second node, which is killed when the first call has ended; what is left is done on the other."""
    node, run, lost = cluster.add_node(**STORE), RayExecutor.run, []
    cluster.wait_for_nodes()

    def run_and_lose(self, function, items):
        for item, found in run(self, function, items):
            if not lost:
                lost.append(node)
                cluster.remove_node(node, allow_graceful=False)
            yield item, found

    monkeypatch.setattr(RayExecutor, "run", run_and_lose)
    yield f"ray:{cluster.address}", lost
    if not lost:
        cluster.remove_node(node, allow_graceful=False)


def test_fits_go_on_from_their_checkpoints(losing_a_node, tmp_path):
    address, lost = losing_a_node
    (tmp_path / "fit.py").write_text(SLOW_FIT)
    fits = make_fits(list("abcd"), {"model": {}}, str(tmp_path / "out"), [0])
    executor = make_executor(address)
    assert (executor.num_workers, executor.num_nodes) == (2, 2)
    results = run_fits(fits, executor, command=[sys.executable, str(tmp_path / "fit.py")])
    assert [result.fit.task for result in results] == list("abcd")
    assert {result.state for result in results} <= {"done", "skipped"}  # one ended just before its node was lost
    assert all((fit.folder / "done.json").exists() for fit in fits)
    assert lost
    runs = [(fit.folder / "runs").read_text().splitlines() for fit in fits]
    assert all("--ckpt_path" in again for tries in runs for again in tries[1:])
    with pytest.raises(ValueError, match=r"have at most .*'CPU': 1"):
        make_executor(address, per_call={"cpus": 3})


def test_a_compose_has_the_bytes_of_one_process(losing_a_node, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # paths are the command's on every node
    tensors = {f"layers.{layer}.w": torch.randn(60, 60) for layer in range(9)}
    for name, scale in (("base", 0), ("a", 1), ("b", 2)):
        moved = {key: value + scale * torch.randn(60, 60) for key, value in tensors.items()}
        save_file(moved, tmp_path / f"{name}.safetensors")
    options = {"base": "base.safetensors", "vectors": {name: f"{name}.safetensors" for name in "ab"}}
    options |= {"recipe": 'ties(a, b, trim="model")', "max_shard_size": "30KB"}
    compose(**options, output="alone")
    address, lost = losing_a_node
    compose(**options, output="spread", engine=address)
    assert lost
    files = {path.name: path.read_bytes() for path in Path("alone").iterdir()}
    assert files == {path.name: path.read_bytes() for path in Path("spread").iterdir()}
    assert len(files) == 6


def test_an_edit_has_the_numbers_of_one_process(losing_a_node, vectors, tmp_path):  # noqa: F811
    address, lost = losing_a_node
    found = []
    for name, engine in (("alone", "local"), ("spread", address)):
        (tmp_path / name).mkdir()
        edit(vectors, folder=tmp_path / name, engine=engine, random_seed=None, search=Grid(num=3))
        report = json.loads((tmp_path / name / "out/edit.json").read_text())
        found.append({key: report[key] for key in ("evaluations", "tasks", "scaling_coef", "reason") if key in report})
    assert lost
    assert found[0] == found[1]


def test_a_node_that_cannot_take_part_is_said_before_anything_starts(cluster, tmp_path, monkeypatch):
    from tva import executors

    executor = make_executor(f"ray:{cluster.address}")
    executor.check(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.setattr(executors, "__version__", "0.0.9")
    with pytest.raises(ValueError, match=r"cannot take part: it has tva \S+, and the command runs 0.0.9"):
        executor.check(tmp_path)


def test_what_is_interrupted_ends_on_the_nodes(cluster, tmp_path, monkeypatch):
    executor = make_executor(f"ray:{cluster.address}")
    cancel, lost = executor._ray.cancel, []

    def lose_the_first(task, force):  # as Ray does with about half of those that come as a call begins
        if lost:
            cancel(task, force=force)
        lost.append(task)

    monkeypatch.setattr(executor._ray, "cancel", lose_the_first)
    ended = executor.run(_write_while_it_runs, [str(tmp_path / "first"), str(tmp_path / "second")])
    assert next(ended) == (str(tmp_path / "first"), None)
    while not (tmp_path / "second").exists():
        time.sleep(0.1)
    ended.close()
    assert (tmp_path / "second").read_text() == "ended"
    assert len(lost) > 2  # interrupts that came while it ended were ignored


def _write_while_it_runs(path, worker):
    if path.endswith("first"):
        return
    try:
        for _ in range(1000):
            Path(path).write_text("runs")
            time.sleep(0.1)
    finally:
        time.sleep(5)
        Path(path).write_text("ended")
