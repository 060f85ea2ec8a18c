"""The command ``tva paper plan``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tva.cli.commands.fit_many import check_fit
from tva.cli.commands.paper__run import make_fits
from tva.console import counted, make_console, print_line, size_text
from tva.data.presets import all_presets
from tva.paper.results import DONE, edit_folder
from tva.paper.suite import Scale, find_scale
from tva.report.table import Column, print_table, words

HELP = "list what an experiment needs, downloads, fits and edits; works offline"
ORDER = "names…"


def run(
    names: list[str],
    scale: str | None = None,
    output: str = "runs/paper",
    data_root: str | None = None,
    seeds: list[int] | None = None,
) -> list[dict[str, Any]]:
    """List what an experiment needs, downloads, fits and edits; works offline.

    Args:
        names: Experiments, or paths of YAML files of your own.
        scale: Scale of the experiments; by default ``small``.
        output: Folder in which finished fits and edits are looked for.
        data_root: Folder with data sets and models, if the setup needs one.
        seeds: Seeds; by default those of the experiment.
    """
    return [plan(find_scale(name, scale), Path(output), data_root, seeds) for name in names]


def plan(scale: Scale, output: Path, data_root: str | None, seeds: Sequence[int] | None) -> dict[str, Any]:
    """Return what running an experiment would do."""
    seeds, root = scale.chosen_seeds(seeds), data_root or "DATA_ROOT"
    fits = [check_fit(fit) for fit in make_fits(scale, output, seeds, root)]
    edits = list(scale.edits(seeds, root))
    finished = [edit for edit in edits if (edit_folder(output, scale, edit.name, edit.seed) / DONE).exists()]
    download = scale.setup.get("download", {})
    sets = sorted({task for edit in edits for role in ("targets", "controls") for task in edit.config.get(role, {})})
    read = sorted({*sets, *(name for edit in edits for name in edit.vectors)})
    named = {task: download[task] for task in read if task in download}
    return {
        "experiment": scale.experiment,
        "scale": scale.name,
        "title": scale.title,
        "source": scale.content["source"],
        "setup": scale.setup_name,
        "about": scale.setup.get("about", ""),
        "needs": scale.needs,
        "files": files_needed(scale, edits, root) if scale.needs_data_root else [],
        "model": scale.setup["model"],
        "tasks": sets,
        "download_bytes": {"model": download.get("model", 0), **named},
        "unpinned": unpinned(scale, edits),
        "seeds": list(seeds),
        "fits": {state: sum(fit.state == state for fit in fits) for state in dict.fromkeys(f.state for f in fits)},
        "edits": {"new": len(edits) - len(finished), "made": len(finished)},
        "differs": scale.differs,
    }


def unpinned(scale: Scale, edits: Sequence[Any]) -> list[str]:
    """Return what is read from the hub as it is now: data sets, and the model, of which no revision is named."""
    configs = [
        task for edit in edits for role in ("targets", "controls") for task in edit.config.get(role, {}).values()
    ]
    configs += [fit.changes["data"] for fit in scale.fits([0])]
    found: set[str] = set()
    for options in (config.get("init_args", {}) for config in configs):
        kind, _, name = str(options.get("path", "")).partition(":")
        if kind == "preset" and not options.get("local") and not options.get("revision"):
            known = all_presets().get(name)
            found |= {name} if known is None or known.revision is None else set()
    model = scale.setup["model"].get("init_args", {})
    repository = model.get("name", "") if "pretrained" not in model else ""
    return [*([repository] if "/" in repository and "{" not in repository else []), *sorted(found)]


def files_needed(scale: Scale, edits: Sequence[Any], root: str) -> list[dict[str, Any]]:
    """Return the files that must be in the data root, and whether they are."""
    found: set[str] = set()

    def collect(value: Any, key: str = "") -> None:
        if isinstance(value, Mapping):
            for name, item in value.items():
                collect(item, name)
        elif isinstance(value, (list, tuple)):
            for item in value:
                collect(item)
        elif isinstance(value, str) and value.startswith(f"{root}/"):
            parts = ("val" if key == "prompts" else "train", "test")
            splits = parts if "{split}" in value else ("",)
            found.update(value.replace("{split}", split) for split in splits)

    collect([edit.config for edit in edits])
    collect([fit.changes for fit in scale.fits(data_root=root)])
    return [{"file": file, "there": Path(file).exists()} for file in sorted(found)]


COLUMNS = [
    words("experiment", lambda row: row["experiment"]),
    words("scale", lambda row: row["scale"]),
    Column("tasks", lambda row: str(len(row["tasks"]))),
    Column("fits", lambda row: _counts(row["fits"]), False, keep=True),
    Column("edits", lambda row: _counts(row["edits"]), False, keep=True),
    Column(
        "download", lambda row: size_text(sum(row["download_bytes"].values())) if _downloads(row) else "–", keep=True
    ),
]


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {state}" for state, number in counts.items() if number) or "0"


def _downloads(row: Mapping[str, Any]) -> bool:
    return any(row["download_bytes"].values())


def show(result: Sequence[Mapping[str, Any]]) -> None:
    """Print a table, and below it what must be there."""
    console = make_console()
    print_table(console, COLUMNS, result)
    for row in result:
        print_line(console, f"{row['experiment']}, {row['scale']}: {row['title']} ({row['source']})")
        print_line(console, f"  tasks {', '.join(row['tasks'])}; seeds {', '.join(map(str, row['seeds']))}")
        if row["about"]:
            print_line(console, f"  setup {row['setup']}: {row['about']}")
        for need in row["needs"]:
            print_line(console, f"  needs {need}")
        missing = [file["file"] for file in row["files"] if not file["there"]]
        if row["files"]:
            there = len(row["files"]) - len(missing)
            print_line(console, f"  of {counted(len(row['files']), 'file')} in the data root {there} are there")
        for file in missing:
            print_line(console, f"  missing: {file}")
        if _downloads(row):
            sizes = [f"{name} {size_text(size)}" for name, size in row["download_bytes"].items() if size]
            rest = [name for name in row["unpinned"] if name in row["tasks"] and name not in row["download_bytes"]]
            others = f"; of unknown size: {', '.join(rest)}" if rest else ""
            print_line(console, f"  downloads, about: {', '.join(sizes)}{others}")
        if row["unpinned"]:
            print_line(console, f"  unpinned, as the hub has them now: {', '.join(row['unpinned'])}")
        if row["differs"]:
            print_line(console, f"  differs from the paper: {row['differs']}")
