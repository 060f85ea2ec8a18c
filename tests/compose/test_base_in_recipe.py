"""Recipes with the base's own weights, and options that differ from tensor to tensor."""

import pytest
import torch

from tva import TaskVector, open_weights, save_weights
from tva.compose.apply import compose
from tva.compose.recipe import Recipe
from tva.compose.verify import verify


def state(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed": (5, 4), "layers.0.w": (4, 4), "layers.1.w": (4, 4), "layers.2.w": (4, 4), "one": ()}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.fixture
def files():
    def write(dtype=torch.float32):
        for seed, name in enumerate(("base", "a", "b")):
            save_weights(state(seed, dtype), f"{name}.safetensors")
        return "base.safetensors", {name: f"{name}.safetensors" for name in "ab"}

    return write


def run(files, recipe, **options):
    base, vectors = files
    compose(base, vectors, recipe, "out.safetensors", **options)
    assert verify("out.safetensors").holds
    return {name: value.double() for name, value in open_weights("out.safetensors").items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("recipe", "weights"),
    [("0.25 * base + 0.75 * (base + a) - base", (0.25, 0.75)), ("-0.1 * base", (0.9, 0)), ("2 * a + base", (0, 2))],
)
def test_weights_from_zero_are_rounded_once(files, dtype, recipe, weights):
    found = run(files(dtype), recipe)
    base, a = state(0, dtype), state(1, dtype)
    for name in base:
        expected = weights[0] * base[name].double() + weights[1] * a[name].double()
        assert torch.equal(found[name], expected.to(dtype).double()), name


def test_a_vector_may_still_be_called_base(files):
    base, vectors = files()
    found = run((base, {"base": vectors["a"]}), "base")
    torch.testing.assert_close(found, {name: value.double() for name, value in state(1).items()})


def test_in_memory_the_base_is_not_known():
    vectors = {"a": TaskVector(state(1))}
    with pytest.raises(ValueError, match="'base' is unknown"):
        Recipe("a + base", vectors)
    with pytest.raises(ValueError, match="known only where a checkpoint is composed"):
        Recipe("a + base", vectors, with_base=True).evaluate(vectors)


def test_without_vectors_a_recipe_of_the_base_moves_all(files):
    found = run((files()[0], {}), "base", scaling_coef=-0.5)
    torch.testing.assert_close(found, {name: value.double() / 2 for name, value in state(0).items()})


DENSITIES = {"layer": [0.25, 0.75], ".*": 1}


@pytest.mark.parametrize(
    "text",
    ["magnitude(a, density={})", "ties(a, b, density={}, trim='tensor')", "ties(a, b, weights=({}, 1), density=1)",
     "della(a, density={}, epsilon=0.01) + b", "0.5 * rescale(magnitude(a, density={}), a)"],
)  # fmt: skip
def test_an_option_by_group_is_that_option_in_each_tensor(files, text):
    inputs = files()
    text = text.replace("density=1)", 'density=1, trim="tensor")')
    found = run(inputs, text.format("d"), coefs={"d": DENSITIES})
    values = {"embed": 1, "one": 1, "layers.0.w": 0.25, "layers.1.w": 0.5, "layers.2.w": 0.75}
    for name, value in values.items():
        compose(inputs[0], inputs[1], text.format(value), "one.safetensors")
        assert torch.equal(found[name], open_weights("one.safetensors")[name].double()), name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ties(a, density=d)", "the same in all tensors, for ties looks at the whole model at once"),
        ("dare(a, seed=d)", "the same in all tensors, for it is not a number"),
        ("dare(a, drop=d)", "In 'embed': drop must be in .* found 1.0"),
    ],
)
def test_options_that_cannot_differ_are_refused(files, text, message):
    groups = {".*": 1} if "seed" in text else DENSITIES
    with pytest.raises(ValueError, match=message):
        run(files(), text, coefs={"d": groups})
