"""The command ``tva paper run``."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from tva.checkpoints import open_weights
from tva.cli.commands import fit_many
from tva.cli.processes import only_one, run_process, terminate_as_interrupt
from tva.console import make_console, print_line, reporting
from tva.executors import Executor, Worker, make_executor
from tva.paper.results import DONE, edit_folder, read_done
from tva.paper.suite import Edit, Scale, find_scale
from tva.report.run_files import EDIT_JSON
from tva.report.table import Column, print_table, words
from tva.vectors.header import read_origin

HELP = "run experiments of the paper (fits, edits and their numbers), skipping what is finished"
ORDER = "names…"
TVA_EDIT = (sys.executable, "-m", "tva", "edit")
State = Literal["new", "changed", "skipped", "done", "failed", "interrupted"]


@dataclass(frozen=True)
class Step:
    """What became of one fit or edit.

    Attributes:
        experiment: The experiment's name, with its scale.
        kind: ``fit`` or ``edit``.
        name: Of the fit or edit.
        seed: Its seed.
        state: As for ``tva fit-many``.
        seconds: Of the run that finished it.
        message: What to know or to do.
    """

    experiment: str
    kind: str
    name: str
    seed: int
    state: str
    seconds: float | None = None
    message: str = ""


@dataclass(frozen=True)
class EditJob:
    """One edit with its vectors.

    Attributes:
        edit: The edit.
        folder: Where it writes.
        config: What ``tva edit`` is given.
        digest: Identifies the config, with the vectors by their contents.
    """

    edit: Edit
    folder: Path
    config: Mapping[str, Any]
    digest: str


def run(
    names: list[str],
    scale: str | None = None,
    output: str = "runs/paper",
    data_root: str | None = None,
    seeds: list[int] | None = None,
    jobs: int | None = None,
    devices: str | int | None = None,
    engine: str = "local",
    per_fit: dict[str, Any] | None = None,
    redo: bool = False,
) -> list[Step]:
    """Run experiments of the paper: fits, edits and their numbers; what is finished is skipped.

    ``tva paper list`` lists them, ``tva paper plan`` reports what one would do, ``tva paper table`` shows the results.

    Args:
        names: Experiments, or paths of YAML files of your own.
        scale: Scale of the experiments; by default ``small``.
        output: Folder for all fits and edits; experiments with the same setup share their fits.
        data_root: Folder with the data sets and models that the setup names, if it needs one.
        seeds: Seeds; by default those of the experiment.
        jobs: Number of fits or edits at a time, as for ``tva fit-many``.
        devices: As for ``tva fit-many``.
        engine: As for ``tva fit-many``.
        per_fit: As for ``tva fit-many``.
        redo: Repeat what was made with another configuration; the old folder is kept under another name.
    """
    scales = [find_scale(name, scale) for name in names]
    for each in scales:
        check_data_root(each, data_root)
    executor = make_executor(engine, jobs, devices, per_fit or {})
    steps: list[Step] = []
    for each in scales:
        with only_one(Path(output) / each.experiment / each.name, "paper"):
            steps += run_scale(each, Path(output), each.chosen_seeds(seeds), data_root or "", executor, redo)
        if any(step.state == "interrupted" for step in steps):
            break
    return steps


def check_data_root(scale: Scale, data_root: str | None) -> None:
    """Check that a data root is given where a setup needs one.

    Raises:
        ValueError: It is needed and missing.
        FileNotFoundError: It is not a folder.
    """
    if scale.needs_data_root and not data_root:
        raise ValueError(
            f"{scale.experiment} at scale {scale.name} reads its sets and models from a folder: pass --data_root. "
            f"`tva paper plan {scale.experiment} --scale {scale.name}` says what must be in it."
        )
    if data_root and not Path(data_root).is_dir():
        raise FileNotFoundError(f"There is no folder {data_root} (--data_root).")


def run_scale(
    scale: Scale, output: Path, seeds: Sequence[int], data_root: str, executor: Executor, redo: bool
) -> list[Step]:
    """Run the unfinished part of one experiment; edits whose fits failed are left out and named."""
    fits = make_fits(scale, output, seeds, data_root)
    print(f"{scale.experiment}, {scale.name}: {len(fits)} fits", flush=True)
    with only_one(output / "fits" / scale.setup_name, "fit-many"):
        results = fit_many.run_fits(fits, executor, redo=redo)
    label = f"{scale.experiment} ({scale.name})"
    steps = [Step(label, "fit", r.fit.task, r.fit.seed, r.state, r.seconds, r.message) for r in results]
    if any(result.state == "interrupted" for result in results):
        return steps
    vectors = {
        (r.fit.task, r.fit.seed): r.vector for r in results if r.vector is not None and r.state in ("done", "skipped")
    }
    edits = list(scale.edits(seeds, data_root))
    ready = [edit for edit in edits if all((name, edit.seed) in vectors for name in edit.vectors)]
    made = [make_job(scale, edit, {n: vectors[n, edit.seed] for n in edit.vectors}, output) for edit in ready]
    print(f"{scale.experiment}, {scale.name}: {len(made)} edits", flush=True)
    steps += [
        Step(label, "edit", edit.name, edit.seed, "failed", None, "not begun: a fit that it needs is not finished")
        for edit in edits
        if edit not in ready
    ]
    return [*steps, *run_edits(label, made, executor, redo)]


def make_fits(scale: Scale, output: Path, seeds: Sequence[int], data_root: str) -> list[fit_many.Fit]:
    """Return the fits of an experiment, as ``tva fit-many`` runs them."""
    folder = str(output / "fits" / scale.setup_name)
    return [
        fit
        for seed in seeds
        for fit in fit_many.make_fits(
            {each.name: each.changes for each in scale.fits([seed], data_root)},
            scale.shared(seed, data_root),
            folder,
            [seed],
        )
    ]


def make_job(scale: Scale, edit: Edit, vectors: Mapping[str, Path], output: Path) -> EditJob:
    """Return an edit with its vectors and its folder."""
    folder = edit_folder(output, scale, edit.name, edit.seed)
    digests = {name: read_origin(open_weights(path))[0].finetuned for name, path in vectors.items()}
    identity = json.dumps({**edit.config, "vectors": digests}, sort_keys=True)
    paths = {name: str(path) for name, path in vectors.items()}
    config = {**edit.config, "vectors": paths, "output": str(folder / "edit")}
    return EditJob(edit, folder, config, hashlib.sha256(identity.encode()).hexdigest()[:32])


def state_of(job: EditJob) -> State:
    """Return the state of an edit."""
    marker = job.folder / DONE
    if not marker.exists():
        return "new"
    return "skipped" if read_done(marker)["config"] == job.digest else "changed"


def run_edits(label: str, jobs: Sequence[EditJob], executor: Executor, redo: bool) -> Iterator[Step]:
    """Make the edits that are not finished; if one fails, the others continue."""
    steps: dict[int, Step] = {}
    with terminate_as_interrupt(), reporting(lambda: f"{label}: {len(steps)} of {len(jobs)} edits finished"):
        ended = executor.run(functools.partial(make_edit, label=label, redo=redo), jobs)
        try:
            for job, found in ended:
                if isinstance(found, Exception):
                    found = Step(label, "edit", job.edit.name, job.edit.seed, "failed", None, str(found))
                steps[id(job)] = found
                print(f"{time.strftime('%H:%M:%S')} {found.name} seed={found.seed} {found.state}", flush=True)
        except KeyboardInterrupt:
            ended.close()
    for job in jobs:
        left = Step(label, "edit", job.edit.name, job.edit.seed, "interrupted", None, "run the same command again")
        yield steps.get(id(job), left)


def make_edit(job: EditJob, worker: Worker, label: str, redo: bool) -> Step:
    """Make one edit, if it is not finished, in its own process, and mark its folder when it is done."""
    edit, state = job.edit, state_of(job)
    if state == "changed" and redo:
        number = next(n for n in range(1, 10**6) if not Path(f"{job.folder}.replaced-{n}").exists())
        job.folder.rename(f"{job.folder}.replaced-{number}")
        state = "new"
    if state == "skipped":
        done = read_done(job.folder / DONE)
        return Step(label, "edit", edit.name, edit.seed, "skipped", done["seconds"])
    if state == "changed":
        message = "made with another config or other vectors. Pass --redo to make it again, or another output."
        return Step(label, "edit", edit.name, edit.seed, "changed", None, message)
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "edit.yaml").write_text(yaml.safe_dump(dict(job.config), sort_keys=False))
    report = job.folder / "edit" / EDIT_JSON
    report.unlink(missing_ok=True)
    started = time.monotonic()
    status = run_process([*TVA_EDIT, "--config", str(job.folder / "edit.yaml")], job.folder / "edit.log", worker)
    seconds = round(time.monotonic() - started, 1)
    if status not in (0, 1) or not report.exists():
        message = f"exit status {status}; all in {job.folder / 'edit.log'}"
        return Step(label, "edit", edit.name, edit.seed, "failed", seconds, message)
    done = {"config": job.digest, "group": edit.group, "name": edit.name, "seed": edit.seed, "seconds": seconds}
    (job.folder / DONE).write_text(json.dumps(done, indent=1))
    message = "" if status == 0 else "a constraint does not hold on test data, so no weights were written"
    return Step(label, "edit", edit.name, edit.seed, "done", seconds, message)


COLUMNS = [
    words("experiment", lambda step: step.experiment),
    words("step", lambda step: step.kind),
    words("name", lambda step: step.name),
    Column("seed", lambda step: str(step.seed)),
    words("state", lambda step: step.state),
    Column("seconds", lambda step: "–" if step.seconds is None else f"{step.seconds:.0f}"),
]


def show(result: Sequence[Step]) -> None:
    """Print one row per fit and edit, and below them what there is to know."""
    console = make_console()
    print_table(console, COLUMNS, result)
    for step in result:
        if step.message and step.state != "skipped":
            print_line(console, f"{step.name} seed={step.seed} ({step.state}): {step.message}")


def finish(result: Sequence[Step]) -> bool:
    """Return whether nothing failed or has results of another config."""
    if any(step.state == "interrupted" for step in result):
        raise KeyboardInterrupt
    return not any(step.state in ("failed", "changed") for step in result)
