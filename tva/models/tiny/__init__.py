"""``tva-tiny``: a CLIP of a million parameters that ships with the package, so that every example runs offline.

Its architecture is open_clip's, its vocabulary a byte-pair encoding of the words of its captions, and its weights come
from ``python -m tva.models.tiny.pretrain``; docs/reference/tva-tiny.md says how well it does.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from open_clip import CLIP
    from open_clip.tokenizer import SimpleTokenizer

_FOLDER = Path(__file__).parent
WEIGHTS = "tva-tiny.planes.zst"


def pack(file: bytes) -> bytes:
    """Compress a safetensors file of float16: what is nearly random apart from the exponents, each by zstd.

    Every number is turned left by one bit, so that its sign is in the even byte, which hardly anything compresses, and
    the odd byte begins with the exponent, whose frequencies are those of its tensor. More than a low level of zstd
    would take chance for repetition.
    """
    even, start = len(file) // 2 * 2, 8 + int.from_bytes(file[:8], "little")
    words = np.frombuffer(file[:even], "<u2")
    turned = (words << 1 | words >> 15).astype("<u2").tobytes()
    planes = turned[0::2] + turned[1::2] + file[even:]
    header = json.loads(file[8:start])
    tensors = {(even + start + tensor["data_offsets"][0]) // 2 for tensor in header.values() if "dtype" in tensor}
    cuts = sorted({0, start // 2, even // 2, len(planes)} | tensors)
    return b"".join(zstd.compress(planes[first:last], 3) for first, last in itertools.pairwise(cuts))


def unpack(packed: bytes) -> bytes:
    """Return the bytes that :func:`pack` was called with."""
    planes = np.frombuffer(zstd.decompress(packed), np.uint8)
    half = len(planes) // 2
    turned = planes[:half] | planes[half : 2 * half].astype("<u2") << 8
    return (turned >> 1 | turned << 15).astype("<u2").tobytes() + planes[2 * half :].tobytes()


def load(folder: str | Path = _FOLDER) -> tuple[CLIP, Callable, SimpleTokenizer]:
    """Load tva-tiny and what its inputs need.

    Args:
        folder: Folder that holds ``tva-tiny.json``, ``tva-tiny.planes.zst`` and ``bpe.txt.gz``, as pretrain.py writes
            them; the package's own by default.

    Returns:
        The model in eval mode, float32, on the CPU; the function from a PIL image to a float tensor of shape
        (3, 32, 32); and the tokenizer, from a list of texts to int64 token ids of shape (texts, 16).

    Raises:
        FileNotFoundError: One of the three files is missing.
        RuntimeError: The weights do not fit the architecture.
    """
    import safetensors.torch

    folder = Path(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise FileNotFoundError(
            f"{weights} is missing. Reinstall tva, or make it: python -m tva.models.tiny.pretrain --output {folder}"
        )
    model, preprocess, tokenizer = create(folder)
    state = safetensors.torch.load(unpack(weights.read_bytes()))
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True)
    return model.eval(), preprocess, tokenizer


def create(folder: str | Path = _FOLDER) -> tuple[CLIP, Callable, SimpleTokenizer]:
    """Make tva-tiny with random weights; otherwise as :func:`load`, but needing only architecture and vocabulary."""
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer

    config_path, vocabulary = Path(folder) / "tva-tiny.json", Path(folder) / "bpe.txt.gz"
    for path in (config_path, vocabulary):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing. Reinstall tva, or pass a folder that pretrain.py wrote.")
    config = json.loads(config_path.read_text())
    preprocess = open_clip.image_transform(config["vision_cfg"]["image_size"], is_train=False)
    tokenizer = SimpleTokenizer(bpe_path=str(vocabulary), context_length=config["text_cfg"]["context_length"])
    return open_clip.CLIP(**config), preprocess, tokenizer
