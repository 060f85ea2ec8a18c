"""Checkpoints as lazy, read-only mappings of names to tensors, their fingerprints, and atomic writing."""

from tva.weights.adapter import open_adapter, open_finetuned
from tva.weights.files import find, open_weights, read_metadata
from tva.weights.fingerprint import Fingerprint, TensorHash, fingerprint, tensor_digest
from tva.weights.hashed import HashedWeights
from tva.weights.hub import is_hub
from tva.weights.lazy import Entry, Info, LazyWeights
from tva.weights.names import NameMatch, canonical_names, canonical_state_dict, map_names, match_names
from tva.weights.output import Output, side_files
from tva.weights.spec import Elements, Spec, dtype_name
from tva.weights.writing import atomic_path, cache_folder, make_room, save_weights

__all__ = [
    "Elements",
    "Entry",
    "Fingerprint",
    "HashedWeights",
    "Info",
    "LazyWeights",
    "NameMatch",
    "Output",
    "Spec",
    "TensorHash",
    "atomic_path",
    "cache_folder",
    "canonical_names",
    "canonical_state_dict",
    "dtype_name",
    "find",
    "fingerprint",
    "is_hub",
    "make_room",
    "map_names",
    "match_names",
    "open_adapter",
    "open_finetuned",
    "open_weights",
    "read_metadata",
    "save_weights",
    "side_files",
    "tensor_digest",
]
