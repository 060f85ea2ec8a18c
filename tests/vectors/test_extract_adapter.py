"""Adapters extracted from two checkpoints are the best of their rank, and the stated error is true."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_adapters import net

from tva import save_weights
from tva.cli.main import main
from tva.errors import NoEffectError
from tva.vectors import extract

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(fan_in_fan_out|missing adapter keys|tie_word_embeddings)"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


def make(folder, model, moved, size=0.1):
    """Write a base and a fine-tuned model of which some tensors moved."""
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(3)
    tuned = {
        name: tensor + size * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        if any(part in name for part in moved)
        else tensor
        for name, tensor in base.items()
    }
    save_weights(base, folder / "base.safetensors")
    save_weights(tuned, folder / "tuned.safetensors")
    return base, tuned, str(folder / "base.safetensors"), str(folder / "tuned.safetensors")


def merged(model, folder):
    loaded = peft.PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
    return loaded.merge_and_unload().state_dict()


@pytest.mark.parametrize("rank", [2, 16])
def test_the_adapter_is_the_best_of_its_rank_and_its_error_is_stated(rank):
    base, tuned, *paths = make(Path(), net().double(), ["q", "k.weight", "conv.weight", "embed_tokens", "head.weight"])
    report = extract(*paths, "new", rank=rank)
    found = merged(net().double(), Path("new"))
    lost = norm = 0.0
    for name, start in base.items():
        delta, error = tuned[name] - start, float((found[name] - tuned[name]).square().sum())
        lost, norm = lost + error, norm + float(delta.square().sum())
        if delta.ndim == 2:
            best = float(torch.linalg.svdvals(delta)[rank:].square().sum())
            assert error == pytest.approx(best, abs=1e-10)
        elif name in report.left_out:
            assert torch.equal(found[name], start)
        else:
            torch.testing.assert_close(found[name], tuned[name], rtol=0, atol=1e-6)
    assert report.left_out == ["block.q.bias"]
    assert report.whole == ["conv"]
    assert report.error == pytest.approx((lost / norm) ** 0.5, rel=1e-4)
    names = load_file("new/adapter_model.safetensors")
    assert names["base_model.model.block.q.lora_A.weight"].shape == (min(rank, 6), 6)


def test_an_extracted_adapter_of_a_language_model_is_that_of_peft_also_where_the_head_is_tied():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config).double()
    model.save_pretrained("base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained("tuned")
    report = extract("base", "tuned", "new", rank=16)
    assert report.error < 1e-6
    assert "is tied to the output layer: merge the adapter before use" in report.notes[-1]
    start = transformers.LlamaForCausalLM.from_pretrained("base", dtype=torch.float64)
    ids = torch.arange(24)[None]
    found = peft.PeftModel.from_pretrained(start, "new", autocast_adapter_dtype=False).merge_and_unload()
    torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_transposed_layers_of_gpt2_keep_their_layout():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=24, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    model = transformers.GPT2LMHeadModel(config).double().eval()
    model.save_pretrained("base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained("tuned")
    report = extract("base", "tuned", "new", rank=16)
    start = transformers.GPT2LMHeadModel.from_pretrained("base", dtype=torch.float64)
    found = peft.PeftModel.from_pretrained(start, "new", autocast_adapter_dtype=False).merge_and_unload()
    ids = torch.arange(8)[None]
    torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert report.error < 1e-6


def test_the_command_states_the_error_and_what_it_leaves_out(capsys):
    *_, base, tuned = make(Path(), net(), ["q", "k", "head"])
    main(["extract", "--base", base, "--finetuned", tuned, "--output", "new", "--rank", "2"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "left out 2 biases beside factors: 'block.q.bias', 'head.bias'" in printed
    assert re.search(r"an adapter of 3 modules of rank 2, .* it lacks [\d.]+% of the change, at most [\d.]+%", printed)
    assert json.loads(Path("new/adapter_config.json").read_text())["base_model_name_or_path"] == base


def test_what_no_adapter_can_hold_is_named():
    base = {"experts.gate_up_proj": torch.zeros(2, 3, 4), "l.weight": torch.zeros(3, 3)}
    save_weights(base, "base.safetensors")
    save_weights({name: tensor + 1 for name, tensor in base.items()}, "tuned.safetensors")
    paths = (Path("base.safetensors"), Path("tuned.safetensors"))
    with pytest.raises(ValueError, match="'experts.gate_up_proj' moved, and is not the weight of a module.*exclude"):
        extract(*paths, "new", rank=2)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        extract(*paths, "new", rank=0)
    with pytest.raises(ValueError, match="must be a folder for an adapter"):
        extract(*paths, "new.safetensors", rank=2)
    assert extract(*paths, "new", rank=2, exclude="experts").ranks == (1, 1)
    with pytest.raises(NoEffectError, match="No matrix differs"):
        extract(paths[0], paths[0], "other", rank=2)
