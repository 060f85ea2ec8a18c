"""Whatever an edit was made of: `tva verify` holds, `tva revert` gives the base back, `tva vectors match` finds k."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tva import TaskVector, open_weights, save_weights
from tva.checkpoints import fingerprint
from tva.compose.apply import compose
from tva.compose.revert import revert
from tva.compose.verify import verify
from tva.merge import METHODS
from tva.vectors.compress import compress
from tva.vectors.match import match

SHAPES = {f"layers.{layer}.{name}.weight": (20, 24) for layer in range(3) for name in ("q", "mlp")}
SHAPES |= {"layers.0.norm": (24,), "layers.2.scalar": (), "embed": (30, 20)}
FILES = "files=('gram.safetensors', 'gram.safetensors')"
RECIPES = {
    "analogy": "analogy(a, b, c)",
    "breadcrumbs": "0.4 * (breadcrumbs(a) + breadcrumbs(b, top=0.1, bottom=0.7, rows=True))",
    "cart": "cart(a, b, c, rank=0.2)",
    "consensus": "0.4 * consensus(a, b, c)",
    "dare": "0.4 * (dare(a) + dare(b, seed=1))",
    "della": "0.4 * (della(a) + della(b, seed=1))",
    "emr": "emr(a, b, task=1)",
    "fisher": f"fisher(a, b, {FILES.replace('gram', 'fisher')}, normalize=True)",
    "iso_c": "iso_c(a, b)",
    "iso_cts": "iso_cts(a, b, c)",
    "lines": "lines(a + b, first=0.2, last=0.9)",
    "magnitude": "magnitude(a, density=0.2)",
    "mean": "mean(a, b, c)",
    "model_stock": "model_stock(a, b)",
    "pcb": "1.2 * pcb(a, b)",
    "regmean": f"regmean(a, b, {FILES}, exclude='embed')",
    "rescale": "rescale(magnitude(a, density=0.2), a)",
    "sce": "sce(a, b, density=0.3)",
    "sign_consensus": "sign_consensus(a, b, c)",
    "slerp": "slerp(a, b)",
    "svc": "svc(mean(a, b), a, b)",
    "tall": "tall(a, b, task=2)",
    "ties": "0.8 * ties(a, b, c)",
    "tsv": "tsv(a, b)",
    "wudi": "wudi(a, b, steps=20)",
}


def state(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def folder(request, tmp_path, monkeypatch):
    """Base, three vectors and statistics, in the folder to work in."""
    monkeypatch.chdir(tmp_path)
    base = state(0, request.param)
    save_weights(base, "base.safetensors")
    for seed, name in enumerate("abc", start=1):
        noise = state(seed)
        finetuned = {key: (value.float() + 0.05 * noise[key]).to(value.dtype) for key, value in base.items()}
        TaskVector.between(base, finetuned).save(f"{name}.tv.safetensors")
        torch.save({"state_dict": finetuned}, f"{name}.ckpt")
    save_weights({key: torch.rand(shape) for key, shape in SHAPES.items()}, "fisher.safetensors")
    grams = {key: torch.randn(50, shape[1]) for key, shape in SHAPES.items() if len(shape) == 2}
    save_weights({key: inputs.T @ inputs for key, inputs in grams.items()}, "gram.safetensors")
    return tmp_path


def assert_verified_and_reverted(recipe, vectors=None, output="out.safetensors", keep_undo=True, **options):
    """Make an edit, verify it, and undo it."""
    vectors = vectors or {name: f"{name}.tv.safetensors" for name in "abc"}
    compose("base.safetensors", vectors, recipe, output, keep_undo=keep_undo, **options)
    verified = verify(output)
    assert verified.holds, str(verified)
    revert(output, output="back.safetensors")
    assert fingerprint(open_weights("back.safetensors")) == fingerprint(open_weights("base.safetensors"))


def test_every_method_has_a_recipe_here():
    assert RECIPES.keys() == METHODS.keys()


@pytest.mark.parametrize("method", RECIPES)
def test_edits_by_every_method(folder, method):
    assert_verified_and_reverted(RECIPES[method])


@pytest.mark.parametrize("keep_undo", [True, "with_vectors"])
@pytest.mark.parametrize("method", ["ties", "dare", "tsv", "pcb"])
def test_edits_into_shards(folder, method, keep_undo):
    assert_verified_and_reverted(RECIPES[method], output="out", max_shard_size="3KB", keep_undo=keep_undo)
    assert len(list((folder / "out").glob("model-*.safetensors"))) > 2


def test_edits_by_group_and_to_another_dtype(folder):
    coefs = {"s": {"mlp": [0.1, 0.6, 0.2], "layer": 0.3, ".*": 0.0}, "t": 0.5}
    assert_verified_and_reverted("s * a - t * ties(b, c)", coefs=coefs, scaling_coef=0.7, dtype="float16")


@pytest.mark.parametrize("encoding", ["exact", "bf16", "int8", "sign", "top_k(density=0.1)", "low_rank(rank=2)"])
def test_edits_with_compressed_vectors(folder, encoding):
    compress("a.tv.safetensors", output="small.tv.safetensors", encoding=encoding)
    vectors = {"a": "small.tv.safetensors", "b": "b.ckpt"}
    assert_verified_and_reverted("ties(a, b) + 0.1 * a", vectors)


def test_edits_with_an_adapter(folder):
    (folder / "lora").mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q", "mlp"], "bias": "none"}
    (folder / "lora/adapter_config.json").write_text(json.dumps(settings))
    factors = {}
    for name in (name.removesuffix(".weight") for name in SHAPES if name.endswith(".weight")):
        factors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, 24) * 0.1
        factors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(20, 2) * 0.1
    save_file(factors, folder / "lora/adapter_model.safetensors")
    assert_verified_and_reverted("0.5 * (a + b)", {"a": "lora", "b": "b.tv.safetensors"})


@pytest.mark.parametrize("k", [-1.0, -0.4, 0.001, 1.0, 3.0])
def test_k_is_found_again(folder, k):
    compose("base.safetensors", {"a": "a.tv.safetensors"}, "a", "out.safetensors", scaling_coef=k)
    names = [f"{name}.tv.safetensors" for name in "cba"]
    found = match("out.safetensors", names, base="base.safetensors")
    (fit,) = (fit for fit in found.fits if fit.path == "a.tv.safetensors")
    assert abs(fit.coef - k) <= found.rounding * found.distance / fit.norm + 1e-6  # as far as rounding lets it go
    assert fit.exact
    if abs(k) >= 0.4:
        assert found.fits[0] is fit
    assert found.joint["a.tv.safetensors"] == pytest.approx(fit.coef, abs=1e-2)
