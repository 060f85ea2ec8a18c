"""Checkpoints as lazy, read-only mappings of names to tensors, their fingerprints, and atomic writing."""

from tva.weights.files import (
    LazyWeights,
    atomic_path,
    canonical_names,
    canonical_state_dict,
    open_weights,
    read_metadata,
    save_weights,
)
from tva.weights.fingerprint import Fingerprint, TensorHash, fingerprint, tensor_digest

__all__ = [
    "Fingerprint",
    "LazyWeights",
    "TensorHash",
    "atomic_path",
    "canonical_names",
    "canonical_state_dict",
    "fingerprint",
    "open_weights",
    "read_metadata",
    "save_weights",
    "tensor_digest",
]
