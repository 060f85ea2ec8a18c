"""Extract within a limit of memory: refused before anything is written, or the same file."""

from pathlib import Path

import pytest
import torch

from tva import save_weights
from tva.cli.main import main
from tva.sizes import SLACK
from tva.vectors.extract import extract


@pytest.fixture
def models(tmp_path, monkeypatch):
    base = {"m.weight": torch.zeros(700, 700), "m.bias": torch.zeros(700)}
    save_weights(base, "base.safetensors")
    save_weights({name: tensor + 1 for name, tensor in base.items()}, "tuned.safetensors")
    torch.save({name: tensor.T if tensor.ndim == 2 else tensor for name, tensor in base.items()}, "strided.pt")
    monkeypatch.setattr("tva.sizes.anonymous_memory", lambda: 2**28)  # whatever this process takes
    return tmp_path


def limit(mib):
    return f"{2**28 + SLACK + mib * 2**20}"


def test_a_mapped_base_takes_chunks_only_and_one_of_another_layout_is_counted_whole(models, capsys):
    extract("base.safetensors", "tuned.safetensors", "a.tv.safetensors")
    extract("base.safetensors", "tuned.safetensors", "b.tv.safetensors", max_memory=limit(8))
    main(["verify", "b.tv.safetensors"])
    with pytest.raises(ValueError, match=f"the largest tensor, 'm.weight', takes .* found {limit(2)}"):
        extract("base.safetensors", "tuned.safetensors", "c.tv.safetensors", max_memory=limit(2))
    with pytest.raises(ValueError, match="the largest tensor, 'm.weight'"):
        extract("strided.pt", "tuned.safetensors", "c.tv.safetensors", max_memory=limit(8))
    extract("strided.pt", "tuned.safetensors", "c.tv.safetensors", max_memory=limit(12))
    with pytest.raises(ValueError, match="decomposing the largest matrix, 'm.weight', takes 30 MiB"):
        extract("base.safetensors", "tuned.safetensors", "lora", rank=1, max_memory=limit(20))
    assert not Path("lora").exists()
    words = [
        "extract",
        "--base",
        "base.safetensors",
        "--finetuned",
        "tuned.safetensors",
        "--output",
        "d.tv.safetensors",
    ]
    with pytest.raises(SystemExit):
        main([*words, "--max_memory", "1MiB"])
    assert "max_memory must be" in capsys.readouterr().err
