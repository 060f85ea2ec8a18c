"""Models made of layers of other models, and models with an adapter on top."""

import json
from pathlib import Path

import pytest
import torch
from small_llama import llama_weights, logits, save_llama, save_lora

from tva import open_weights, save_weights
from tva.compose.apply import compose
from tva.compose.verify import verify


@pytest.fixture
def models():
    types = ["full_attention", "sliding_attention"] * 2
    return {
        "base": save_llama(Path("base"), 0, layer_types=types),
        "a": save_llama(Path("a"), 1, noise=0.1, layer_types=types[::-1]),
    }


def stack(models, tmp_path, slices, recipe="base", scaling_coef=0.0, **options):
    compose(models["base"], {"a": models["a"]}, recipe, tmp_path / "out", None, scaling_coef, slices=slices, **options)
    assert verify(tmp_path / "out").holds
    return open_weights(tmp_path / "out")


def expected(parts):
    """Layers of models one after the other, between the first one's embeddings and the last one's head."""
    weights = {"base": llama_weights(0), "a": llama_weights(1, noise=0.1)}
    first, last = weights[parts[0][0]], weights[parts[-1][0]]
    found = {"model.embed_tokens.weight": first["model.embed_tokens.weight"]}
    found |= {name: last[name] for name in ("model.norm.weight", "lm_head.weight")}
    for new, (name, old) in enumerate(parts):
        inside = {key: value for key, value in weights[name].items() if key.startswith(f"model.layers.{old}.")}
        found |= {key.replace(f".{old}.", f".{new}.", 1): value for key, value in inside.items()}
    return found


PARTS = [("base", 0), ("base", 1), ("base", 2), ("a", 1), ("a", 2), ("a", 3)]


def test_layers_stand_one_after_the_other(models):
    out = stack(models, Path(), {"base": ["base[0:3]", "a[1:4]"]})
    assert {name: value.tolist() for name, value in out.items()} == {k: v.tolist() for k, v in expected(PARTS).items()}
    config = json.loads(Path("out/config.json").read_text())
    assert config["num_hidden_layers"] == 6
    full, sliding = "full_attention", "sliding_attention"
    assert config["layer_types"] == [full, sliding, full, full, sliding, full]


@pytest.mark.slow
def test_transformers_loads_the_deeper_model(models):
    models["base"] = save_llama(Path("plain"), 0)
    stack(models, Path(), {"base": ["base[0:3]", "base[1:4]"]})
    deeper = save_llama(Path("by hand"), 0, layers=6)
    save_weights(expected([("base", at) for at in (0, 1, 2, 1, 2, 3)]), deeper / "model.safetensors")
    torch.testing.assert_close(logits(Path("out")), logits(deeper))


def test_a_layer_that_is_there_twice_is_written_twice_and_may_be_edited_apart(models):
    slices = {"base": ["base[0:2]", "base[1:2]"], "b": ["a[0:2]", "base[1:2]"]}
    out = stack(models, Path(), slices, "b", 1.0)
    name, base, a = "model.layers.{}.mlp.up_proj.weight", llama_weights(0), llama_weights(1, noise=0.1)
    assert torch.equal(out[name.format(2)], base[name.format(1)])
    torch.testing.assert_close(out[name.format(1)], a[name.format(1)], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ({"base": ["base[0:5]"]}, r"base\[0:5\] needs layers up to 4, and .* has 4, from 0"),
        ({"base": ["c[0:2]"]}, r"inputs are 'a', 'base'; found 'c\[0:2\]'"),
        ({"base": ["base[2:2]"]}, "a range of its layers"),
        ({"base": [f"base[0:{'9' * 5000}]"]}, "a range of its layers"),
        ({"base": ["base"]}, r"such as 'base\[0:16\]'.*found 'base'"),
    ],
)
def test_slices_that_are_not_there_are_refused(models, slices, message):
    with pytest.raises(ValueError, match=message):
        stack(models, Path(), slices)
    assert not Path("out").exists()


def test_layers_of_another_width_are_refused(models):
    weights = {name: torch.ones(3, 3) for name in llama_weights(0)}
    save_weights(weights, models["a"] / "model.safetensors")
    with pytest.raises(ValueError, match="whose names or shapes differ: '.input_layernorm.weight'"):
        stack(models, Path(), {"base": ["base[0:3]", "a[1:4]"]})


def test_slices_have_no_undo_file(models):
    with pytest.raises(ValueError, match="which slices change"):
        stack(models, Path(), {"base": ["base[0:2]"]}, keep_undo=True)


def test_an_adapter_may_be_on_top_of_any_model(models, tmp_path):
    added = save_lora(Path("lora"), 0)
    vectors = {"a": models["a"], "b": f"{models['a']}+{tmp_path / 'lora'}"}
    compose(models["base"], vectors, "b - a", "out")
    assert verify("out").holds
    out, base = open_weights("out"), llama_weights(0)
    for name, value in base.items():
        torch.testing.assert_close(out[name].double(), value.double() + added.get(name, 0), rtol=0, atol=1e-6)


def test_the_base_may_have_an_adapter_on_top(models, tmp_path):
    added = save_lora(Path("lora"), 0)
    compose(f"{models['base']}+{tmp_path / 'lora'}", {}, "base", "out", scaling_coef=0)
    assert verify("out").holds
    out, base = open_weights("out"), llama_weights(0)
    for name, value in base.items():
        torch.testing.assert_close(out[name].double(), value.double() + added.get(name, 0), rtol=0, atol=1e-6)
    assert json.loads(Path("out/config.json").read_text())["num_hidden_layers"] == 4
    with pytest.raises(FileNotFoundError, match="at nothing, but nothing is there"):
        compose(models["base"], {"a": f"{models['a']}+nothing"}, "a", "2")
