"""NaN and infinity: what is equal on both sides is not moved; all else is an error that names file and tensor."""

from pathlib import Path

import pytest
import torch

from tva import TaskVector, open_weights, save_weights
from tva.arithmetic import equal, subtract
from tva.compose.apply import compose
from tva.compose.recipe import Recipe
from tva.compose.verify import verify

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_what_is_equal_has_the_delta_zero(dtype, other):
    base = torch.tensor([-INF, INF, NAN, 1.0, -0.0, 2.0, INF, 1.0, NAN])
    tuned = torch.tensor([-INF, INF, NAN, 1.0, -0.0, 3.0, -INF, INF, 1.0])
    delta = subtract(tuned.to(dtype), base.to(other))
    assert torch.equal(delta[:6], torch.tensor([0, 0, 0, 0, 0, 1.0], dtype=delta.dtype))
    assert not delta[6:].isfinite().any()
    out = torch.empty_like(delta)
    assert subtract(tuned.to(dtype), base.to(other), out) is out
    assert torch.equal(out[:6], delta[:6])
    assert equal(tuned[:5], base[:5])
    assert not equal(tuned, base)
    assert subtract(torch.tensor(-INF), torch.tensor(-INF)) == 0


def state(dtype):
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(30, 30) + torch.triu(torch.full((30, 30), -INF), 1)
    mixed = torch.randn(30, 20, generator=generator)
    mixed[::7] = -INF
    mixed[1, 1] = NAN
    tensors = {
        "w": torch.randn(30, 20, generator=generator),
        "mask": mask,
        "mixed": mixed,
        "nan": torch.full((5,), NAN),
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def folder(request, tmp_path):
    """A base with masks that hold -inf and NaN, and fine-tuned models in which they are the same."""
    base = state(request.param)
    save_weights(base, "base.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in "ab":
        tuned = {key: x + 0.1 * torch.randn(x.shape, generator=generator).to(x.dtype) for key, x in base.items()}
        save_weights(tuned, f"{name}.safetensors")
        torch.save(tuned, f"{name}.pt")
    return tmp_path


RECIPES = ["0.5 * (a - b)", "ties(a, b)", "pcb(a, b)", "breadcrumbs(a, top=0.1, bottom=0.2)", "dare(a)", "tsv(a, b)"]


FILES = [(recipe, "safetensors") for recipe in RECIPES] + [(recipe, "pt") for recipe in RECIPES[:2]]


@pytest.mark.parametrize(("recipe", "ending"), FILES)
def test_masks_stay_and_all_else_moves(folder, monkeypatch, recipe, ending):
    base = open_weights("base.safetensors")
    paths = {name: f"{name}.{ending}" for name in "ab"}
    monkeypatch.setattr("tva.compose.engine.CHUNK", 100)
    report = compose("base.safetensors", paths, recipe, "out.safetensors")
    given = {name: TaskVector.between(base, open_weights(path)) for name, path in paths.items()}
    expected = Recipe(recipe, given).evaluate(given).apply_to(base)
    edited = open_weights("out.safetensors")
    for name in base:
        still = ~base[name].isfinite()
        assert torch.equal(edited[name].isnan(), base[name].isnan())
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[base[name].itemsize]
        assert torch.equal(edited[name].view(bits)[still], base[name].view(bits)[still])
        assert torch.equal(edited[name].view(bits), expected[name].view(bits))
    assert not torch.equal(edited["mixed"][~still.any()], base["mixed"][~still.any()])
    assert all(torch.tensor(effect.relative_change).isfinite() for effect in report.effects.values())
    assert report.effects["w"].changed == report.effects["mixed"].changed == 1
    assert verify("out.safetensors").holds


METHODS = [
    "a",
    "b + 0 * a",
    "breadcrumbs(a)",
    "cart(a, b)",
    "consensus(a, b)",
    "dare(a, drop=0.9)",
    "della(a)",
    "emr(a, b)",
    "emr(a, b, task=2)",
    "iso_c(a, b)",
    "iso_cts(a, b)",
    "lines(a, first=0.5, last=1)",
    "magnitude(b, density=0.3) + magnitude(a, density=0.3)",
    "mean(a, b)",
    "model_stock(a, b)",
    "pcb(a, b)",
    "rescale(b, a)",
    "sce(a, b)",
    "sign_consensus(a, b)",
    "slerp(a, b)",
    "svc(a + b, a, b)",
    "tall(a, b, task=2)",
    "ties(a, b)",
    "tsv(a, b)",
    "wudi(a, b)",
]


@pytest.mark.parametrize("recipe", METHODS)
@pytest.mark.parametrize("value", [INF, NAN])
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_every_method_refuses_a_diverged_model_by_file_and_tensor(recipe, value, ending):
    generator = torch.Generator().manual_seed(2)
    base = {"h.0.w": torch.randn(30, 20, generator=generator), "h.1.w": torch.randn(40, generator=generator)}
    save_weights(base, "base.safetensors")
    save_weights({key: x + 0.1 * torch.randn(x.shape, generator=generator) for key, x in base.items()}, "b.safetensors")
    tuned = {key: x + 0.1 * torch.randn(x.shape, generator=generator) for key, x in base.items()}
    tuned["h.0.w"][3, 4] = value
    save_weights(tuned, "a.safetensors") if ending == "safetensors" else torch.save(tuned, "a.pt")
    message = f"The edited 'h.0.w' would hold NaN or infinity: a.{ending}, the vector a holds such there"
    with pytest.raises(ValueError, match=message):
        compose("base.safetensors", {"a": f"a.{ending}", "b": "b.safetensors"}, recipe, "out.safetensors")
    assert sorted(path.name for path in Path().iterdir()) == [f"a.{ending}", "b.safetensors", "base.safetensors"]


def test_opposite_infinities_are_refused():
    base = {"w": torch.zeros(50)}
    save_weights(base, "base.safetensors")
    for name, value in (("a", INF), ("b", -INF)):
        save_weights({"w": torch.ones(50).index_fill(0, torch.tensor(7), value)}, f"{name}.safetensors")
    paths = {name: f"{name}.safetensors" for name in "ab"}
    with pytest.raises(ValueError, match=r"a.safetensors, the vector a and .*b.safetensors, the vector b hold such"):
        compose("base.safetensors", paths, "ties(a, b)", "out.safetensors")
