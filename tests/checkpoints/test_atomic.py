"""Files are written whole or not at all, and equal ones are equal."""

import torch
from safetensors import safe_open

from tva import save_weights


def test_equal_weights_are_equal_files_whatever_the_text_in_their_headers(tmp_path):
    about = {f"key {n}": 'a "quoted" ü\n\x01\x7f/' * n for n in range(9)}
    for name in ("one", "two"):
        save_weights({"w": torch.ones(3, 2), "b": torch.zeros(5)}, tmp_path / f"{name}.safetensors", about)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        assert file.metadata() == about
        assert torch.equal(file.get_tensor("w"), torch.ones(3, 2))
