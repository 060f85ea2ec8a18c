"""tva edit on several workers: the numbers of one process, whichever way candidates or batches are shared out."""

import json
from pathlib import Path

import pytest
import torch
from small_edit import LateNet, Net, Task, edit, vectors  # noqa: F401 (a fixture)
from small_executors import Inline

from tva.edit import workers
from tva.errors import HarnessError
from tva.search import Bisect, Grid, Learned, Optuna, Race

FORGET = {"recipe": "-a", "maximize": None, "minimize": "a/accuracy", "subject_to": ["other/accuracy >= 0.5 * base"]}
SEARCHES = {
    "grid": {},
    "bisect": {**FORGET, "minimize": None, "rule": "largest", "search": Bisect(num=9)},
    "race": {"search": Race(num=5, first=60, seed=2)},
    "two coefficients": {"recipe": "s * a + t * b", "search": Grid(num=3, ranges={"s": [0, 1], "t": [0, 1]})},
    "optuna": {"search": Optuna(num_trials=3, ranges={"scaling_coef": [0, 1]}, sampler="random")},
    "a divergence and a metric that is computed": {**FORGET, "minimize": "a/f1_score", "maximize": None},
}
QUICK = {"bisect", "two coefficients"}


class OneDigit(Net):
    """Logs a mean that torchmetrics keeps as a floating sum, which processes cannot put together exactly."""

    def __init__(self):
        super().__init__()
        from torchmetrics import MeanMetric

        self.mean = MeanMetric()

    def validation_step(self, batch, batch_idx):
        found = super().validation_step(batch, batch_idx)
        self.mean(found["loss"])
        self.log("val/mean", self.mean)
        return found


def margin(model, split):
    """Score every example of a fixed batch."""
    inputs = torch.linspace(-1, 1, 40).reshape(10, 4)
    return model(inputs)[:, 0].abs()


margin.higher_is_better = True


def both(vectors, executor, monkeypatch, model=Net, **options):  # noqa: F811
    """Make an edit in one process and on workers, and return what both measured."""
    monkeypatch.setattr(workers, "make_executor", lambda *_, **__: executor)
    found = []
    for engine in ("local", "ray"):
        Path(engine).mkdir()
        edit(vectors, model(), engine=engine, random_seed=None, **options, folder=engine)
        report = json.loads(Path(f"{engine}/out/edit.json").read_text())
        assert engine in report["search"].pop("log")
        report["search"].pop("num_forward")  # workers evaluate coefficient 0 too
        lines = [json.loads(line) for line in Path(f"{engine}/log.jsonl").read_text().splitlines()]
        report["lines"] = [{key: value for key, value in line.items() if key != "time"} for line in lines]
        found.append({key: value for key, value in report.items() if key not in ("seconds", "created")})
        assert not list(Path(engine).glob("*.workers"))
    return found


@pytest.mark.parametrize(
    "options",
    [pytest.param(found, id=name, marks=[] if name in QUICK else pytest.mark.slow) for name, found in SEARCHES.items()],
)
def test_workers_find_what_one_process_finds(vectors, options, monkeypatch):  # noqa: F811
    if isinstance(options.get("search"), Optuna):
        pytest.importorskip("optuna")
    executor = Inline(3)
    alone, spread = both(vectors, executor, monkeypatch, **options)
    assert spread == alone
    assert executor.calls >= 3
    assert executor.closed == 1


@pytest.mark.parametrize(
    ("model", "options"),
    [
        pytest.param(LateNet, {}, id="logs after the epoch", marks=pytest.mark.slow),
        pytest.param(OneDigit, {}, id="a floating sum"),
        pytest.param(Net, {"controls": {"other": margin}}, id="a function", marks=pytest.mark.slow),
    ],
)
def test_states_are_shared_out_where_batches_cannot_be(vectors, model, options, monkeypatch):  # noqa: F811
    executor = Inline(3)
    alone, spread = both(vectors, executor, monkeypatch, model, search=Grid(num=4), **options)
    assert spread == alone
    assert executor.calls >= 3


def test_a_worker_that_scores_otherwise_is_noticed(vectors, monkeypatch):  # noqa: F811
    """As one with another processor may: coefficient 0 must score there as the base did here."""
    monkeypatch.setattr(workers, "make_executor", lambda *_, **__: Inline(2))
    opened = workers._open

    def nudged(file, digest):
        session = opened(file, digest)
        _ = session.evaluator.facts  # which the files alone decide
        for tensor in session.editor.base.values():
            tensor.mul_(1.01)
        return session

    monkeypatch.setattr(workers, "_open", nudged)
    with pytest.raises(HarnessError, match="must score exactly as the base.*all workers the processor of this process"):
        edit(vectors, engine="ray")


def test_a_worker_that_reads_other_files_is_refused(vectors, monkeypatch):  # noqa: F811
    monkeypatch.setattr(workers, "make_executor", lambda *_, **__: Inline(2))
    opened = workers._open

    def other(file, digest):
        session = opened(file, digest)
        session.evaluator.__dict__["facts"] = {**session.evaluator.facts, "base": "0" * 32}
        return session

    monkeypatch.setattr(workers, "_open", other)
    with pytest.raises(ValueError, match=r"inline opens another edit than the command: base 0{32} here, \w+ there"):
        edit(vectors, engine="ray")


def test_what_cannot_be_sent_or_spread_is_said_first(vectors, monkeypatch):  # noqa: F811
    monkeypatch.setattr(workers, "make_executor", lambda *_, **__: Inline(2))
    with pytest.raises(ValueError, match="search Learned trains by the Trainer. Leave engine out, or take another"):
        edit(vectors, engine="ray", search=Learned())

    class Inside(Task):
        pass

    with pytest.raises(ValueError, match="sends model, data and Trainer to other processes.*at the top of a module"):
        edit(vectors, engine="ray", controls={"other": Inside(3)})
    with pytest.raises(ValueError, match="engine must be 'local', 'local:N', 'ray' or 'ray:ADDRESS'; found 'slurm'"):
        monkeypatch.undo()
        edit(vectors, engine="slurm")
    assert not Path("out").exists()
