"""Every method: the same bits whatever the chunks, and what must hold of all of them."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from tva import TaskVector, save_weights
from tva.compose.recipe import Recipe
from tva.merge import METHODS, Chunk, Method
from tva.merge.exact_sum import BLOCK, Sum

SHAPES = {
    "h.0.long": (BLOCK + 1234,),
    "h.0.matrix": (40, 30),
    "h.1.scalar": (),
    "h.1.one": (1,),
    "h.1.small": (7,),
    "h.1.empty": (0, 3),
}
TEXTS = [
    "analogy({0}, {1}, {2})",
    "breadcrumbs({0}, top=0.01, bottom=0.6)",
    "breadcrumbs({0}, top=0.1, bottom=0.6, rows=True)",
    "breadcrumbs({0}, top=0.01, density=0.3)",
    "breadcrumbs({0}, top=0.1, density=0.3, rows=True)",
    "cart({0}, {1}, {2}, rank=0.3)",
    "consensus({0}, {1}, {2})",
    "dare({0})",
    'dare({0}, rescale="none")',
    "della({0}, density=0.4, epsilon=0.2)",
    "emr({0}, {1}, {2})",
    "emr({0}, {1}, {2}, task=2)",
    "fisher({0}, {1}, {2}, files={files})",
    "fisher({0}, {1}, {2}, files={files}, normalize=True)",
    "iso_c({0}, {1}, {2})",
    "iso_cts({0}, {1}, {2})",
    "lines({0}, first=0.2, last=1.0)",
    "magnitude({0}, density=0.3)",
    "mean({0}, {1}, {2})",
    "model_stock({0}, {1}, {2})",
    'model_stock({0}, {1}, {2}, over="row")',
    'model_stock({0}, {1}, {2}, over="row", floor=1e-6)',
    "model_stock({0}, {1}, {2}, floor=1e-6)",
    "pcb({0}, {1}, {2}, ratio=0.2)",
    'pcb({0}, {1}, {2}, ratio=0.2, between="raw")',
    "regmean({0}, {1}, {2}, files={files})",
    "rescale({0}, {1})",
    "sce({0}, {1}, {2}, density=0.4)",
    "sce({0}, {1}, {2}, floor=1e-6)",
    "sign_consensus({0}, {1}, {2})",
    'sign_consensus({0}, {1}, {2}, vote="count", min_agree=2, combine="sum")',
    "slerp({0}, {1}, t=0.3)",
    'slerp({0}, {1}, t=0.3, over="model")',
    'slerp({0}, {1}, t=0.3, over="row")',
    'slerp({0}, {1}, t=0.3, over="column", linear_above=0.9)',
    "svc({0}, {1}, {2})",
    "tall({0}, {1}, {2}, task=2)",
    "ties({0}, {1}, {2})",
    'ties({0}, {1}, {2}, trim="tensor", weights=(1, 2, 3), elect="unweighted")',
    'ties({0}, {1}, {2}, undecided="positive")',
    'ties({0}, {1}, {2}, trim="tensor", weights=(1, 0, 0.5))',
    'ties({0}, {1}, {2}, trim="tensor", weights=(1, -0.5, 0.5))',
    "tsv({0}, {1}, {2})",
    "wudi({0}, {1}, {2}, steps=5)",
    'lines(pcb(magnitude({0}, density=0.5), slerp({1}, emr({2}, {0}, task=1)), ratio=0.5), first=0.2, last=1)',
]  # fmt: skip
ORDERED = ("analogy", "task=", "weights", "svc")
SYMMETRIC = [text for text in TEXTS if "{2}" in text and not any(word in text for word in ORDERED)]


def vectors(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: TaskVector({key: (torch.randn(s, generator=generator) * 1e-3).to(dtype) for key, s in SHAPES.items()})
        for name in "abc"
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One file of statistics that serves Fisher and, in its matrix, RegMean merging."""
    shapes = {**SHAPES, "h.0.matrix": (30, 30)}
    made = {key: torch.randn(shape).square() for key, shape in shapes.items()}
    gram = tmp_path_factory.mktemp("statistics") / "gram.safetensors"
    save_weights({**made, "h.0.matrix": made["h.0.matrix"] @ made["h.0.matrix"].T}, gram)
    save_weights({**made, "h.0.matrix": torch.rand(40, 30)}, gram.with_name("fisher.safetensors"))
    return gram


def written(text, files, order="abc", count=3):
    path = str(files if "regmean" in text else files.with_name("fisher.safetensors"))
    return text.format(*order, files=[path] * count)


def in_chunks(text, given, size):
    """Evaluate a recipe in chunks of ``size`` elements, the tensors in another order than in memory."""
    recipe = Recipe(text, given)
    recipe.bind(SHAPES)
    size = 2**40 if recipe.needs_whole_tensors else size
    sources = {name: name for name in given}

    def chunks():
        for key, shape in reversed(SHAPES.items()):
            flat = {name: vector.deltas[key].reshape(-1) for name, vector in given.items()}
            for start in range(0, max(1, flat["a"].numel()), size):
                yield Chunk(key, start, shape=shape), {n: flat[n][start : start + size] for n in recipe.vectors}

    observed = recipe.observe(chunks, sources)
    merged = {key: [] for key in SHAPES}
    for chunk, deltas in chunks():
        merged[chunk.tensor].append(recipe.merge(chunk, deltas, observed, sources))
    return {key: torch.cat(parts).reshape(SHAPES[key]) for key, parts in merged.items()}


def test_every_method_is_tested_here():
    assert {text.split("(")[0] for text in TEXTS} == METHODS.keys()


@pytest.mark.parametrize("text", TEXTS)
def test_chunks_change_no_bit_and_inputs_stay(text, files):
    given = vectors()
    before = {name: {key: delta.clone() for key, delta in v.deltas.items()} for name, v in given.items()}
    expected = Recipe(written(text, files), given).evaluate(given).deltas
    for size in (613, 4096, 10_000):
        found = in_chunks(written(text, files), given, size)
        for key in SHAPES:
            assert torch.equal(found[key], expected[key]), (key, size)
    for name, vector in given.items():
        assert all(torch.equal(vector.deltas[key], before[name][key]) for key in SHAPES), "an input was changed"
    for key, shape in SHAPES.items():
        assert expected[key].shape == shape
        assert expected[key].dtype == torch.float32
        assert torch.isfinite(expected[key]).all()


@pytest.mark.parametrize("text", SYMMETRIC)
def test_the_order_of_vectors_does_not_matter(text, files):
    given = vectors()
    first, second = (Recipe(written(text, files, order), given).evaluate(given).deltas for order in ("abc", "cab"))
    for key in SHAPES:
        torch.testing.assert_close(first[key], second[key], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("text", TEXTS)
def test_zero_vectors_give_zero_and_float64_stays(text, files):
    given = {name: 0 * vector for name, vector in vectors(dtype=torch.float64).items()}
    merged = Recipe(written(text, files), given).evaluate(given).deltas
    assert all(delta.dtype == torch.float64 and not delta.any() for delta in merged.values())


@pytest.mark.parametrize("text", TEXTS)
def test_float64_is_the_same_up_to_rounding(text, files):
    wide, narrow = (vectors(dtype=dtype) for dtype in (torch.float64, torch.float32))
    wide, narrow = (Recipe(written(text, files), given).evaluate(given).deltas for given in (wide, narrow))
    wide, narrow = (torch.cat([delta.double().reshape(-1) for delta in merged.values()]) for merged in (wide, narrow))
    away = (wide - narrow).abs() > 1e-3 * wide.abs() + 1e-7
    assert int(away.sum()) <= (5 if "pcb" in text else 0)  # pcb jumps at its thresholds


ONE = {  # method: how it gives one vector back bit for bit, or in what it differs by design
    "analogy": "analogy({0}, {0}, {0})",
    "breadcrumbs": "breadcrumbs({0}, top=0, bottom=0)",
    "cart": "cart({0})",
    "consensus": "consensus({0}, min_agree=1)",
    "dare": "dare({0}, drop=0)",
    "della": "della({0}, density=1.0)",
    "emr": "emr({0})",
    "fisher": "up to rounding: it multiplies and divides",
    "iso_c": "by design: all singular values become one",
    "iso_cts": "by design: all singular values become one",
    "lines": "lines({0}, first=1, last=1)",
    "magnitude": "magnitude({0}, density=1.0)",
    "mean": "mean({0})",
    "model_stock": "by design: one vector has no angle",
    "pcb": "by design: it keeps a part, clamped",
    "regmean": "regmean({0}, files={files})",
    "rescale": "rescale({0}, {0})",
    "sce": "up to rounding: it multiplies and divides",
    "sign_consensus": "sign_consensus({0})",
    "slerp": "slerp({0}, {0}, t=0.25)",
    "svc": "up to rounding: it decomposes",
    "tall": "tall({0}, task=1)",
    "ties": "ties({0}, density=1.0)",
    "tsv": "up to rounding: it decomposes",
    "wudi": "in its matrices alone",
}
EXACT = [text for text in ONE.values() if "(" in text]


@pytest.mark.parametrize("text", [*EXACT, "emr({0}, task=1)"])
def test_one_vector_in_gives_that_vector_bit_for_bit(text, files):
    given = vectors()
    merged = Recipe(written(text, files, count=1), given).evaluate(given).deltas
    assert all(torch.equal(merged[key], given["a"].deltas[key]) for key in SHAPES)


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("fisher({0}, files={files})", SHAPES),
        ("sce({0})", SHAPES),
        ("svc({0}, {0})", SHAPES),
        ("tsv({0})", SHAPES),
        ("wudi({0}, exclude='')", ["h.0.matrix"]),
    ],
)
def test_one_vector_in_gives_that_vector_up_to_rounding(text, keys, files):
    given = vectors()
    merged = Recipe(written(text, files, count=1), given).evaluate(given).deltas
    for key in keys:
        torch.testing.assert_close(merged[key], given["a"].deltas[key], rtol=1e-5, atol=1e-8)


def test_what_one_vector_gives_is_stated_of_every_method():
    assert ONE.keys() == METHODS.keys()


def test_sums_depend_on_no_chunks_and_are_right():
    values = torch.randn(5 * BLOCK + 77, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    totals = set()
    for size in (100, BLOCK - 1, BLOCK, BLOCK + 1, len(values)):
        total = Sum()
        for start in range(0, len(values), size):
            total.add(values[start : start + size], Chunk("w", start, shape=(len(values),)))
        totals.add(total.total)
    assert len(totals) == 1
    assert totals.pop() == pytest.approx(float(values.sum()), rel=1e-12)


def test_no_option_of_a_method_hides_what_every_method_has():
    for name, method in METHODS.items():
        assert not {field.name for field in fields(method)} & set(dir(Method)), name


def test_every_method_explains_its_options():
    for name, method in METHODS.items():
        for option in inspect.signature(method).parameters:
            assert f"        {option}: " in inspect.getdoc(method).replace("\n    ", "\n        "), (name, option)
        assert method.usage.startswith(f"{name}(")


def test_the_documentation_says_everything_of_every_method():
    page = (Path(__file__).parents[2] / "docs" / "reference" / "methods.md").read_text()
    sections = {  # the first line below a heading shows how a method is written
        line: part
        for part in re.split(r"^## .*\n", page, flags=re.M)
        if (line := part.strip().split("\n")[0]).startswith("`")
    }
    for name in METHODS:
        (section,) = {part for line, part in sections.items() if f"`{name}(" in line or f" {name}(" in line}
        for label in ("Formula", "Paper", "Parameters", "Cost"):
            assert re.search(rf"\*{label}s?\*", section), (name, label)
        for table in page.split("## In mergekit and peft"):
            assert re.search(rf"^\|.*[`(]{name}[`(].*\|$", table, flags=re.M), f"{name} is in no table"
