"""A small network, and LoRA adapters of it, with peft's own merge as the reference."""

import pytest
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.block = nn.ModuleDict({"q": nn.Linear(6, 8), "k": nn.Linear(8, 6, bias=False)})
        self.conv = nn.Conv2d(2, 4, 3)
        self.point = nn.Conv2d(4, 3, 1)
        self.head = nn.Linear(6, 3)


def net():
    torch.manual_seed(0)
    return Net()


def adapted(folder, base=None, safe=True, seed=1, **settings):
    """Train nothing, but give every factor a value, save with peft, and merge with peft as the reference."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(base or net(), peft.LoraConfig(**{"r": 3, "lora_alpha": 5, **settings}))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens_delta")):
            parameter.data.normal_(generator=generator)
    model.save_pretrained(folder, safe_serialization=safe, save_embedding_layers=False)
    return model.merge_and_unload().state_dict()
