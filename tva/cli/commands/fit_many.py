"""Fine-tune on many tasks: one ``tva fit`` a task and seed, each in a process and folder of its own."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from tva.checkpoints import open_weights
from tva.checkpoints.foreign import read_json
from tva.checkpoints.foreign_yaml import read_yaml
from tva.cli.configs import load_yaml
from tva.cli.processes import only_one, run_process, terminate_as_interrupt
from tva.console import make_console, print_line, reporting
from tva.errors import some
from tva.executors import Executor, Worker, make_executor
from tva.paper.configs import fill, merge, nested
from tva.report.table import Column, print_table, words
from tva.vectors.header import read_origin

TVA_FIT = (sys.executable, "-m", "tva", "fit")
DONE = "done.json"
DONE_FORM = {"config": str, "vector": (str, None), "seconds": float, "metric": ([(str, float)], None)}
CONFIG = "fit.yaml"

State = Literal["new", "interrupted", "changed", "skipped", "done", "failed"]


@dataclass(frozen=True)
class Fit:
    """One fit of the list.

    Attributes:
        task: Its task.
        seed: Its ``seed_everything``.
        folder: ``OUTPUT/TASK/seed=SEED``; everything it writes is there.
        config: What ``tva fit`` is given.
    """

    task: str
    seed: int
    folder: Path
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """For the screen."""
        return f"{self.task} seed={self.seed}"

    @property
    def digest(self) -> str:
        """Identify the config."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True, default=str).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Result:
    """What became of a fit.

    Attributes:
        fit: The fit.
        state: ``done``; ``skipped`` (done before); ``failed``; ``changed`` (there are results of another config);
            ``interrupted``; ``new``.
        seconds: Of the run that finished it.
        metric: Name and value, as the vector's header has them.
        vector: Its task vector.
        message: What to know or to do.
    """

    fit: Fit
    state: State
    seconds: float | None = None
    metric: tuple[str, float] | None = None
    vector: Path | None = None
    message: str = ""


def fit_many(
    tasks: list[str] | dict | str,  # plain dict, of which jsonargparse makes no classes
    shared: dict,
    output: str,
    changes: dict | None = None,
    seeds: list[int] = [0],  # noqa: B006 (never changed; jsonargparse shows it)
    jobs: int | None = None,
    devices: str | int | None = None,
    engine: str = "local",
    per_fit: dict[str, Any] | None = None,
    redo: bool = False,
    plan: bool = False,
) -> list[Result]:
    """Fine-tune on many tasks, each in its own process; finished fits are skipped.

    Args:
        tasks: List of names; or mapping from names to options that differ from ``shared``, keys with dots allowed
            (``cars: {trainer.max_steps: 3000}``); or ``preset:8``, ``preset:14``, ``preset:20``.
        shared: Options of ``tva fit`` for all tasks; ``{task}`` and ``{seed}`` in them are replaced.
        output: Folder; each fit writes into ``OUTPUT/TASK/seed=SEED``.
        changes: Options that override ``shared``, keys with dots allowed; ``--shared.trainer.max_steps 9`` sets one of
            them.
        seeds: Seeds; each task is fitted with each of them.
        jobs: Number of fits at a time; by default one per device, or one without devices.
        devices: GPUs to use, such as ``0,1``, or ``0+1,2+3`` for two per fit; by default all. ``cpu`` uses none.
        engine: ``local``: processes on this machine. ``ray``: a Ray cluster started on this machine. ``ray:ADDRESS``: a
            running cluster (``ray:auto`` on one of its nodes), whose nodes see ``output`` and the data under the same
            paths. If a node fails, its fits continue on another one.
        per_fit: Resources that Ray reserves for each fit: ``cpus``, ``gpus``, and ``memory`` such as ``8GiB``; by
            default one core.
        redo: Repeat fits that were made with another configuration; the old folder is kept under another name.
        plan: Only report what would be done.
    """
    fits = make_fits(tasks, merge(shared, nested(changes or {})), output, seeds)
    if plan:
        return [check_fit(fit) for fit in fits]
    executor = make_executor(engine, jobs, devices, per_fit or {})
    with only_one(Path(output), "fit-many"):
        at_a_time = f"{executor.num_workers} at a time" if executor.num_workers else f"on {engine}"
        print(f"{len(fits)} fits, {at_a_time}; each one's output is in fit.log in its folder", flush=True)
        return run_fits(fits, executor, redo=redo)


# --- what to fit


def make_fits(
    tasks: Sequence[str] | Mapping[str, Any] | str, shared: Mapping[str, Any], output: str, seeds: Sequence[int]
) -> list[Fit]:
    """Make each fit's config.

    Raises:
        ValueError: A task or seed is named twice, or a config sets what belongs to the list.

    Example:
        >>> fit = make_fits(["a"], {"data": {"path": "builtin:{task}"}}, "runs", [3])[0]
        >>> fit.config["data"], str(fit.folder), fit.config["seed_everything"]
        ({'path': 'builtin:a'}, 'runs/a/seed=3', 3)
    """
    if isinstance(tasks, str):
        tasks = _named_list(tasks)
    changes = {str(task): {} for task in tasks} if not isinstance(tasks, Mapping) else {**tasks}
    if not changes or len(changes) != len(tasks) or not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"tasks and seeds must be given, each once; found tasks {some(tasks, 9)} and seeds {seeds}.")
    fits = []
    for task, change in changes.items():
        odd = change is not None and not isinstance(change, Mapping)
        if odd or "/" in str(task):
            raise ValueError(
                f"Under tasks stand names without '/', each with options of tva fit; found {task}: {change}."
            )
        for seed in seeds:
            config = fill(merge(shared, nested(change or {})), {"{task}": str(task), "{seed}": str(seed)})
            trainer = config.setdefault("trainer", {})
            if "seed_everything" in config or "default_root_dir" in trainer:
                raise ValueError(
                    f"{task}: seed_everything and trainer.default_root_dir follow from seeds and output. Leave them "
                    f"out of shared and tasks."
                )
            folder = Path(output) / str(task) / f"seed={seed}"
            config["seed_everything"], trainer["default_root_dir"] = seed, str(folder)
            fits.append(Fit(str(task), seed, folder, config))
    return fits


def _named_list(name: str) -> list[str]:
    from tva.data.presets import list_presets

    size = name.removeprefix("preset:")
    if size == name or not size.isdecimal():
        raise ValueError(f"tasks must be names, or preset:8, preset:14 or preset:20; found {name!r}.")
    return list_presets(int(size))


# --- what is there


def check_fit(fit: Fit) -> Result:
    """See how far a fit has come."""
    marker = fit.folder / DONE
    if marker.exists():
        done = read_json(marker, DONE_FORM)
        if done.get("config") == fit.digest:
            vector, metric = done.get("vector"), done.get("metric")
            place = vector and fit.folder / vector
            return Result(fit, "skipped", done.get("seconds"), metric and tuple(metric), place)
    checkpoint = find_checkpoint(fit.folder)
    if not marker.exists() and checkpoint is None:
        return Result(fit, "new")
    file = fit.folder / CONFIG
    before = read_yaml(file) if file.exists() else None
    if before == fit.config and not marker.exists():
        return Result(fit, "interrupted", message=f"resumes from {checkpoint}")
    changes = _differences(before, fit.config) if before else ["its config is unknown"]
    shown = "; ".join(changes[:3]) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")
    return Result(fit, "changed", message=f"{shown}. Pass --redo to fit it again, or another output.")


def find_checkpoint(folder: Path) -> Path | None:
    """Find the newest ``last.ckpt``, from which a fit can go on."""
    found = [file for file in folder.rglob("last.ckpt") if file.exists()]
    return max(found, key=lambda file: file.stat().st_mtime, default=None)


def find_vector(folder: Path) -> Path | None:
    """Find the task vector of a fit: the newer of ``last`` and ``final``, else the newest."""
    found = list(folder.rglob("*.tv.safetensors"))
    return max(found, key=lambda file: (file.name.startswith(("last.", "final.")), file.stat().st_mtime), default=None)


def _differences(before: Any, after: Any, prefix: str = "") -> list[str]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        keys = [*after, *(key for key in before if key not in after)]
        return [line for key in keys for line in _differences(before.get(key), after.get(key), f"{prefix}.{key}")]
    return [] if before == after else [f"{prefix.lstrip('.')}: {before} -> {after}"]


def _metric(vector: Path | None) -> tuple[str, float] | None:
    metrics = read_origin(open_weights(vector))[0].metrics if vector else {}
    names = sorted(metrics, key=lambda name: (not name.startswith("val"), "accuracy" not in name, name))
    return (names[0], metrics[names[0]]) if names else None


# --- fitting


def run_fits(
    fits: Sequence[Fit], executor: Executor, command: Sequence[str] = TVA_FIT, redo: bool = False
) -> list[Result]:
    """Fit what is not finished; a fit that fails stops no other.

    On Ctrl-C or SIGTERM every process is asked to end, then ended; the rest is not begun.

    Args:
        fits: In the order in which they are begun.
        executor: Where they run.
        command: What to run; ``--config PATH`` follows, and ``--ckpt_path PATH`` where a fit goes on.
        redo: As in `fit_many`.

    Returns:
        What became of each, in their order.
    """
    results: dict[Path, Result] = {}
    begun = time.time()
    with terminate_as_interrupt(), reporting(lambda: _running(fits, results)):
        ended = executor.run(functools.partial(run_fit, command=command, redo=redo), fits)
        try:
            for fit, found in ended:
                if isinstance(found, Exception):
                    found = Result(fit, "failed", message=f"{type(found).__name__}: {found}")
                results[fit.folder] = found
                if found.state in ("done", "failed"):
                    running = some([one.name for one in fits if one.folder not in results and _at_work(one, begun)])
                    count = f"{len(results)} of {len(fits)}{f'; running: {running}' if running else ''}"
                    _say(f"{fit.name} {found.state} after {found.seconds or 0:.0f} s, {count}")
        except KeyboardInterrupt:
            _say(f"interrupted with {len(results)} of {len(fits)} ended; ending the others")
            ended.close()
            left = [fit for fit in fits if fit.folder not in results and (fit.folder / "fit.log").exists()]
            more = "the same command resumes it"
            results |= {fit.folder: Result(fit, "interrupted", message=more) for fit in left}
    return [results.get(fit.folder) or check_fit(fit) for fit in fits]


def _running(fits: Sequence[Fit], results: Collection[Path]) -> str:
    running = [fit for fit in fits if fit.folder not in results and (fit.folder / "fit.log").exists()]
    steps = {fit.name: _last_step(fit.folder / "fit.log") for fit in running if not (fit.folder / DONE).exists()}
    shown = ", ".join(f"{name}{f' at {step}' if step else ''}" for name, step in list(steps.items())[:4])
    more = f" and {len(steps) - 4} more" if len(steps) > 4 else ""
    return f"{len(results)} of {len(fits)} ended" + (f"; running: {shown}{more}" if shown else "")


def _last_step(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 20_000))
        found = re.findall(r"step [\d,]+ of [\d,]*\d", file.read().decode(errors="replace"))
    return found[-1] if found else ""


def _at_work(fit: Fit, since: float) -> bool:
    """Return whether a fit has begun in this run, on whichever node: its log has been written to since."""
    log = fit.folder / "fit.log"
    return log.exists() and log.stat().st_mtime >= since and not (fit.folder / DONE).exists()


def run_fit(fit: Fit, worker: Worker, command: Sequence[str] = TVA_FIT, redo: bool = False) -> Result:
    """Fit once, if need be, in a process of its own, and mark the folder when it is done."""
    before = check_fit(fit)
    if before.state == "changed" and redo:
        number = next(n for n in range(1, 10**6) if not Path(f"{fit.folder}.replaced-{n}").exists())
        os.rename(fit.folder, f"{fit.folder}.replaced-{number}")
        before = check_fit(fit)
    if before.state in ("skipped", "changed"):
        return before
    fit.folder.mkdir(parents=True, exist_ok=True)
    _write(fit.folder / CONFIG, yaml.safe_dump(fit.config, sort_keys=False))
    words = [*command, "--config", str(fit.folder / CONFIG)]
    if before.state == "interrupted":
        words += ["--ckpt_path", str(find_checkpoint(fit.folder))]
    _say(f"{fit.name} {'resumes' if before.state == 'interrupted' else 'begins'} on {worker.name}")
    started = time.monotonic()
    status = run_process(words, fit.folder / "fit.log", worker)
    seconds = time.monotonic() - started
    return _failed(fit, status, seconds) if status else _done(fit, seconds)


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _failed(fit: Fit, status: int, seconds: float) -> Result:
    lines = (fit.folder / "fit.log").read_text(errors="replace").split("\n")
    lines = [line.strip() for line in lines if line.strip()]
    last = ([line for line in lines if re.search(r"error\b", line, re.IGNORECASE)] or lines)[-1:]
    message = f"exit status {status}: {last[0][:300] if last else 'no output'} (all in {fit.folder / 'fit.log'})"
    return Result(fit, "failed", seconds, message=message)


def _done(fit: Fit, seconds: float) -> Result:
    vector = find_vector(fit.folder)
    metric = _metric(vector)
    done = {
        "config": fit.digest,
        "seconds": round(seconds, 1),
        "metric": metric,
        "vector": vector and str(vector.relative_to(fit.folder)),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    _write(fit.folder / DONE, json.dumps(done, indent=1))
    message = "" if vector else "no task vector; give trainer.callbacks a TaskVectorCallback with at_train_end"
    return Result(fit, "done", seconds, metric, vector, message)


def _write(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(text)
    os.replace(part, path)


# --- the command


HELP = "fine-tune on many tasks, each in its own process; skips finished fits and resumes interrupted ones"
run = fit_many
COLUMNS = [
    words("task", lambda result: result.fit.task),
    words("seed", lambda result: result.fit.seed),
    words("state", lambda result: result.state),
    Column("seconds", lambda result: "–" if result.seconds is None else f"{result.seconds:.0f}"),
    words("metric", lambda result: result.metric and f"{result.metric[0]} {result.metric[1]:.4f}"),
    words("vector", lambda result: result.vector),
]


def read_words(words: Sequence[str]) -> list[str]:
    """Collect ``--shared.KEY VALUE`` in ``--changes``.

    jsonargparse would put ``--shared.trainer.max_steps`` in place of the whole of ``shared.trainer``.
    """
    words, changes = list(words), {}
    while (at := next((at for at, word in enumerate(words) if word.startswith("--shared.")), None)) is not None:
        key, equals, value = words.pop(at).removeprefix("--shared.").partition("=")
        if not equals and at == len(words):
            raise ValueError(f"--shared.{key} must be followed by a value.")
        text = value if equals else words.pop(at)
        try:
            changes[key] = load_yaml(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--shared.{key} must be a value of YAML: {error}.") from error
    return [*words, "--changes", json.dumps(changes)] if changes else words


def show(results: Sequence[Result]) -> None:
    """Print a table, and below it what there is to know about each fit."""
    console = make_console()
    print_table(console, COLUMNS, results)
    for result in results:
        if result.message:
            print_line(console, f"{result.fit.task} seed={result.fit.seed} ({result.state}): {result.message}")


def to_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return plain values."""
    return [
        {
            "task": result.fit.task,
            "seed": result.fit.seed,
            "folder": result.fit.folder,
            **vars(result),
            "fit": result.fit.digest,
        }
        for result in results
    ]


def finish(results: Sequence[Result], plan: bool = False) -> bool:
    """Return whether no fit failed or has results of another config."""
    if not plan and any(result.state == "interrupted" for result in results):
        raise KeyboardInterrupt
    return not any(result.state in ("failed", "changed") for result in results)
