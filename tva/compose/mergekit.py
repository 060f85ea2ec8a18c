"""Read a mergekit configuration: a YAML file that says which models to merge, as options of `compose`.

The file is foreign: it is read without aliases and tags, and what cannot be done as mergekit does it is refused, all in
one error, each with its line.
"""

import keyword
import os
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tva.checkpoints import is_hub
from tva.checkpoints.foreign_yaml import read_yaml_text
from tva.checkpoints.with_adapter import parts_of

Place = tuple[Hashable, ...]  # keys and positions from the top of the file

DTYPES = ("float64", "float32", "bfloat16", "float16")
METHODS: dict[str, tuple[str, ...]] = {  # to the parameters that each reads
    "linear": ("weight", "normalize"),
    "task_arithmetic": ("weight", "normalize", "lambda"),
    "ties": ("weight", "density", "normalize", "rescale", "lambda"),
    "dare_ties": ("weight", "density", "normalize", "rescale", "lambda"),
    "dare_linear": ("weight", "density", "normalize", "rescale", "lambda"),
    "breadcrumbs": ("weight", "density", "gamma", "normalize", "rescale", "lambda"),
    "breadcrumbs_ties": ("weight", "density", "gamma", "normalize", "rescale", "lambda"),
    "della": ("weight", "density", "epsilon", "normalize", "rescale", "lambda"),
    "della_linear": ("weight", "density", "epsilon", "normalize", "rescale", "lambda"),
    "slerp": ("t",),
    "nuslerp": ("weight", "nuslerp_flatten", "nuslerp_row_wise"),
    "model_stock": ("filter_wise",),
    "sce": ("select_topk",),
    "passthrough": ("scale",),
}
PARAMETERS = {*(name for names in METHODS.values() for name in names), "int8_mask"}
NEEDS_BASE = ("task_arithmetic", "ties", "dare", "breadcrumbs", "della", "slerp", "model_stock", "sce")
TOP = ("merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
       "tokenizer")  # fmt: skip
REFUSED = {  # keys of the file with the reason
    "modules": "models of several modules are not taken apart; give the weights of each module as a checkpoint",
    "chat_template": "the tokenizer's files are carried along as they are; set the template in them afterwards",
    "experts": "a mixture of experts is not made; this is a file of mergekit-moe",
    "gate_mode": "a mixture of experts is not made; this is a file of mergekit-moe",
    "override_architecture": "names and shapes are all that counts; leave it out",
    "residual_weight": "mergekit 0.1.5 has no such residual either; leave it out",
    "tokens": "embeddings of single tokens are not set; leave it out",
    "pad_to_multiple_of": "embeddings are not padded; leave it out",
}


@dataclass
class Scope:
    """The parameters at one place of the file.

    Attributes:
        place: Where they are.
        values: Name to setting.
    """

    place: Place
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Source:
    """One model of a slice.

    Attributes:
        model: Its path, with an adapter's after ``+``.
        place: Where it is in the file.
        parameters: Its own.
        layers: Its range of layers; None for all.
    """

    model: str
    place: Place
    parameters: Scope
    layers: tuple[int, int] | None = None


@dataclass
class OutSlice:
    """Layers of the output and the models that they are made of.

    Attributes:
        sources: The models.
        parameters: Of all of them.
        base: The base, if there is one.
    """

    sources: list[Source]
    parameters: Scope
    base: str | None


class MergekitFile:
    """A mergekit configuration, checked.

    Args:
        path: The file.

    Attributes:
        path: The file.
        method: Its ``merge_method``.
        base: The path of its ``base_model``; None without.
        slices: Layers of the output; one, of all layers, where it has ``models``.
        parameters: Those of the whole file.
        dtype: Of the output; None for the base's.
        tokenizer: The path of the model whose tokenizer it asks for, ``"base"``, ``"union"``, or None.

    Raises:
        ValueError: It is not such a file, or asks for what is not done here.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._problems: list[tuple[int, str]] = []
        self._lines: dict[Place, int] = {}
        content = self._read()
        self._check_keys(content, (), TOP)
        self.method = str(content.get("merge_method"))
        if self.method not in METHODS:
            known = ", ".join(METHODS)
            self.problem(("merge_method",), f"{self.method!r} is not a method that is done here; those are {known}")
        self.base = self._model(content["base_model"], ("base_model",)) if content.get("base_model") else None
        self.parameters = self._scope(content, ())
        self.dtype = self._dtype(content)
        self.tokenizer = self._tokenizer(content)
        self.slices = self._slices(content)
        self.raise_problems()

    # --- errors

    def problem(self, place: Place, text: str) -> None:
        """Note what cannot be done, to be raised with all else."""
        while place and place not in self._lines:
            place = place[:-1]
        key = place[-1] if place and isinstance(place[-1], str) else ""
        self._problems.append((self._lines.get(place, 1), f"{key}: {text}" if key else text))

    def raise_problems(self) -> None:
        """Raise what was noted, if anything was."""
        if self._problems:
            listed = "".join(f"\n  line {line}: {text}." for line, text in sorted(set(self._problems)))
            raise ValueError(f"{self.path} cannot be run as mergekit runs it; nothing was written.{listed}")

    # --- reading

    def _read(self) -> dict[str, Any]:
        if not self.path.is_file():
            raise FileNotFoundError(f"A mergekit configuration was expected at {self.path}; no file is there.")
        try:
            text = read_yaml_text(self.path)
            for event in yaml.parse(text, Loader=yaml.SafeLoader):
                if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                    line = event.start_mark.line + 1
                    raise ValueError(f"{self.path}, line {line}: an alias or anchor; write the value out in its place.")
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except (yaml.YAMLError, RecursionError) as error:
            shown = " ".join(str(error).split())[:300]
            raise ValueError(f"{self.path} is not a YAML file of one document: {shown}") from error
        content = self._plain(node, ())
        if not isinstance(content, dict) or "merge_method" not in content:
            raise ValueError(
                f"{self.path} is not a mergekit configuration, which has a merge_method and models or slices. Options "
                f"of tva are given by --config."
            )
        return content

    def _plain(self, node: yaml.Node | None, place: Place) -> Any:
        """Return a node as plain values, and note the lines of its keys."""
        if node is None:
            return None
        self._lines.setdefault(place, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            found: dict[str, Any] = {}
            for key, value in node.value:
                name = str(key.value)
                inner = (*place, name)
                self._lines[inner] = key.start_mark.line + 1
                if name in found:
                    self.problem(inner, "is given twice; leave one out")
                found[name] = self._plain(value, inner)
            return found
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(part, (*place, at)) for at, part in enumerate(node.value)]
        try:
            value = yaml.SafeLoader("").construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError):  # as a date that is none
            value = str(node.value)
        return value if isinstance(value, bool | int | float | str) or value is None else str(node.value)

    def _check_keys(self, content: Mapping[str, Any], place: Place, known: tuple[str, ...]) -> None:
        for key, value in content.items():
            if key in known or (key in REFUSED and value is None):
                continue
            what = f"this file has {', '.join(known)}" if not place else f"here can be {', '.join(known)}"
            self.problem((*place, key), REFUSED.get(key, f"is not known; {what}"))

    def _scope(self, content: Mapping[str, Any], place: Place) -> Scope:
        place, values = (*place, "parameters"), content.get("parameters") or {}
        if not isinstance(values, dict):
            self.problem(place, f"must be names with values; found {values!r:.60}")
            return Scope(place)
        for name in values:
            if name not in PARAMETERS:
                self.problem(
                    (*place, name), f"is not a parameter of any method here; those are {', '.join(sorted(PARAMETERS))}"
                )
        return Scope(place, values)

    def _dtype(self, content: Mapping[str, Any]) -> str | None:
        for key in ("dtype", "out_dtype"):
            value = content.get(key)
            if value is not None and str(value).removeprefix("torch.") not in DTYPES:
                self.problem((key,), f"must be one of {', '.join(DTYPES)}; found {value!r}")
        value = content.get("out_dtype") or content.get("dtype")
        return None if value is None else str(value).removeprefix("torch.")

    def _tokenizer(self, content: Mapping[str, Any]) -> str | None:
        source, place = content.get("tokenizer_source"), ("tokenizer_source",)
        tokenizer = content.get("tokenizer")
        if isinstance(tokenizer, dict):
            self._check_keys(tokenizer, ("tokenizer",), ("source",))
            source, place = tokenizer.get("source", source), ("tokenizer", "source")
        elif tokenizer is not None:
            self.problem(("tokenizer",), f"must have a source; found {tokenizer!r:.60}")
        if source in (None, "base", "union"):
            return source
        return self._model(source, place)

    def _slices(self, content: Mapping[str, Any]) -> list[OutSlice]:
        models, slices = content.get("models"), content.get("slices")
        if bool(models) == bool(slices):
            key = "slices" if slices else "merge_method"
            self.problem((key,), "a configuration has either models or slices")
            return []
        if models:
            return [self._out_slice({"sources": models}, ("models",), ("models",), True)]
        if not isinstance(slices, list):
            self.problem(("slices",), "must be a list")
            return []
        return [
            self._out_slice(part, ("slices", at), ("slices", at, "sources"), False) for at, part in enumerate(slices)
        ]

    def _out_slice(self, content: Any, place: Place, sources: Place, whole: bool) -> OutSlice:
        if not isinstance(content, dict) or not isinstance(content.get("sources"), list):
            self.problem(place, "must have a list of models")
            return OutSlice([], Scope(place), self.base)
        if not whole:
            self._check_keys(content, place, ("sources", "base_model", "parameters"))
        base = self._model(content["base_model"], (*place, "base_model")) if content.get("base_model") else self.base
        found = [self._source(part, (*sources, at), whole) for at, part in enumerate(content["sources"])]
        scope = Scope(place) if whole else self._scope(content, place)
        models = [source.model for source in found]
        for at, source in enumerate(found):
            if source.model in models[:at]:
                self.problem(source.place, f"{source.model} is given twice; give its weights once")
        if whole and base is not None and base not in models and self.method in METHODS:
            found.append(Source(base, ("base_model",), Scope(("base_model",))))
        return OutSlice(found, scope, base)

    def _source(self, content: Any, place: Place, whole: bool) -> Source:
        if not isinstance(content, dict) or not content.get("model"):
            self.problem(place, "must have a model")
            return Source("", place, Scope(place))
        self._check_keys(content, place, ("model", "parameters") if whole else ("model", "layer_range", "parameters"))
        layers = None
        if not whole:
            layers = content.get("layer_range")
            numbers = isinstance(layers, list) and len(layers) == 2 and all(type(part) is int for part in layers)
            if not numbers or not 0 <= layers[0] < layers[1]:
                self.problem((*place, "layer_range"), f"must be [first, last + 1]; found {layers!r}")
                layers = [0, 1]
        model = self._model(content["model"], (*place, "model"))
        return Source(model, place, self._scope(content, place), tuple(layers) if layers else None)

    def _model(self, value: Any, place: Place) -> str:
        if isinstance(value, dict):
            self._check_keys(value, place, ("model", "lora", "path", "revision"))
            if "path" in value:
                return self._path(str(value["path"]), value.get("revision"))
            parts = [value.get("model"), value.get("lora")]
            return "+".join(self._model(part, place) for part in parts if part is not None)
        if not isinstance(value, str):
            self.problem(place, f"must be a model; found {value!r:.60}")
            return ""
        if Path(value).expanduser().exists():
            return value
        parts = value.split("+")
        if len(parts) > 2:
            self.problem(place, f"a model has one adapter at most; found {value!r}")
        return "+".join(self._path(*part.split("@", 1)) for part in parts)

    def _path(self, path: str, revision: str | None = None) -> str:
        there = is_hub(path) or Path(path).expanduser().exists() or re.fullmatch(r"\w[\w.-]*/[\w.-]+", path) is None
        name = path if there else f"hf://{path}"
        return f"{name}@{revision}" if revision else name


def is_mergekit(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is a mergekit configuration rather than options of tva."""
    if not Path(path).is_file():  # a pipe would be waited for
        return False
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return re.search(r"^merge_method\s*:", text, re.MULTILINE) is not None


def walk(setting: Any) -> Iterator[Any]:
    """Yield the single values of a setting."""
    if isinstance(setting, list):
        for part in setting:
            yield from walk(part)
    elif isinstance(setting, dict):
        yield from walk(setting.get("value"))
    else:
        yield setting


def short_names(models: Sequence[str]) -> dict[str, str]:
    """Return short names for models, to their paths; the first is the base."""
    found: dict[str, str] = {}
    for path in dict.fromkeys(models):
        last = "_".join(part.rstrip("/").rpartition("/")[2].partition("@")[0] for part in parts_of(path))
        name = re.sub(r"\W+", "_", last, flags=re.ASCII).strip("_").lower()
        name = f"m_{name}" if not name or not name[0].isalpha() or keyword.iskeyword(name) or name == "base" else name
        taken, number = name, 2
        while taken in found or re.fullmatch(r"slot\d+", taken):
            taken, number = f"{name}_{number}", number + 1
        found[taken if found else "base"] = path
    return found
