"""The ledger of results: one JSON file a benchmark in docs/results/data, and the tables that are made of it.

A benchmark is a module of this folder that has

- ``measure(seed, **options)``, which returns the raw values of one seed, as JSON has them;
- ``OPTIONS``, the options and their defaults; a value's type is that of its default;
- ``tables(runs)``, which returns Markdown by name from the values by seed (a line is put into a sentence);
- ``DEPENDS``, the paths, from the repository's root, of the code that the values depend on;
- ``PARTS``, if it is measured in parts: the options that name one. Each part has a file and tables of its own, named
  ``NAME-VALUE-…``, and ``joined(parts)`` makes the tables of all whose names fit a pattern, such as ``NAME-*-8``.

In README.md and docs/results a table stands between ``<!-- ledger: NAME/TABLE -->`` and ``<!-- end -->``. In every one
``[a, b]`` is a 95% interval and ``(a–b)`` the lowest and highest value.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import functools
import importlib
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "docs" / "results" / "data"
_SEEDS = re.compile(r"--seeds(?: \d+)+")
MARKED = re.compile(r"<!-- ledger: ([\w*-]+)/([\w-]+) -->(.*?)<!-- end -->", re.S)
PACKAGES = ("torch", "lightning", "timm", "transformers", "peft", "numpy", "scipy")
NO_VALUES = [f":!tva/{path}" for path in ("edit/play", "edit/push.py", "edit/space.py", "data/check.py")]  # show, send
DIGITS = 6  # significant digits that are kept of a value


def pages() -> list[Path]:
    """Return the pages whose numbers come from the ledger."""
    return [ROOT / "README.md", *sorted((ROOT / "docs" / "results").glob("*.md"))]


def benchmark(name: str) -> Any:
    """Import a benchmark, of its name or that of one of its parts.

    Raises:
        ValueError: There is none of that name.
    """
    name = name.split("-")[0]
    known = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if "\nDEPENDS = " in path.read_text())
    if name not in known:
        raise ValueError(f"There is no benchmark {name!r} in the ledger; there are {', '.join(known)}.")
    return importlib.import_module(f"benchmarks.{name}")


# --- running


def run(name: str, seeds: Sequence[int], options: Mapping[str, Any], command: str, data: Path = DATA) -> dict[str, Any]:
    """Measure some seeds, and write each into the benchmark's file when it is done.

    Seeds that the file has and that are not measured now stay, with how they were made.

    Args:
        name: The benchmark's.
        seeds: To measure, one after another.
        options: That differ from the defaults.
        command: What was called, for the record.
        data: Folder of the files.

    Raises:
        ValueError: An option is not one of the benchmark's.
    """
    module = benchmark(name)
    unknown = sorted(options.keys() - module.OPTIONS.keys())
    if unknown:
        raise ValueError(f"{name} has no option {', '.join(unknown)}; its options are {', '.join(module.OPTIONS)}.")
    part = [str({**module.OPTIONS, **options}[key]) for key in getattr(module, "PARTS", ())]
    file = data / f"{'-'.join([name, *part])}.json"
    made, written = {"command": _anywhere(command), "seeds": [], **_here()}, None
    for seed in seeds:
        started = time.monotonic()
        values = _rounded(module.measure(seed, **{**module.OPTIONS, **options}))
        how = values.pop("made", {})  # of a benchmark that only reads what was run before
        seconds = how.pop("seconds", round(time.monotonic() - started))
        with _turn(file):  # other seeds may be measured at the same time
            entry = _read(file) if file.exists() else {"made": [], "seeds": {}}
            others = [earlier for earlier in entry["made"] if earlier != written]
            for earlier in others:
                earlier["seeds"] = [other for other in earlier["seeds"] if other != seed]
            made |= how
            made["seeds"].append(seed)
            made["seconds"] = [*made.get("seconds", []), seconds]
            written = json.loads(json.dumps(made))
            entry["made"] = [*(earlier for earlier in others if earlier["seeds"]), written]
            entry["seeds"] = dict(sorted({**entry["seeds"], str(seed): values}.items(), key=lambda pair: int(pair[0])))
            write(entry, file)
    return entry


@contextlib.contextmanager
def _turn(file: Path) -> Iterator[None]:
    """Wait until no other process changes a file of the ledger."""
    file.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _anywhere(command: str) -> str:
    """Return a command without the folders of this machine: what is absolute becomes its name in capitals.

    Example:
        >>> _anywhere("python -m benchmarks run methods --seeds 0 --data /somewhere/data")
        'python -m benchmarks run methods --seeds 0 --data DATA'
    """
    return re.sub(r"(?<= )/\S*?([\w.-]+)(?= |$)", lambda path: path[1].upper(), command)


def write(entry: Mapping[str, Any], file: Path) -> None:
    """Write an entry: how it was made, its seeds, and one line a value, with those of all seeds side by side."""
    found = _side_by_side(list(entry["seeds"].values()))
    seeds = _compact([int(seed) for seed in entry["seeds"]])
    if isinstance(found, list):  # older seeds have other keys, until they are measured again
        values = f"{_compact(found)}}}\n"
    else:
        lines = [f"{json.dumps(key)}:{_compact(values)}" for key, values in found.items()]
        values = "{\n" + ",\n".join(lines) + "\n}}\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'{{"made":{_compact(entry["made"])},\n"seeds":{seeds},\n"values":{values}')


def _read(file: Path) -> dict[str, Any]:
    """Return an entry as `write` got it."""
    found = json.loads(file.read_text())
    seeds = {str(seed): _of_seed(found["values"], place) for place, seed in enumerate(found["seeds"])}
    return {"made": found["made"], "seeds": seeds}


def _side_by_side(values: Sequence[Any]) -> Any:
    """Return the values of seeds as one: mappings of the same keys as a mapping, everything else as a list.

    Example:
        >>> _side_by_side([{"a": 1, "b": {"c": [2]}}, {"a": 3, "b": {"c": [4]}}])
        {'a': [1, 3], 'b': {'c': [[2], [4]]}}
    """
    first = values[0]
    if all(isinstance(each, Mapping) and each.keys() == first.keys() for each in values):
        return {key: _side_by_side([each[key] for each in values]) for key in first}
    return list(values)


def _of_seed(found: Any, place: int) -> Any:
    if isinstance(found, Mapping):
        return {key: _of_seed(value, place) for key, value in found.items()}
    return found[place]


def _compact(values: Any) -> str:
    return json.dumps(values, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _rounded(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {str(key): _rounded(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_rounded(value) for value in values]
    return float(f"{values:.{DIGITS}g}") if isinstance(values, float) else values


def _here() -> dict[str, Any]:
    """Return commit, versions, machine and date."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    commit = _git("rev-parse", "--short=7", "HEAD") or "unknown"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs", ":!README.md")
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return {
        "commit": commit + (" with changes" if changed else ""),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}{load}",
        "versions": {"python": platform.python_version(), **found},
    }


def _git(*words: str) -> str | None:
    try:
        found = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


# --- tables


def load(name: str, data: Path = DATA) -> dict[str, Any]:
    """Read a benchmark's file.

    Raises:
        FileNotFoundError: It has not been run.
    """
    file = data / f"{name}.json"
    if not file.exists():
        raise FileNotFoundError(f"The ledger has no {name}: run python -m benchmarks run {name} --seeds …")
    return _read(file)


def rendered(name: str, data: Path = DATA) -> dict[str, str]:
    """Return the tables of a benchmark by name, and as ``made`` how its values were measured."""
    if name == "ledger":
        return {"entries": ", ".join(f"[{file.stem}](data/{file.name})" for file in sorted(data.glob("*.json")))}
    parts = sorted(file.stem for file in data.glob(f"{name}.json")) if "*" in name else [name]
    entries = {part: load(part, data) for part in parts}
    runs = {part: {int(seed): found for seed, found in entry["seeds"].items()} for part, entry in entries.items()}
    made = [_made(one) for entry in entries.values() for one in _joined(entry["made"])]
    module = benchmark(name)
    return {**(module.joined(runs) if "*" in name else module.tables(runs[name])), "made": "; ".join(made)}


def _joined(made: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Join runs of the same command, commit, day and versions that differ in their seeds only."""
    found: dict[str, dict[str, Any]] = {}
    for each in made:
        command = _SEEDS.sub("--seeds", each["command"])
        machine, _, load = each["machine"].partition(", load ")
        same = json.dumps([command, machine, {k: v for k, v in each.items() if k in ("commit", "date", "versions")}])
        one = found.setdefault(same, {**each, "machine": machine, "seeds": [], "seconds": [], "loads": []})
        one["seeds"] = sorted({*one["seeds"], *each["seeds"]})
        one["seconds"] = [*one["seconds"], *each["seconds"]]
        one["loads"] += [float(number) for number in load.split()[:1]]
    for one in found.values():
        one["command"] = _SEEDS.sub(f"--seeds {' '.join(map(str, one['seeds']))}", one["command"])
        if loads := one.pop("loads"):
            loads = sorted({min(loads), max(loads)})
            one["machine"] += f", load {' to '.join(map(str, loads))} at the start"
    return list(found.values())


def _made(made: Mapping[str, Any]) -> str:
    torch = made["versions"].get("torch")
    seeds, total = ", ".join(map(str, made["seeds"])), sum(made["seconds"])
    command = _anywhere(made["command"])
    return (
        f"`{command}` (seed{'s' if len(made['seeds']) > 1 else ''} {seeds}; commit {made['commit']}, "
        f"{made['date']}, {made['machine']}{f', torch {torch}' if torch else ''}, {total:,} s)"
    )


def rewrite(text: str, data: Path = DATA) -> str:
    """Return a page with its tables as the ledger gives them.

    Raises:
        ValueError: A marker names a table that there is not.
    """

    def table(match: re.Match[str]) -> str:
        name, key, _ = match.groups()
        found = rendered(name, data)
        if key not in found:
            raise ValueError(f"{name} makes no table {key!r}; it makes {', '.join(found)}.")
        body = f"\n\n{found[key]}\n\n" if "\n" in found[key] else found[key]
        return f"<!-- ledger: {name}/{key} -->{body}<!-- end -->"

    return MARKED.sub(table, text)


def unmarked(text: str) -> Iterator[str]:
    """Yield the headings of a page whose tables have numbers that are neither of the ledger nor said to be older."""
    for section in re.split(r"^(?=#)", MARKED.sub("", text), flags=re.M):
        rows = [line for line in section.splitlines() if line.startswith("|")]
        if (
            any(re.search(r"\d", row) for row in rows)
            and "older than the ledger" not in re.sub(r"[\[\]]", "", section).lower()
        ):
            yield section.splitlines()[0]


def older(data: Path = DATA) -> Iterator[str]:
    """Yield what is older than the code that it depends on, by git's history; nothing without git.

    Comments, docstrings and the texts of errors are not code: a result is not older for other words.
    """
    if _git("rev-parse", "HEAD") is None:
        return
    for file in sorted(data.glob("*.json")):
        depends = benchmark(file.stem).DEPENDS
        for made in load(file.stem, data)["made"]:
            commit, what = made["commit"].split()[0], f"{file.stem} (seeds {', '.join(map(str, made['seeds']))})"
            names = _git("diff", "--name-only", commit, "HEAD", "--", *depends, *NO_VALUES)
            if names is None:
                yield f"{what}: commit {commit} is not in this history"
                continue
            changed = [name for name in names.splitlines() if code_of(commit, name) != code_of("HEAD", name)]
            if changed:
                others = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
                yield f"{what}: since {commit}, {', '.join(changed[:3])}{others} changed"


@functools.cache
def code_of(commit: str, name: str) -> str | None:
    """Return a file of a commit without what is for people only; None where there is none."""
    if not name.endswith((".py", ".yaml")):
        return _git("rev-parse", f"{commit}:{name}")
    text = _git("show", f"{commit}:{name}")
    if text is None:
        return None
    return repr(yaml.safe_load(text)) if name.endswith(".yaml") else ast.dump(_WithoutWords().visit(ast.parse(text)))


class _WithoutWords(ast.NodeTransformer):
    """Removes docstrings, imports from the future, and what is raised but for its class."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom | None:
        return None if node.module == "__future__" else node

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node

    def visit_Raise(self, node: ast.Raise) -> ast.Raise:
        return ast.Raise(node.exc.func) if isinstance(node.exc, ast.Call) else node


# --- numbers


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows))


def over_seeds(values: Sequence[float], num_examples: int | None = None) -> tuple[float, float] | None:
    r"""Compute the 95% interval of the mean over seeds.

    Args:
        values: One a seed; of a share of ``num_examples`` test examples, in [0, 1].
        num_examples: Test examples, which are the same in every seed. They add the variance :math:`p (1 - p) / n` to
            that between seeds, at most: of examples that every seed answers alike.

    Returns:
        Student's interval, with seeds - 1 degrees of freedom, or as many as Satterthwaite's formula gives where the
        examples add to the variance; None for one seed.

    Source: Satterthwaite, "An approximate distribution of estimates of variance components", Biometrics 1946.
    """
    from scipy import stats

    if len(values) < 2:
        return None
    mean, between = statistics.fmean(values), statistics.variance(values) / len(values)
    examples = mean * (1 - mean) / num_examples if num_examples else 0.0
    if between + examples == 0:
        return mean, mean
    freedom = (len(values) - 1) * ((between + examples) / between) ** 2 if between else math.inf
    half = float(stats.t.ppf(0.975, freedom)) * math.sqrt(between + examples)
    return mean - half, mean + half


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values of several tests so that one is below 5% by chance in at most 5% of such tables.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 1979.

    Example:
        >>> [round(p_value, 3) for p_value in holm([0.04, 0.01, 0.03])]
        [0.06, 0.03, 0.06]
    """
    order, corrected, largest = sorted(range(len(p_values)), key=p_values.__getitem__), [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def with_interval(values: Sequence[float], num_examples: int | None = None, form: Callable[[float], str] = str) -> str:
    """Format a mean over seeds, with its interval where there is one.

    Example:
        >>> with_interval([0.5, 0.6, 0.7], form="{:.2f}".format), with_interval([0.5], form="{:.2f}".format)
        ('0.60 [0.35, 0.85]', '0.50')
    """
    if not values:
        return "–"
    mean, found = statistics.fmean(values), over_seeds(values, num_examples)
    if found is None:
        return form(mean)
    low, high = (min(1.0, max(0.0, end)) if num_examples else end for end in found)
    return f"{form(mean)} [{form(low)}, {form(high)}]"


def plus_minus(values: Sequence[float], form: str) -> str:
    """Format a mean over seeds with half the width of its interval.

    Example:
        >>> plus_minus([0.5, 0.6, 0.7], "{:.2f}"), plus_minus([0.5], "{:.2f}")
        ('0.60 ± 0.25', '0.50')
    """
    mean, found = form.format(statistics.fmean(values)), over_seeds(values)
    return f"{mean} ± {form.replace('+', '').format((found[1] - found[0]) / 2)}" if found else mean
