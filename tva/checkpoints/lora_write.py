"""Write a PEFT LoRA adapter: factors by module, and tensors saved whole, in a folder that `PeftModel` loads."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tva._torch import Tensor, torch
from tva.checkpoints.atomic import can_write, save_weights
from tva.checkpoints.lora import PREFIX


@dataclass
class NewFactors:
    """The factors of one module of a new adapter, whose delta is ``b @ a``.

    Attributes:
        module: Its name in the model.
        a: Shape (rank, in), of a convolution (rank, in, kernel …); of an embedding (rank, number of embeddings).
        b: Shape (out, rank), of a convolution (out, rank, 1 …).
        embedding: Whether it is an embedding, whose delta is stored transposed.
        transposed: Whether the module's weight is stored as [in, out].
    """

    module: str
    a: Tensor
    b: Tensor
    embedding: bool = False
    transposed: bool = False

    @property
    def rank(self) -> int:
        """The rank."""
        return len(self.a)

    def tensors(self) -> dict[str, Tensor]:
        """Return names in the file to tensors."""
        kind, end = ("lora_embedding_", "") if self.embedding else ("lora_", ".weight")
        return {f"{PREFIX}{self.module}.{kind}{side}{end}": getattr(self, side.lower()).contiguous() for side in "AB"}


def truncated(left: Tensor, middle: Tensor, right: Tensor, rank: int | None) -> tuple[Tensor, Tensor, float]:
    """Factor ``left @ middle @ right.T`` into ``b @ a`` of a rank at most.

    Args:
        left: Orthonormal columns, float64.
        middle: Any matrix.
        right: Orthonormal columns.
        rank: Largest rank; None for that of ``middle``.

    Returns:
        ``b`` and ``a``, float64, and the squared Frobenius norm of what was cut off, which no factors of that rank can
        make smaller.
    """
    u, values, vh = torch.linalg.svd(middle, full_matrices=False)
    kept = int((values > values[:1] * 1e-14).sum())
    kept = kept if rank is None else min(kept, rank)
    root = values[:kept].sqrt()
    return left @ (u[:, :kept] * root), (root[:, None] * vh[:kept]) @ right.T, float(values[kept:].square().sum())


def check_new_folder(folder: Path) -> None:
    """Check that an adapter can be written there.

    Raises:
        ValueError: Something is there.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"output must be a new or empty folder for an adapter; {folder} is not. Remove it, or give another."
        )
    if folder.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt"):
        raise ValueError(f"output must be a folder for an adapter; found {str(folder)!r}. Leave the ending out.")


def write_adapter(
    folder: Path, factors: Sequence[NewFactors], whole: Mapping[str, Tensor], facts: Mapping[str, Any], about: str
) -> int:
    """Write an adapter, whole or not at all.

    Args:
        folder: New or empty.
        factors: Factors of each module.
        whole: Names in the model to tensors of modules that are saved whole.
        facts: Further fields of ``adapter_config.json``, such as ``base_model_name_or_path``.
        about: How it was made, for the header.

    Returns:
        Bytes of the weights.
    """
    tensors = {name: tensor for each in factors for name, tensor in each.tensors().items()}
    tensors |= {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in whole.items()}
    partial = folder.with_name(f".{folder.name}.partial")
    with can_write(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    try:
        save_weights(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt", "tva.adapter": about})
        (partial / "adapter_config.json").write_text(json.dumps(_config(factors, whole, facts), indent=2))
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return (folder / "adapter_model.safetensors").stat().st_size


def _config(factors: Sequence[NewFactors], whole: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration: the scale is 1 in every module, so alpha is its rank."""
    rank = Counter(each.rank for each in factors).most_common(1)[0][0]
    # peft takes the first pattern that matches the end of a name: ^ lets each match one name only.
    other = {f"^{each.module.replace('.', '[.]')}": each.rank for each in factors if each.rank != rank}
    saved = sorted({name.rpartition(".")[0] for name in whole})
    matrices = [each for each in factors if not each.embedding]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        **facts,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": other,
        "alpha_pattern": dict(other),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "fan_in_fan_out": bool(matrices) and all(each.transposed for each in matrices),
        "target_modules": sorted(each.module for each in factors),
        "modules_to_save": saved or None,
    }
