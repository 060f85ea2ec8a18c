"""Turn a mergekit configuration into the options of `compose`: base, vectors, recipe, coefficients by group, slices.

Formulas are those of mergekit 0.1.5: https://github.com/arcee-ai/mergekit
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tva.checkpoints import LazyWeights, find, model_folder
from tva.checkpoints.tokenizers import token_ids
from tva.checkpoints.with_adapter import open_model, parts_of
from tva.compose.mergekit import METHODS, NEEDS_BASE, MergekitFile, OutSlice, Scope, Source, short_names
from tva.compose.mergekit_values import Coefficients, Parameters, Tensor, Values, combine, differing
from tva.compose.slices import is_before, layers_in
from tva.compose.syntax import BASE
from tva.layers import layer_of, layers_of
from tva.vectors.new_rows import grown

TIES = {"ties", "dare_ties", "breadcrumbs_ties", "della"}
PADDED = TIES | {"linear", "task_arithmetic", "dare_linear", "breadcrumbs", "della_linear"}
NORMALIZED = {"linear", "ties", "della"}  # by default
RESCALED = {"dare_ties", "dare_linear", "della", "della_linear"}
FLOOR = "floor=1e-06"


@dataclass
class MergekitRecipe:
    """What a mergekit configuration becomes.

    Attributes:
        options: Of `tva.compose.apply.compose`, all but the output.
        notes: What was decided in reading it.
    """

    options: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def read_mergekit(path: str | os.PathLike[str]) -> MergekitRecipe:
    """Read a mergekit configuration; of the models only headers are read.

    Args:
        path: The YAML file.

    Raises:
        ValueError: It is not one, or asks for what cannot be done; every such place is named with its line.
        FileNotFoundError: A model is not there.
    """
    file = MergekitFile(path)
    merge = _Merge(file)
    recipe, scaling_coef = merge.recipe()
    file.raise_problems()
    options: dict[str, Any] = {"base": merge.paths[BASE]}
    vectors = {name: model for name, model in merge.paths.items() if name != BASE}
    options |= {"vectors": vectors, "recipe": recipe}
    options |= {"coefs": merge.coefs.coefs} if merge.coefs.coefs else {}
    options |= {"scaling_coef": scaling_coef} if scaling_coef != 1 else {}
    options |= {"dtype": file.dtype} if file.dtype else {}
    options |= {"slices": merge.slices} if merge.slices else {}
    options |= merge.vocabulary()
    file.raise_problems()
    return MergekitRecipe(options, merge.notes())


class _Merge:
    """A configuration with its models opened.

    Args:
        file: The configuration.

    Attributes:
        paths: Of the models by the names they get.
        slices: Which layers they are cut to, if they are.
        coefs: Coefficients of the recipe.
    """

    def __init__(self, file: MergekitFile) -> None:
        self.file = file
        self.has_base = file.method.startswith(NEEDS_BASE) or (file.method == "nuslerp" and file.base is not None)
        self._order_sources()
        file.raise_problems()
        first = file.slices[0].sources[0].model
        self.paths = short_names([file.base or first, *(s.model for part in file.slices for s in part.sources)])
        self._name_of = {path: name for name, path in self.paths.items()}
        self._opened = self._open_models()
        file.raise_problems()
        self.slices: dict[str, list[str]] = {}
        tensors = self._tensors()
        file.raise_problems()
        self.names = self._slot_names()
        self.parameters = Parameters(file, tensors)
        self.coefs = Coefficients(self.parameters)

    # --- models, slices and slots

    def _order_sources(self) -> None:
        """Put the base first in every slice, and give every slice as many sources."""
        file = self.file
        if self.has_base and file.base is None and not all(part.base for part in file.slices):
            file.problem(("merge_method",), f"{file.method} needs a base_model")
            return
        for part in file.slices:
            if self.has_base and part.base not in [source.model for source in part.sources]:
                file.problem(part.parameters.place, f"{part.base}, the base_model, must be among the sources")
            elif self.has_base or file.method == "linear":
                part.sources.sort(key=lambda source, base=part.base: source.model != base)
            if not part.sources:
                file.problem(part.parameters.place, "must have a model")
        most = max((len(part.sources) for part in file.slices), default=0)
        for part in file.slices:
            if part.sources and len(part.sources) < most:
                self._pad(part, most)

    def _open_models(self) -> dict[str, LazyWeights]:
        opened = {}
        for path in self._name_of:
            sources = (source for part in self.file.slices for source in part.sources if source.model == path)
            place = next((source.place for source in sources), ("base_model",))
            try:
                opened[path] = open_model(path)
            except (OSError, ValueError) as error:
                self.file.problem((*place, "model"), str(error).rstrip("."))
        return opened

    def _pad(self, part: OutSlice, most: int) -> None:
        if self.file.method not in PADDED:
            self.file.problem(
                part.parameters.place, f"{self.file.method} needs the same number of sources in all slices"
            )
        first = part.sources[0]
        scope = Scope(first.place, {"weight": 0})
        part.sources += [Source(first.model, first.place, scope, first.layers)] * (most - len(part.sources))

    def _tensors(self) -> dict[str, Tensor]:
        slices = self.file.slices
        whole = self._opened[slices[0].sources[0].model]
        if slices[0].sources[0].layers is None:
            layers, count = layers_of(whole), len(slices[0].sources)
            return {name: Tensor(0, _depth(*layers[name]) if name in layers else 0.0, [name] * count) for name in whole}
        stacks = {source.model: layers_in(self._opened[source.model]) for part in slices for source in part.sources}
        prefix, tensors, number = stacks[slices[0].sources[0].model][0], {}, 0
        for at, part in enumerate(slices):
            ranges = [source.layers or (0, 0) for source in part.sources]
            if len({stop - first for first, stop in ranges}) > 1:
                self.file.problem(
                    (*part.parameters.place, "sources"), "all sources must have the same number of layers"
                )
                return {}
            for source, (_, stop) in zip(part.sources, ranges, strict=True):
                if stop > len(stacks[source.model][1]):
                    here = len(stacks[source.model][1])
                    self.file.problem((*source.place, "layer_range"), f"{source.model} has {here} layers; found {stop}")
                    return {}
            first, stop = ranges[0]
            for index in range(stop - first):
                depth = _depth(index, stop - first)
                for rest in stacks[part.sources[0].model][1][first + index]:
                    names = [
                        f"{stacks[s.model][0]}{r[0] + index}{rest}" for s, r in zip(part.sources, ranges, strict=True)
                    ]
                    tensors[f"{prefix}{number}{rest}"] = Tensor(at, depth, names)
                number += 1
        return self._outside(tensors)

    def _outside(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the tensors outside of layers: those before of the first slice, the others of the last one."""
        last = len(self.file.slices) - 1
        for at, before in ((0, True), (last, False)):
            part = self.file.slices[at]
            for name in self._opened[part.sources[0].model]:
                if layer_of(name) is None and is_before(name) == before:
                    tensors[name] = Tensor(at, 0.0, [name] * len(part.sources))
        return tensors

    def _slot_names(self) -> list[str]:
        """Return what the recipe calls each slot of sources, the first of which is the base; cut what must be."""
        slices = self.file.slices
        slots = [[part.sources[slot] for part in slices] for slot in range(len(slices[0].sources))]
        if all(self._is_whole(slot) for slot in slots) and self._name_of[slots[0][0].model] == BASE:
            return [self._name_of[slot[0].model] for slot in slots]
        found = []
        for at, slot in enumerate(slots):
            models = {source.model for source in slot}
            own = self._name_of[slot[0].model]
            name = BASE if at == 0 else own if len(models) == 1 and own != BASE else f"slot{at}"
            layers = [source.layers or (0, self._num_layers(source.model)) for source in slot]
            self.slices[name] = [
                f"{self._name_of[source.model]}[{first}:{stop}]"
                for source, (first, stop) in zip(slot, layers, strict=True)
            ]
            found.append(name)
        return found

    def _is_whole(self, slot: Sequence[Source]) -> bool:
        layers = slot[0].layers
        return len(slot) == 1 and (layers is None or layers == (0, self._num_layers(slot[0].model)))

    def _num_layers(self, model: str) -> int:
        return len(layers_in(self._opened[model])[1])

    # --- the recipe

    def recipe(self) -> tuple[str, float]:
        """Return the recipe, and the coefficient of the whole: 0 where the output is the base as it is."""
        method = self.file.method
        others = len(self.names) - 1
        if method == "passthrough":
            return self._passthrough()
        if method == "linear":
            return self._linear()
        if method == "slerp":
            if others != 1:
                self.file.problem(("merge_method",), f"slerp takes the base_model and one more; found {others} more")
                return BASE, 0
            t = self._text("t", self.parameters.numbers("t"), None)
            return f"slerp({BASE}, {BASE} + {self.names[1]}, t={t}, linear_above=0.9995) - {BASE}", 1
        if method == "nuslerp":
            return self._nuslerp()
        if method == "sce":
            topk = combine(lambda part: min(part, 1.0), self.parameters.numbers("select_topk", default=1.0))
            return f"sce({', '.join(self.names[1:])}, density={self._text('select_topk', topk, None)}, {FLOOR})", 1
        if method == "model_stock":
            if others < 2:
                self.file.problem(
                    ("merge_method",), f"model_stock takes the base_model and two or more; found {others}"
                )
            over = "row" if self.parameters.flag("filter_wise", False) else "tensor"
            return f'model_stock({", ".join(self.names[1:])}, over="{over}", {FLOOR})', 1
        return self._arithmetic()

    def _passthrough(self) -> tuple[str, float]:
        if len(self.names) != 1:
            place = self.file.slices[0].sources[1].place
            self.file.problem(place, "passthrough takes one model in each slice")
        scale = self.parameters.numbers("scale", 0, default=1.0)
        if set(scale.values()) == {1.0}:
            return BASE, 0
        return f"{self._text('scale', scale, 0)} * {BASE} - {BASE}", 1

    def _linear(self) -> tuple[str, float]:
        weights = [self.parameters.numbers("weight", slot) for slot in range(len(self.names))]
        total = combine(lambda *parts: sum(parts), *weights)
        normalize = self.parameters.flag("normalize", True)
        if normalize and any(abs(value) < 1e-12 for value in total.values()):
            self.file.problem(("merge_method",), "the weights add up to 0 in a tensor, by which linear divides")
            return BASE, 0
        shares = [combine(lambda w, all_: w / all_, part, total) if normalize else part for part in weights]
        scale = 1 / next(iter(total.values())) if normalize else 1.0
        terms = [
            _times(self._text(f"w_{name}", share, slot, "weight", scale), name)
            for slot, (name, share) in enumerate(zip(self.names, shares, strict=True))
            if slot
        ]
        if not normalize:
            terms.append(_times(self._text("rest", combine(lambda part: part - 1, total), None, ""), BASE))
        terms = [term for term in terms if term]
        return (" + ".join(terms), 1) if terms else (BASE, 0)

    def _nuslerp(self) -> tuple[str, float]:
        if len(self.names) - self.has_base != 2:
            self.file.problem(("merge_method",), f"nuslerp takes two models; found {len(self.names) - self.has_base}")
            return BASE, 0
        slots = (1, 2) if self.has_base else (0, 1)
        weights = [self.parameters.numbers("weight", slot) for slot in slots]
        t = combine(lambda a, b: b / (a + b) if abs(a + b) >= 1e-6 else 0.5, *weights)
        over = "tensor"
        if not self.parameters.flag("nuslerp_flatten", True):
            over = "column" if self.parameters.flag("nuslerp_row_wise", False) else "row"
        options = f't={self._text("t", t, None, "")}, over="{over}"'
        if self.has_base:
            return f"slerp({self.names[1]}, {self.names[2]}, {options})", 1
        return f"slerp({BASE}, {BASE} + {self.names[1]}, {options}) - {BASE}", 1

    def _arithmetic(self) -> tuple[str, float]:
        """Task arithmetic, with what makes vectors sparse and with or without an election of signs."""
        method, number = self.file.method, self.parameters.numbers
        slots = range(1, len(self.names))
        weights = [number("weight", slot) for slot in slots]
        densities = [number("density", slot, default=1.0) for slot in slots]
        weights = [combine(lambda w, d: w if d > 0 else 0.0, w, d) for w, d in zip(weights, densities, strict=True)]
        densities = [combine(lambda d: d if 0 < d < 1 else 1.0, part) for part in densities]
        normalize = self.parameters.flag("normalize", method in NORMALIZED)
        rescale = self.parameters.flag("rescale", method in RESCALED)
        scale = number("lambda", default=1.0)
        if not weights:
            return BASE, 0
        if method == "ties" and not rescale and not differing(densities):
            return self._ties(self.names[1:], weights, scale, normalize, densities[0])
        sparse = [self._sparse(slot, part, rescale) for slot, part in zip(slots, densities, strict=True)]
        if method in TIES:
            return self._ties(sparse, weights, scale, normalize)
        total = combine(lambda *parts: sum(parts), *weights)
        divisor = combine(lambda part: part if abs(part) >= 1e-8 else 1.0, total) if normalize else None
        terms = []
        for slot, (vector, weight) in enumerate(zip(sparse, weights, strict=True), start=1):
            share = weight if divisor is None else combine(lambda w, d: w / d, weight, divisor)
            factor = 1.0 if divisor is None else 1 / next(iter(divisor.values()))
            terms.append(_times(self._text(f"w_{self.names[slot]}", share, slot, "weight", factor), vector))
        terms = [term for term in terms if term]
        if not terms:
            return BASE, 0
        text = self._text("lam", scale, None, "lambda")
        return (" + ".join(terms) if text == "1" else f"{text} * ({' + '.join(terms)})"), 1

    def _sparse(self, slot: int, density: Values, rescale: bool) -> str:
        name, method = self.names[slot], self.file.method
        if set(density.values()) == {1.0} or method == "task_arithmetic":
            return name
        if method.startswith("dare"):
            drop = self._text(f"drop_{name}", combine(lambda d: 1 - d, density), None, "")
            text = f'dare({name}, drop={drop}, rescale="none")'
            return f"rescale({text}, {name})" if rescale else text
        kept = self._text(f"d_{name}", density, slot, "density")
        if method == "ties":
            text = f"magnitude({name}, density={kept})"
        elif method.startswith("breadcrumbs"):
            top = self._text(f"g_{name}", self.parameters.numbers("gamma", slot, default=0.01), slot, "gamma")
            text = f"breadcrumbs({name}, top={top}, density={kept})"
        else:
            epsilon = self._text(f"e_{name}", self.parameters.numbers("epsilon", slot, default=0.15), slot, "epsilon")
            text = f'della({name}, density={kept}, epsilon={epsilon}, rescale="none")'
        return f"rescale({text}, {name})" if rescale else text

    def _ties(
        self,
        vectors: Sequence[str],
        weights: Sequence[Values],
        scale: Values,
        mean: bool,
        density: Values | None = None,
    ) -> tuple[str, float]:
        kept = "1" if density is None else self._text("density", density, 1)
        options = [f"density={kept}", 'trim="tensor"', 'undecided="positive"', f'combine="{"mean" if mean else "sum"}"']
        if any(set(part.values()) != {1.0} for part in weights):
            texts = [self._text(f"w_{self.names[at]}", part, at, "weight") for at, part in enumerate(weights, start=1)]
            options.append(f"weights=({', '.join(texts)},)")
        return _times(self._text("lam", scale, None, "lambda"), f"ties({', '.join([*vectors, *options])})") or BASE, 1

    def _text(
        self, hint: str, values: Values, slot: int | None, parameter: str | None = None, factor: float = 1.0
    ) -> str:
        """Return how the recipe says values; short groups are made of what the file says, if that gives them."""
        name = hint if parameter is None else parameter
        setting = None
        if len(self.file.slices) == 1 and name:
            setting = [
                part for _, given in self.parameters.settings(name, slot, 0) for part in _conditions(given, factor)
            ]
        return self.coefs.text(hint, values, setting or None)

    # --- tokenizer

    def vocabulary(self) -> dict[str, Any]:
        """Return the options that give the output the tokenizer that is asked for."""
        source = self.file.tokenizer
        base = self._opened[self.paths[BASE]]
        rows = {
            name: max([0, *(new for _, new in grown(self._opened[path], base).values())])
            for name, path in self.paths.items()
        }
        more = {name: count for name, count in rows.items() if count}
        place = ("tokenizer_source",)
        if source is None:
            return {}
        if source == "union":
            folders = [model_folder(find(parts_of(path)[0])) for path in self._name_of]
            ids = [token_ids(folder) if folder else None for folder in folders]
            if any(other != ids[0] for other in ids):
                self.file.problem(place, "tokenizers that differ are not joined; take base, or one of the models")
            return {}
        name = BASE if source == "base" else self._name_of.get(source)
        if name is None:
            self.file.problem(place, f"{source} is not one of the models that are merged")
            return {}
        if name == BASE:
            return {"new_rows": "drop"} if more else {}
        if any(count > rows[name] for count in more.values()):
            self.file.problem(place, f"another model has more tokens than {source}; take the one with most, or base")
        return {"tokenizer": name, **({"new_rows": "keep"} if more else {})}

    def notes(self) -> list[str]:
        """Return what was decided."""
        file, found = self.file, []
        if file.base is None:
            found.append(f"no base_model: configuration and tokenizer are those of the first model, {self.paths[BASE]}")
        if file.method.startswith(("dare", "della")):
            found.append(
                f"{file.method} draws tva's own random numbers, of seed 0, which depend on vector, tensor and element "
                f"only; mergekit's differ from run to run"
            )
        read = {*METHODS[file.method], "int8_mask"}
        scopes = [file.parameters, *(p.parameters for p in file.slices)]
        scopes += [source.parameters for part in file.slices for source in part.sources]
        unread = sorted({name for scope in scopes for name in scope.values if name not in read})
        if unread:
            found.append(f"{', '.join(unread)}: {file.method} does not use such parameters, here as in mergekit")
        return found


def _depth(index: int, count: int) -> float:
    return index / (count - 1) if count > 1 else 1.0


def _times(coefficient: str, vector: str) -> str:
    return "" if coefficient == "0" else vector if coefficient == "1" else f"{coefficient} * {vector}"


def _conditions(setting: Any, factor: float) -> list[dict[str, Any]]:
    """Return a setting as a list of filters with values, all multiplied by a number."""
    parts = setting if isinstance(setting, list) and any(isinstance(p, dict) for p in setting) else [setting]
    found = []
    for part in parts:
        condition = dict(part) if isinstance(part, dict) else {"value": part}
        value = condition.get("value")
        numbers = value if isinstance(value, list) else [value]
        if factor != 1 and all(type(number) in (int, float) for number in numbers):
            scaled = [number * factor for number in numbers]
            condition["value"] = scaled if isinstance(value, list) else scaled[0]
        found.append(condition)
    return found
