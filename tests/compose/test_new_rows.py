"""Fine-tuned models with more tokens than their base, and tokenizers that do not agree."""

import json
from pathlib import Path

import pytest
import torch
from small_llama import logits, save_llama

from tva import open_weights
from tva.compose.apply import compose
from tva.compose.verify import verify

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def models():
    return {
        "base": save_llama(Path("base"), 0),
        "a": save_llama(Path("a"), 1, vocab=15, noise=0.1),
        "b": save_llama(Path("b"), 2, vocab=14, noise=0.1),
    }


def run(models, recipe="0.5 * a", names="a", output="out", **options):
    compose(models["base"], {name: models[name] for name in names}, recipe, output, **options)
    assert verify(output).holds
    return open_weights(output)


def test_the_choices_are_in_the_error(models):
    with pytest.raises(ValueError, match="--new_rows.*keep.*zero.*drop") as error:
        run(models)
    assert "12 and 15" in str(error.value)
    assert not Path("out").exists()
    with pytest.raises(ValueError, match="new_rows must be one of error, keep, zero, drop; found 'all'"):
        run(models, new_rows="all")


@pytest.mark.parametrize("choice", ["keep", "zero", "drop"])
def test_new_rows_are_what_was_chosen_and_shared_rows_are_edited(models, choice):
    out, base, a = run(models, new_rows=choice), open_weights(models["base"]), open_weights(models["a"])
    for name in (EMBED, HEAD):
        shared = base[name].double() + 0.5 * (a[name][:12].double() - base[name].double())
        torch.testing.assert_close(out[name][:12].double(), shared, rtol=1e-6, atol=1e-7)
        new = {"keep": a[name][12:], "zero": torch.zeros(3, 8), "drop": torch.zeros(0, 8)}[choice]
        assert torch.equal(out[name][12:], new)
    config = json.loads(Path("out/config.json").read_text())
    assert config["vocab_size"] == (12 if choice == "drop" else 15)
    donor = models["base" if choice == "drop" else "a"]
    assert Path("out/tokenizer.json").read_text() == (donor / "tokenizer.json").read_text()


@pytest.mark.slow
def test_transformers_loads_the_grown_model(models):
    run(models, new_rows="keep")
    assert logits(Path("out")).shape[-1] == 15


def test_of_several_models_the_new_rows_are_the_mean_of_those_that_have_them(models):
    out = run(models, "a - b", "ab", new_rows="keep")
    a, b = open_weights(models["a"])[EMBED], open_weights(models["b"])[EMBED]
    assert torch.equal(out[EMBED][12:14], ((a[12:14].double() + b[12:14]) / 2).float())
    assert torch.equal(out[EMBED][14:], a[14:])
    assert len(json.loads(Path("out/tokenizer.json").read_text())["model"]["vocab"]) == 15


def test_tokenizers_must_give_the_shared_ids_to_the_same_tokens(models):
    tokens = {f"t{i}": i for i in range(15)} | {"t3": 4, "t4": 3}
    (models["a"] / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}, "added_tokens": []}))
    with pytest.raises(ValueError, match=r'2 of 12 ids in both are other tokens: .3: "t3" and "t4".*allow_other'):
        run(models, new_rows="keep")
    run(models, new_rows="keep", allow_other_tokenizer=True)


def test_other_files_of_vocabularies_are_compared_too(models):
    for name, order in (("base", "abc"), ("a", "acb")):
        (models[name] / "tokenizer.json").unlink()
        (models[name] / "vocab.txt").write_text("\n".join(order) + "\n")
    with pytest.raises(ValueError, match="2 of 3 ids"):
        run(models, new_rows="drop")
    for name, order in (("base", "abc"), ("a", "abc")):
        (models[name] / "vocab.txt").unlink()
        (models[name] / "vocab.json").write_text(json.dumps({token: at for at, token in enumerate(order)}))
    (models["a"] / "added_tokens.json").write_text(json.dumps({"<end>": 2}))
    with pytest.raises(ValueError, match='1 of 3 ids.*2: "c" and "<end>"'):
        run(models, new_rows="drop")


def test_whose_tokenizer_the_output_gets_may_be_said(models):
    run(models, new_rows="keep", tokenizer="base")
    assert Path("out/tokenizer.json").read_text() == (models["base"] / "tokenizer.json").read_text()
    with pytest.raises(ValueError, match="tokenizer must name an input, 'a', 'base'; found 'c'"):
        run(models, output="2", tokenizer="c")
    with pytest.raises(ValueError, match="gives ids up to 14, and the output has 12 rows"):
        run(models, output="3", new_rows="drop", tokenizer="a")
    assert not Path("3").exists()


def test_an_undo_file_does_not_go_with_new_rows(models):
    with pytest.raises(ValueError, match="keep_undo restores a base of the output's shapes, which new rows change"):
        run(models, new_rows="keep", keep_undo=True)


def test_what_does_not_fit_is_said_by_the_plan_too(models):
    with pytest.raises(ValueError, match="gives ids up to 14, and the output has 12 rows"):
        run(models, new_rows="drop", tokenizer="a", plan=True)
