"""Find task vectors in folders."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tva.checkpoints import LazyWeights
from tva.checkpoints.formats import safetensors
from tva.vectors.geometry import measure, total
from tva.vectors.lazy import LazyTaskVector, open_vector, size_of

ADAPTER = "adapter_model.safetensors"


@dataclass
class Listed:
    """One task vector in a folder.

    Attributes:
        path: The file; of an adapter its folder.
        task: Name of its task.
        base: Digest of its base's fingerprint.
        num_bytes: Size on disk.
        step: Optimizer steps.
        norm: Euclidean norm over its parameters; None for an adapter, whose base it takes.
        encoding: How the deltas are stored.
        created: When it was written, UTC.
    """

    path: str
    task: str | None
    base: str | None
    num_bytes: int
    step: int | None
    norm: float | None
    encoding: str | None
    created: str | None


@dataclass
class Listing:
    """What `list_vectors` found.

    Attributes:
        folder: Where.
        bases: Digest of a base to the vectors that were taken from it, ``"unknown"`` where a header names none.
        damaged: Path to reason, of files that cannot be read.
        others: Safetensors files that are not task vectors.
    """

    folder: str
    bases: dict[str, list[Listed]]
    damaged: dict[str, str]
    others: int


def list_vectors(folder: str | os.PathLike[str]) -> Listing:
    """List every task vector in a folder and the folders below it, those together that share a base.

    Args:
        folder: Where to look for ``.safetensors`` files, and for adapters that `TaskVectorCallback` has written.

    Returns:
        Vectors by base; files that cannot be read, with the reason. A norm that is in no header is computed.

    Raises:
        FileNotFoundError: There is no such folder, or no task vector in it.
    """
    if not Path(folder).is_dir():
        there = "a file is there" if Path(folder).exists() else "there is none"
        raise FileNotFoundError(f"A folder was expected at {folder}, but {there}. Check the path.")
    found: list[Listed] = []
    damaged: dict[str, str] = {}
    others = 0
    for path in _visible(Path(folder)):
        try:
            listed = _listed(path)
        except (ValueError, OSError) as error:
            damaged[str(path)] = str(error)
            continue
        others += listed is None
        found += [listed] if listed else []
    if not found and not damaged:
        raise FileNotFoundError(
            f"{folder} holds no task vector: of the .safetensors files in it ({others}) none has 'tva.format' in its "
            f"header. Give the folder of a run with TaskVectorCallback, or make a vector with 'tva extract'."
        )
    bases: dict[str, list[Listed]] = {}
    for listed in found:
        bases.setdefault(listed.base or "unknown", []).append(listed)
    return Listing(os.fspath(folder), bases, damaged, others)


def _visible(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*.safetensors")):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _listed(path: Path) -> Listed | None:
    weights = safetensors.open(path)
    header = weights.metadata
    if "tva.format" in header:
        vector = open_vector(path)
        norm = float(header["tva.norm"]) if "tva.norm" in header else _norm(vector)
        origin = vector.origin
        base = origin.base.digest if origin.base else None
        return Listed(str(path), origin.task, base, size_of(path), origin.step, norm, *_written(weights))
    if path.name == ADAPTER and "tva.base_fingerprint" in header:
        step = int(header["tva.step"]) if "tva.step" in header else None
        task, base, folder = header.get("tva.task"), header["tva.base_fingerprint"], path.parent
        return Listed(str(folder), task, base, size_of(folder), step, None, "LoRA adapter", _written(weights)[1])
    return None


def _written(weights: LazyWeights) -> tuple[str | None, str | None]:
    return weights.metadata.get("tva.encoding"), weights.metadata.get("tva.created")


def _norm(vector: LazyTaskVector) -> float:
    return total(measure([vector.deltas]).values(), 1).norms()[0]
