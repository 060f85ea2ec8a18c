"""tva-tiny's weights ship compressed, and lose nothing by it."""

import safetensors.torch
import torch

from tva.models.tiny import _FOLDER, WEIGHTS, load, pack, unpack


def test_what_was_packed_comes_back_byte_for_byte():
    for odd in (0, 1, 2):
        tensors = {"a": torch.randn(7, 11).half(), "b": torch.randn(5).half(), "c": torch.ones(odd, dtype=torch.uint8)}
        file = safetensors.torch.save(tensors, {"name": "x"})
        assert unpack(pack(file)) == file


def test_the_model_has_the_float16_values_of_its_file():
    stored = safetensors.torch.load(unpack((_FOLDER / WEIGHTS).read_bytes()))
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    for name, tensor in load()[0].state_dict().items():
        assert torch.equal(tensor, stored[name].float()), name
