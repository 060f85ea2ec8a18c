"""Files are written whole or not at all, and equal ones are equal."""

from pathlib import Path

import torch
from safetensors import safe_open

from tva import save_weights


def test_equal_weights_are_equal_files_whatever_the_text_in_their_headers():
    about = {f"key {n}": 'a "quoted" ü\n\x01\x7f/' * n for n in range(9)}
    for name in ("one", "two"):
        save_weights({"w": torch.ones(3, 2), "b": torch.zeros(5)}, f"{name}.safetensors", about)
    assert Path("one.safetensors").read_bytes() == Path("two.safetensors").read_bytes()
    with safe_open("one.safetensors", "pt") as file:
        assert file.metadata() == about
        assert torch.equal(file.get_tensor("w"), torch.ones(3, 2))
