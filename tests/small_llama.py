"""Tiny Llama models in folders, with tokenizers, as transformers saves them."""

import json

import torch

from tva import save_weights

WIDTH, INNER = 8, 12


def llama_weights(seed, layers=4, vocab=12, noise=0.0):
    """Return weights of a tiny Llama: around those of seed 0 where there is noise, whose seed it then is."""
    generator = torch.Generator().manual_seed(0 if noise else seed)
    shapes = {
        "model.embed_tokens.weight": (vocab, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (vocab, WIDTH),
    }
    for at in range(layers):
        layer = {"self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (WIDTH // 2, WIDTH)}
        layer |= {"self_attn.v_proj": (WIDTH // 2, WIDTH), "self_attn.o_proj": (WIDTH, WIDTH)}
        layer |= {"mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH), "mlp.down_proj": (WIDTH, INNER)}
        layer |= {"input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,)}
        shapes |= {f"model.layers.{at}.{name}.weight": shape for name, shape in layer.items()}
    moved = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in sorted(shapes.items()):
        rows = (1000, *shape[1:]) if name.startswith(("lm_head", "model.embed")) else shape  # the first rows stay
        whole = torch.randn(rows, generator=generator) * 0.5 + (1.0 if "norm" in name else 0.0)
        weights[name] = (whole + noise * torch.randn(rows, generator=moved))[: shape[0]].clone()
    return weights


def save_llama(folder, seed, layers=4, vocab=12, dtype=torch.float32, noise=0.0, **changes):
    """Write a tiny Llama with its configuration and tokenizer."""
    folder.mkdir(parents=True)
    weights = llama_weights(seed, layers, vocab, noise)
    save_weights({name: value.to(dtype) for name, value in weights.items()}, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "num_hidden_layers": layers,
        "hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 32, "tie_word_embeddings": False, "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | changes))
    tokenizer = {
        "model": {"type": "BPE", "vocab": {f"t{i}": i for i in range(vocab)}, "merges": []},
        "added_tokens": [],
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def save_lora(folder, seed, layers=4, rank=2):
    """Write a LoRA adapter of the query projections; return what it adds to each."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors, added = {}, {}
    for at in range(layers):
        module = f"model.layers.{at}.self_attn.q_proj"
        down, up = (torch.randn(shape, generator=generator) * 0.2 for shape in ((rank, WIDTH), (WIDTH, rank)))
        tensors |= {f"base_model.model.{module}.lora_A.weight": down, f"base_model.model.{module}.lora_B.weight": up}
        added[f"{module}.weight"] = 2 * up.double() @ down.double()
    save_weights(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return added


def logits(folder):
    """Return the logits of a folder's model for fixed tokens, computed in float64."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        return model(torch.tensor([[1, 5, 3, 2, 7]])).logits
