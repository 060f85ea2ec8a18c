"""The declared suite: experiments at several scales, each a YAML file, and the setups that they share.

A *setup* is a model, how it is fine-tuned, and data modules by task; ``mnist__fast`` is the fit of ``mnist`` with the
changes of the setup's variant ``fast``. An *experiment* is a list of edits over the tasks
of a setup, with the numbers of the paper. A *scale* is an experiment on one setup.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tva.checkpoints.foreign_yaml import read_yaml
from tva.errors import did_you_mean, some
from tva.paper.configs import fill, merge, nested
from tva.paper.quantities import check_quantity

SUITE = Path(__file__).parent / "suite"
_SETUP = {
    "about",
    "model",
    "fit",
    "edit",
    "data",
    "edit_data",
    "tasks",
    "download",
    "needs",
    "classes",
    "like",
    "variants",
}
_EXPERIMENT = {"title", "source", "edits", "scales", "rows", "effects", "needs", "figures"}
_SCALE = {"setup", "tasks", "controls", "seeds", "paper", "differs", "words", "options", "edit_data"}


@dataclass(frozen=True)
class Fit:
    """One fit that an experiment needs.

    Attributes:
        name: The setup's task.
        seed: Its ``seed_everything``.
        changes: What differs from the setup's fits, its data among it.
    """

    name: str
    seed: int
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class Edit:
    """One edit that an experiment makes.

    Attributes:
        group: The name of its template; edits of one group are averaged.
        name: Its own name.
        seed: Seed of its fits, and its ``seed_everything``.
        vectors: Names of the fits whose vectors it combines.
        config: What ``tva edit`` is given, without vectors and output.
    """

    group: str
    name: str
    seed: int
    vectors: Sequence[str]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Scale:
    """An experiment on one setup.

    Attributes:
        experiment: The experiment's name.
        name: The scale's name.
        content: The experiment's file.
        setup_name: The setup's name.
        setup: The setup's file.
    """

    experiment: str
    name: str
    content: Mapping[str, Any]
    setup_name: str
    setup: Mapping[str, Any] = field(repr=False)

    @property
    def title(self) -> str:
        """The experiment's title."""
        return self.content["title"]

    @cached_property
    def options(self) -> Mapping[str, Any]:
        """The scale's own part of the file."""
        return self.content["scales"][self.name]

    @property
    def seeds(self) -> list[int]:
        """Default seeds."""
        return list(self.options.get("seeds", [0, 1, 2]))

    @property
    def needs(self) -> list[str]:
        """Data and models it needs that do not ship with tva."""
        return [*self.content.get("needs", []), *self.setup.get("needs", [])]

    @property
    def differs(self) -> str:
        """What differs from the paper's own set-up, in one sentence."""
        return self.options.get("differs", "")

    @property
    def needs_data_root(self) -> bool:
        """Whether it needs ``data_root``, a folder with data sets or models."""
        mark = "{data_root}"
        used = [[edit.config for edit in self.edits([0], mark)], [fit.changes for fit in self.fits([0], mark)]]
        return mark in str([used, self.shared(0, mark)])

    def chosen_seeds(self, given: Sequence[int] | None) -> list[int]:
        """Return the seeds that are given, else the default ones.

        Raises:
            ValueError: A seed is given twice or is negative, or none is given.
        """
        if given is not None and (not given or len(set(given)) < len(given) or min(given) < 0):
            raise ValueError(f"seeds must be whole numbers of at least 0, each once; found {list(given)}.")
        return self.seeds if given is None else list(given)

    def edits(self, seeds: Sequence[int] | None = None, data_root: str = "") -> Iterator[Edit]:
        """Return the edits, seed by seed."""
        for seed in self.seeds if seeds is None else seeds:
            for group, template in self.content["edits"].items():
                if self.name in template.get("scales", [self.name]):
                    yield from self._expand(group, template, seed, data_root)

    def _expand(self, group: str, template: Mapping[str, Any], seed: int, data_root: str) -> Iterator[Edit]:
        lists = {"tasks": list(self.options["tasks"]), "controls": list(self.options.get("controls", []))}
        words = {f"{{{name}}}": value for name, value in lists.items()}
        words |= {"{sum}": " + ".join(lists["tasks"]), "{list}": ", ".join(lists["tasks"])}
        for variant in self.setup.get("variants", {}):
            fits = [f"{task}__{variant}" for task in lists["tasks"]]
            words |= {f"{{tasks__{variant}}}": fits, f"{{sum__{variant}}}": " + ".join(fits)}
        words |= {"{seed}": seed, "{data_root}": data_root}
        words |= {f"{{{name}}}": value for name, value in self.options.get("words", {}).items()}
        words |= {"{control}": lists["controls"][0]} if lists["controls"] else {}
        each = fill(template.get("each", {}), words)
        for values in itertools.product(*each.values()):
            own = dict(zip(each, values, strict=True))
            filled = fill(fill(template, {f"{{{key}}}": value for key, value in own.items()}), words)
            name = fill(fill(group, {f"{{{key}}}": value for key, value in own.items()}), words)
            config = {"model": self.setup["model"], **nested(self.setup.get("edit", {}))}
            config = merge(fill(config, words), nested(filled.get("options", {})))
            config = merge(config, nested(fill(self.options.get("options", {}).get(group, {}), words)))
            for role in ("targets", "controls"):
                tasks = list(filled.get(role, []))
                tasks = [task for task in tasks if role == "targets" or task not in filled["targets"]]
                if tasks:
                    over = nested({**self.setup.get("edit_data", {}), **self.options.get("edit_data", {})})
                    config[role] = {task: merge(self.data(task, seed, data_root), over) for task in tasks}
            yield Edit(group, name, seed, filled["vectors"], {"random_seed": seed} | config | {"seed_everything": seed})

    def data(self, task: str, seed: int, data_root: str) -> dict[str, Any]:
        """Return the data module of a task.

        Raises:
            ValueError: The setup has no such task.
        """
        changes, (base, _) = self._changes(task, seed, data_root), self._parts(task)
        return merge(self._filled(self.setup["data"], base, seed, data_root), changes.get("data", {}))

    def _parts(self, task: str) -> tuple[str, str]:
        """Return the task and the variant of a name such as ``mnist__ascent``.

        Raises:
            ValueError: The setup has no such variant.
        """
        base, _, variant = task.partition("__")
        variants = self.setup.get("variants", {})
        if variant and variant not in variants:
            raise ValueError(
                f"The setup {self.setup_name!r} has no variant {variant!r} (of {task!r}); it has "
                f"{some(variants, 20) or 'none'}.{did_you_mean(variant, variants)}"
            )
        return base, variant

    def _changes(self, name: str, seed: int, data_root: str) -> dict[str, Any]:
        (task, variant), tasks = self._parts(name), self.setup["tasks"]
        if task not in tasks:
            raise ValueError(
                f"The setup {self.setup_name!r} has no task {task!r}; it has {some(tasks, 20)}."
                f"{did_you_mean(task, tasks)}"
            )
        found = nested(self._filled(tasks[task] or {}, task, seed, data_root))
        other = self.setup["variants"][variant] if variant else {}
        return merge(found, nested(self._filled(other, task, seed, data_root)))

    def _filled(self, value: Any, task: str, seed: int, data_root: str) -> Any:
        return fill(value, {"{task}": task, "{seed}": seed, "{data_root}": data_root})

    def fits(self, seeds: Sequence[int] | None = None, data_root: str = "") -> list[Fit]:
        """Return the fits that the edits need, each once."""
        names: dict[tuple[str, int], None] = {}
        for edit in self.edits(seeds, data_root):
            names |= dict.fromkeys((vector, edit.seed) for vector in edit.vectors)
        return [
            Fit(name, seed, self._changes(name, seed, data_root) | {"data": self.data(name, seed, data_root)})
            for name, seed in names
        ]

    def shared(self, seed: int, data_root: str = "") -> dict[str, Any]:
        """Return what the setup's fits share, as ``tva fit-many`` takes it."""
        words = {"{seed}": seed, "{data_root}": data_root}
        below = {"model": fill(self.setup["model"], words)}
        return merge(below, nested(fill(self.setup["fit"], words)))


def list_experiments() -> list[str]:
    """Return the names of the experiments that ship with tva, sorted.

    Example:
        >>> "forgetting-images" in list_experiments()
        True
    """
    return sorted(file.stem for file in SUITE.glob("*.yaml"))


def load_experiment(name: str) -> dict[str, Scale]:
    """Return an experiment's scales by name.

    Args:
        name: One of `list_experiments`, or the path of a YAML file of one's own; its setups are then looked for in the
            folder ``setups`` beside it, and after that among those of tva.

    Raises:
        ValueError: There is none of this name, or its file is wrong.
        FileNotFoundError: There is no such file.
    """
    if name.endswith((".yaml", ".yml")):
        file = Path(name)
        if not file.is_file():
            raise FileNotFoundError(f"There is no experiment {name}; give the path of its YAML file.")
    else:
        known = list_experiments()
        if name not in known:
            raise ValueError(
                f"There is no experiment {name!r}; there are {some(known, 30)}.{did_you_mean(name, known)} "
                f"One of your own is named by the path of its YAML file."
            )
        file = SUITE / f"{name}.yaml"
    content = _read(file, _EXPERIMENT, ("title", "source", "edits", "scales", "rows"))
    for entry in [*content["rows"], *content.get("effects", [])]:
        _check_entry(str(file), entry, content["edits"])
    scales = {}
    for scale, options in content["scales"].items():
        where = f"{file}, scale {scale}"
        _check_keys(where, options, _SCALE, ("setup", "tasks"))
        for key in ("tasks", "controls"):
            if not isinstance(options.get(key, []), list):
                raise ValueError(f"{where}: {key} must be a list, as [digits, letters]; found {options[key]!r}.")
        setup = _read_setup(options["setup"], where, [file.parent, SUITE])
        scales[scale] = Scale(file.stem, scale, content, options["setup"], setup)
    return scales


def _read_setup(name: str, where: str, folders: Sequence[Path], above: Sequence[str] = ()) -> dict[str, Any]:
    if name in above:
        raise ValueError(f"{where}: setups must not be like themselves; found {' -> '.join([*above, name])}.")
    files = [folder / "setups" / f"{name}.yaml" for folder in folders]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise ValueError(f"{where}: there is no setup {name!r} at {some(files)}.")
    setup = _read(found, _SETUP, ())
    if "like" in setup:
        setup = merge(_read_setup(setup.pop("like"), str(found), folders, [*above, name]), nested(setup))
    _check_keys(str(found), setup, _SETUP, ("model", "fit", "data", "tasks"))
    return setup


def _check_entry(where: str, entry: Any, edits: Mapping[str, Any]) -> None:
    """Check that a row or an effect names edits and quantities that there are, before hours are spent on them."""
    values = [entry[key] for key in ("value", "above", "below") if key in entry] if isinstance(entry, Mapping) else []
    if not values or "value" not in entry or entry.get("edits") not in edits:
        raise ValueError(f"{where}: a row or effect must have a value, and edits of {some(edits, 9)}; found {entry!r}.")
    for value in values:
        check_quantity(value, f"{where}: ")


def find_scale(name: str, scale: str | None) -> Scale:
    """Return one scale of an experiment; by default ``small``, else the first.

    Raises:
        ValueError: The experiment has no such scale.
    """
    scales = load_experiment(name)
    if scale is None:
        return scales.get("small", next(iter(scales.values())))
    if scale not in scales:
        raise ValueError(f"{name} has no scale {scale!r}; it has {some(scales, 9)}.{did_you_mean(scale, scales)}")
    return scales[scale]


def _read(file: Path, known: set[str], needed: Sequence[str]) -> dict[str, Any]:
    content = read_yaml(file)
    _check_keys(str(file), content, known, needed)
    return content


def _check_keys(where: str, content: Any, known: set[str], needed: Sequence[str]) -> None:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must be a mapping with the keys {some(sorted(known), 20)}; found {content!r}.")
    odd = sorted(key for key in content if str(key).split(".")[0] not in known)
    missing = [key for key in needed if key not in content]
    if odd or missing:
        raise ValueError(f"{where} has unknown keys {odd} and lacks {missing}; the keys are {some(sorted(known), 20)}.")
