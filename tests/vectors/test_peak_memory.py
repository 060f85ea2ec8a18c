"""compress and extract keep within --max_memory, measured in a process that holds nothing else."""

from pathlib import Path

import pytest
import torch
from small_memory import assert_within

from tva import save_weights

FIRST = "import torch; from tva.vectors.extract import extract; from tva.vectors.compress import compress"
NAMES = "globals().update(extract=__import__('tva.vectors.extract', fromlist=['x']).extract, " \
        "compress=__import__('tva.vectors.compress', fromlist=['x']).compress); "  # fmt: skip


@pytest.mark.slow
def test_compress_and_extract_stay_within_the_memory_that_they_are_given():
    base = {"large": torch.zeros(6000, 8000), "small": torch.zeros(4000, 1000)}  # 183 and 15 MiB in float32
    save_weights(base, "base.safetensors")
    save_weights({name: tensor + 1 for name, tensor in base.items()}, "tuned.safetensors")
    extract = "extract('base.safetensors', 'tuned.safetensors', '{}.tv.safetensors', max_memory={})"
    assert_within(Path(), 128, NAMES + extract.format("a", "memory"), first=FIRST)
    encodings = ("bf16", "int8", "sign")
    statement = NAMES + "compress('a.tv.safetensors', '{0}.tv.safetensors', '{0}', max_memory=memory)"
    assert_within(Path(), 128, *(statement.format(encoding) for encoding in encodings), first=FIRST)
