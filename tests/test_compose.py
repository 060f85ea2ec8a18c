"""Composing on disk: the bytes of the in-memory path whatever the pieces, whole files or none, and its account."""

import json

import pytest
import torch

import tva.compose
from tva import MismatchError, NoEffectError, TaskVector, fingerprint, open_weights, save_weights
from tva.compose import compose, parse_bytes
from tva.recipe import Recipe

RECIPES = [
    "a",
    "-0.3 * a",
    "0.5 * (a + b - 2 * c)",
    "analogy(a, b, c)",
    "mean(a, b, c)",
    "ties(a, b, c, density=0.3)",
    'ties(a, b, c, density=0.3, trim="tensor", combine="sum")',
    "dare(a, drop=0.5, seed=3) + magnitude(b, density=0.4)",
    '0.4 * ties(dare(a, drop=0.5), magnitude(b, density=0.5), c, trim="tensor")',
    "ties(ties(a, b), c)",
]


def state(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"l.0.w": (40, 30), "l.1.w": (25, 40), "scalar": (), "empty": (0, 3), "bias": (25,), "still": (4,)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    tensors["still"] = torch.ones(4, dtype=dtype)
    return {**tensors, "bn.running_mean": torch.randn(3, generator=generator), "steps": torch.tensor(seed)}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def files(request, tmp_path):
    """A base, two fine-tuned checkpoints of two formats and one task vector file."""
    base = state(0, request.param)
    save_weights(base, tmp_path / "base.safetensors")
    torch.save({"state_dict": state(1, request.param)}, tmp_path / "a.ckpt")
    save_weights(state(2, request.param), tmp_path / "b.safetensors")
    TaskVector.between(base, state(3, request.param)).save(tmp_path / "c.tv.safetensors")
    vectors = {"a": "a.ckpt", "b": "b.safetensors", "c": "c.tv.safetensors"}
    return str(tmp_path / "base.safetensors"), {name: str(tmp_path / file) for name, file in vectors.items()}


def in_memory(base, vectors, recipe, coef):
    weights = open_weights(base)
    loaded = {
        name: TaskVector.load(path) if "tv" in path else TaskVector.between(weights, open_weights(path))
        for name, path in vectors.items()
    }
    return Recipe(recipe, loaded).evaluate(loaded).apply_to(weights, coef)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("piece", [7, 100, 2**18])
def test_the_bytes_are_those_of_the_in_memory_path_whatever_the_pieces(files, tmp_path, monkeypatch, recipe, piece):
    monkeypatch.setattr(tva.compose, "_piece_size", lambda *_: piece)
    base, vectors = files
    report = compose(base, vectors, recipe, str(tmp_path / "out.safetensors"), scaling_coef=0.7)
    expected = fingerprint(in_memory(base, vectors, recipe, 0.7))
    assert fingerprint(open_weights(tmp_path / "out.safetensors")) == expected == report.edited
    assert report.base == fingerprint(open_weights(base))


def test_coefficient_zero_writes_the_base(files, tmp_path):
    base, vectors = files
    compose(base, vectors, "ties(a, b)", str(tmp_path / "out.safetensors"), scaling_coef=0)
    assert fingerprint(open_weights(tmp_path / "out.safetensors")) == fingerprint(open_weights(base))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_output_dtype_rounds_once_and_leaves_integers(files, tmp_path, dtype):
    base, vectors = files
    compose(base, vectors, "0.5 * a + 0.25 * b", str(tmp_path / "out.safetensors"), dtype=dtype)
    edited, weights = open_weights(tmp_path / "out.safetensors"), open_weights(base)
    a, b = open_weights(vectors["a"]), open_weights(vectors["b"])
    wanted = getattr(torch, dtype)
    for name in ("l.0.w", "scalar", "bias"):
        start = weights[name].float()
        delta = 0.5 * (a[name].float() - start) + 0.25 * (b[name].float() - start)
        assert torch.equal(edited[name], (start + delta).to(wanted)), name
    assert edited["steps"].dtype == torch.int64
    assert torch.equal(edited["bn.running_mean"], weights["bn.running_mean"].to(wanted))


def test_prefixes_are_matched_and_said_and_the_rest_is_mapped(files, tmp_path):
    base, vectors = files
    wrapped = {f"model.{name}": tensor for name, tensor in open_weights(vectors["b"]).items()}
    save_weights(wrapped, tmp_path / "wrapped.safetensors")
    renamed = {name.replace("l.0", "first"): tensor for name, tensor in open_weights(vectors["b"]).items()}
    save_weights(renamed, tmp_path / "renamed.safetensors")
    plain = compose(base, {"b": vectors["b"]}, "b", str(tmp_path / "plain.safetensors"))
    same = compose(base, {"b": str(tmp_path / "wrapped.safetensors")}, "b", str(tmp_path / "same.safetensors"))
    assert same.edited == plain.edited
    assert "stripped 'model.' from 8 of 8 names" in same.notes[0]
    odd = {"b": str(tmp_path / "renamed.safetensors")}
    with pytest.raises(MismatchError, match="Map the rest by key_map"):
        compose(base, odd, "b", str(tmp_path / "odd.safetensors"))
    mapped = compose(base, odd, "b", str(tmp_path / "mapped.safetensors"), key_map={"^first": "l.0"})
    assert mapped.edited == plain.edited


def test_a_lora_adapter_is_a_vector_like_any_other(tmp_path):
    base = {"q.weight": torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), "q.bias": torch.zeros(6)}
    save_weights(base, tmp_path / "base.safetensors")
    a, b = torch.randn(2, 4), torch.randn(6, 2)
    factors = {"base_model.model.q.lora_A.weight": a, "base_model.model.q.lora_B.weight": b}
    (tmp_path / "adapter").mkdir()
    save_weights(factors, tmp_path / "adapter/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q"]}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    arguments = (str(tmp_path / "base.safetensors"), {"v": str(tmp_path / "adapter")}, "-0.5 * v")
    compose(*arguments, str(tmp_path / "out.safetensors"))
    expected = base["q.weight"].double() - 0.5 * 4 * b.double() @ a.double()
    edited = open_weights(tmp_path / "out.safetensors")
    torch.testing.assert_close(edited["q.weight"].double(), expected, rtol=0, atol=2e-6)
    assert torch.equal(edited["q.bias"], base["q.bias"])


def test_the_account_counts_what_rounding_swallowed(tmp_path):
    base = {"x.a.w": torch.ones(100, dtype=torch.bfloat16), "x.b.w": torch.ones(50, dtype=torch.bfloat16)}
    delta = {"x.a.w": torch.cat([torch.full((40,), 1e-4), torch.zeros(30), torch.full((30,), 0.5)])}
    save_weights(base, tmp_path / "base.safetensors")
    vector = TaskVector(delta, untouched={"x.b.w": "frozen"})
    vector.save(tmp_path / "v.tv.safetensors")
    arguments = (str(tmp_path / "base.safetensors"), {"v": str(tmp_path / "v.tv.safetensors")})
    report = compose(*arguments, "v", str(tmp_path / "out.safetensors"))
    (effect,) = report.effects.values()
    assert (effect.tensors, effect.changed, effect.elements, effect.vanished) == (1, 1, 70, 40)
    assert effect.relative_change == pytest.approx((30 * 0.25 / 100) ** 0.5)
    with pytest.raises(NoEffectError, match="every delta of v is zero, or vanishes"):
        compose(*arguments, "v", str(tmp_path / "none.safetensors"), scaling_coef=1e-6)
    assert not (tmp_path / "none.safetensors").exists()


@pytest.mark.parametrize("damage", ["nan", "missing", "shape", "base"])
def test_what_does_not_fit_is_refused_and_leaves_no_file(files, tmp_path, damage):
    base, vectors = files
    other = dict(open_weights(vectors["b"]))
    if damage == "nan":
        other["bias"] = torch.full_like(other["bias"], float("nan"))
        message, error = "'bias' holds NaN or infinity", ValueError
    elif damage == "missing":
        del other["bias"]
        message, error = "1 of the base's 8 names are not there: 'bias'", MismatchError
    elif damage == "shape":
        other["bias"] = other["bias"][:-1]
        message, error = "shapes differ in 'bias'", MismatchError
    save_weights(other, tmp_path / "other.safetensors")
    if damage == "base":
        message, error = "was taken from the base .*, and in the base given '.*' is another", MismatchError
        with pytest.raises(error, match=message):
            compose(vectors["b"], {"c": vectors["c"]}, "c", str(tmp_path / "out.safetensors"))
        compose(vectors["b"], {"c": vectors["c"]}, "c", str(tmp_path / "allowed.safetensors"), allow_other_base=True)
    else:
        with pytest.raises(error, match=message):
            compose(base, {"b": str(tmp_path / "other.safetensors")}, "b", str(tmp_path / "out.safetensors"))
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith((".", "out"))]


def test_a_full_disk_is_one_error_and_leaves_no_file(files, tmp_path, monkeypatch):
    base, vectors = files

    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if len(memoryview(data).cast("B")) > 500:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

    behind = tva.compose._behind
    monkeypatch.setattr(tva.compose, "_behind", lambda file: behind(Full(file)))
    with pytest.raises(OSError, match="No space left"):
        compose(base, vectors, "a", str(tmp_path / "out.safetensors"))
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith((".", "out"))]


def test_sizes_are_read_and_too_little_memory_is_refused(files, tmp_path):
    assert parse_bytes("1.5 GiB") == 3 * 2**29
    for text in ("much", "-1GB", "5 XB"):
        with pytest.raises(ValueError, match="must read like"):
            parse_bytes(text)
    base, vectors = files
    with pytest.raises(ValueError, match="max_memory must leave"):
        compose(base, vectors, "a", str(tmp_path / "out.safetensors"), max_memory="1MiB")
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        compose(base, vectors, "a", str(tmp_path / "out.bin"))
    with pytest.raises(ValueError, match="dtype must be one of"):
        compose(base, vectors, "a", str(tmp_path / "out.safetensors"), dtype="int8")
