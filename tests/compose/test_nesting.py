"""Methods inside methods: a recipe on files is the recipe in memory, and the formula, whichever methods are nested."""

import math
import random
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tva import TaskVector, save_weights
from tva.compose.apply import compose
from tva.compose.engine import Composer
from tva.compose.recipe import Recipe
from tva.compose.verify import verify
from tva.merge import METHODS

SHAPES = {"layers.0.w": (12, 10), "layers.1.w": (10, 9), "scalar": (), "one": (1,), "empty": (0, 5), "b": (300,)}
ONE = [
    "magnitude({0}, density=0.5)",
    "breadcrumbs({0}, top=0.1, bottom=0.6)",
    "breadcrumbs({0}, top=0.1, bottom=0.6, rows=True)",
    "dare({0}, drop=0.5)",
    "della({0}, density=0.4, epsilon=0.2)",
    "lines({0}, first=0.2, last=1.0)",
]
SEVERAL = [
    "analogy({0}, {1}, c)",
    "cart({0}, {1}, rank=0.3)",
    "consensus({0}, {1})",
    "emr({0}, {1})",
    "emr({0}, {1}, task=1)",
    "fisher({0}, {1}, files={files})",
    "iso_c({0}, {1})",
    "iso_cts({0}, {1})",
    "mean({0}, {1})",
    "model_stock({0}, {1})",
    'model_stock({0}, {1}, over="row")',
    "pcb({0}, {1}, ratio=0.3)",
    "regmean({0}, {1}, files={files})",
    "rescale({0}, {1})",
    "sce({0}, {1}, density=0.4)",
    "sign_consensus({0}, {1})",
    "slerp({0}, {1})",
    'slerp({0}, {1}, over="model")',
    "svc({0}, {1})",
    "tall({0}, {1}, task=1)",
    "ties({0}, {1})",
    'ties({0}, {1}, trim="tensor")',
    "tsv({0}, {1})",
    "wudi({0}, {1}, steps=2)",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A base, three fine-tuned models in memory and on disk, and files of statistics."""
    folder, generator = tmp_path_factory.mktemp("nesting"), torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    save_weights(base, folder / "base.safetensors")
    paths, vectors = {}, {}
    for name in "abc":
        tuned = {key: x + 1e-2 * torch.randn(x.shape, generator=generator) for key, x in base.items()}
        paths[name] = str(folder / f"{name}.safetensors")
        save_weights(tuned, paths[name])
        vectors[name] = TaskVector.between(base, tuned)
    information = {key: torch.rand(shape, generator=generator) for key, shape in SHAPES.items()}
    save_weights(information, folder / "fisher.safetensors")
    grams = {key: torch.eye(shape[1]) + 0.1 for key, shape in SHAPES.items() if len(shape) == 2 and shape[0]}
    save_weights(grams, folder / "gram.safetensors")
    return SimpleNamespace(
        base=base, path=str(folder / "base.safetensors"), paths=paths, vectors=vectors, folder=folder
    )


def nested(model, outer, first, second="b"):
    """Write a method with its arguments in their places."""
    file = str(model.folder / ("gram.safetensors" if outer.startswith("regmean") else "fisher.safetensors"))
    return outer.replace("{files}", repr((file, file))).replace("{0}", first).replace("{1}", second)


class Written:
    """Keep what a composer computes."""

    def __init__(self):
        self.done, self.tensors = {}, {}

    def write(self, name, start, chunk):
        self.tensors.setdefault(name, []).append(chunk.tensor().clone())

    def finish(self, name, record):
        pass


def on_files(model, text):
    composer = Composer.open(model.path, model.paths, Recipe(text, model.paths), 1.0)
    composer.chunk, written = 64, Written()  # several chunks a tensor
    composer.run(written)
    return {name: torch.cat(parts).reshape(SHAPES[name]) for name, parts in written.tensors.items()}


def assert_same_in_memory_and_on_files(model, text):
    expected = Recipe(text, "abc").evaluate(model.vectors).apply_to(model.base)
    found = on_files(model, text)
    assert found.keys() == expected.keys()
    for name in SHAPES:
        assert torch.equal(found[name].view(torch.int32), expected[name].view(torch.int32)), (text, name)


@pytest.mark.slow
@pytest.mark.parametrize("outer", ONE + SEVERAL)
def test_every_method_takes_every_method(model, outer):
    for inner in ONE + SEVERAL:
        assert_same_in_memory_and_on_files(model, nested(model, outer, nested(model, inner, "a", "c")))


def test_every_method_is_nested_here():
    assert {text.split("(")[0] for text in ONE + SEVERAL} == METHODS.keys()


@pytest.mark.slow
def test_methods_nest_three_deep(model):
    pick = random.Random(0)
    for _ in range(80):
        outer, middle, inner, other = (pick.choice(ONE + SEVERAL) for _ in range(4))
        deep = nested(model, middle, nested(model, inner, "a", "c"), nested(model, other, "b", "a"))
        assert_same_in_memory_and_on_files(model, nested(model, outer, deep, nested(model, inner, "c", "b")))


# --- the recipes that came out wrong in silence, each against its formula in numpy


def num_kept(density, count):
    return max(1, math.floor(density * count + 1e-9))


def breadcrumbs(vector):
    """Zero the 85% smallest and the 0.7% largest magnitudes of each tensor."""
    out = {}
    for key, x in vector.items():
        ordered, count = numpy.sort(abs(x).ravel()), x.size
        low, high = ordered[math.floor(0.85 * count)], ordered[count - 1 - math.floor(0.007 * count)]
        out[key] = numpy.where((abs(x) >= low) & (abs(x) <= high), x, 0)
    return out


def flat(vector):
    return numpy.concatenate([x.ravel() for x in vector.values()])


def ties(first, second, density):
    kept = []
    for x in (flat(first), flat(second)):
        threshold = numpy.sort(abs(x))[len(x) - num_kept(density, len(x))]
        kept.append(numpy.where(abs(x) >= threshold, x, 0))
    sign = numpy.sign(sum(kept))
    agreeing = [(x != 0) & (numpy.sign(x) == sign) for x in kept]
    total = sum(x * own for x, own in zip(kept, agreeing, strict=True))
    return total / numpy.maximum(sum(own.astype(float) for own in agreeing), 1)


def emr_of_the_first(first, second):
    a, b = flat(first), flat(second)
    sign = numpy.sign(a + b)
    unified = sign * numpy.maximum(numpy.maximum(a * sign, b * sign), 0)
    masked = numpy.where(a * unified > 0, unified, 0)
    return masked * abs(a).sum() / abs(masked).sum()


def pcb(first, second, ratio):
    vectors = [flat(first), flat(second)]
    clamped, normalized = [], []
    for x in vectors:
        ordered, tail = numpy.sort(abs(x)), math.floor(0.01 * x.size)
        magnitude = numpy.clip(abs(x), ordered[tail], ordered[x.size - 1 - tail])
        clamped.append(magnitude * numpy.sign(x))
        normalized.append((magnitude - magnitude.min()) / (magnitude.max() - magnitude.min()))
    agreement = sum(numpy.sign(x) * n for x, n in zip(vectors, normalized, strict=True))
    total = weights = 0
    for x, c, n in zip(vectors, clamped, normalized, strict=True):
        score = numpy.exp(2 * n * n) * numpy.tanh(x * agreement)
        score = numpy.maximum(score, numpy.sort(score)[x.size - num_kept(ratio, x.size)])
        weight = (score - score.min()) / (score.max() - score.min())
        total, weights = total + weight * c, weights + weight
    return total / numpy.maximum(weights, 1e-12)


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        ("ties(breadcrumbs(a), breadcrumbs(b), density=0.1)", lambda a, b: ties(breadcrumbs(a), breadcrumbs(b), 0.1)),
        ("emr(breadcrumbs(a), b, task=1)", lambda a, b: emr_of_the_first(breadcrumbs(a), b)),
        ("pcb(breadcrumbs(a), b, ratio=0.3)", lambda a, b: pcb(breadcrumbs(a), b, 0.3)),
    ],
)
def test_a_method_over_the_model_of_a_method_of_single_tensors_is_its_formula(text, formula):
    drawn = numpy.random.default_rng(0)
    shapes = {"v": (700,), "w": (40, 30)}
    vectors = {n: {k: drawn.standard_normal(s).astype(numpy.float32) for k, s in shapes.items()} for n in "ab"}
    base = {key: numpy.zeros(shape, numpy.float32) for key, shape in shapes.items()}
    for name, tensors in {"base": base, **vectors}.items():
        save_file(tensors, f"{name}.safetensors")
    paths = {name: f"{name}.safetensors" for name in "ab"}
    output = Path("out.safetensors")
    compose("base.safetensors", paths, text, str(output))
    expected = formula(*({key: x.astype(float) for key, x in vectors[name].items()} for name in "ab"))
    found = load_file(output)
    numpy.testing.assert_allclose(flat({key: found[key] for key in shapes}), expected, rtol=1e-5, atol=1e-7)
    assert verify(str(output)).holds


@pytest.mark.parametrize("text", ["ties(breadcrumbs(a), b)", "0.5 * magnitude(a, density=0.3)"])
def test_verify_does_not_repeat_a_mistake_of_the_engine(model, monkeypatch, text):
    """It computes a sample in a second way, which does not use what the engine observed."""
    observe_tensor = Recipe.observe_tensor

    def mistaken(self, *arguments):
        states = observe_tensor(self, *arguments)
        for state in states.values():
            state.values = [0.5 * value for value in state.values]
        return states

    monkeypatch.setattr(Recipe, "observe_tensor", mistaken)
    output = "out.safetensors"
    compose(model.path, model.paths, text, output)
    report = verify(output)
    assert not report.holds
    assert report.different
    assert "computed in a second way" in str(report)

    monkeypatch.undo()
    Path("out.safetensors").unlink()
    compose(model.path, model.paths, text, output)
    report = verify(output)
    assert report.holds
    assert report.sampled == 5  # every tensor but the empty one
