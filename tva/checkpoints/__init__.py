"""Checkpoints as lazy, read-only mappings of names to tensors, their fingerprints, and atomic writing."""

from tva.checkpoints.atomic import atomic_path, cache_folder, make_room, save_weights
from tva.checkpoints.dequantized import Dequantized, as_stored, dequantized_entries
from tva.checkpoints.exports import check_export, write_export
from tva.checkpoints.fingerprint import Fingerprint, HashedWeights, TensorHash, fingerprint, tensor_digest
from tva.checkpoints.hub import is_hub
from tva.checkpoints.lazy import Entry, Info, LazyWeights, Which
from tva.checkpoints.names import NameFilter, NameMatch, canonical_names, canonical_state_dict, map_names, match_names
from tva.checkpoints.open import find, open_weights, read_metadata
from tva.checkpoints.peft_adapter import open_adapter, open_finetuned
from tva.checkpoints.protect import check_own, is_own, protect
from tva.checkpoints.quantized import check_not_quantized
from tva.checkpoints.sharded_writer import Output
from tva.checkpoints.side_files import fetch_side_files, model_folder, side_files, weights_stem
from tva.checkpoints.spec import Elements, Spec, dtype_name

__all__ = [
    "Dequantized",
    "Elements",
    "Entry",
    "Fingerprint",
    "HashedWeights",
    "Info",
    "LazyWeights",
    "NameFilter",
    "NameMatch",
    "Output",
    "Spec",
    "TensorHash",
    "Which",
    "as_stored",
    "atomic_path",
    "cache_folder",
    "canonical_names",
    "canonical_state_dict",
    "check_export",
    "check_not_quantized",
    "check_own",
    "dequantized_entries",
    "dtype_name",
    "fetch_side_files",
    "find",
    "fingerprint",
    "is_hub",
    "is_own",
    "make_room",
    "map_names",
    "match_names",
    "model_folder",
    "open_adapter",
    "open_finetuned",
    "open_weights",
    "protect",
    "read_metadata",
    "save_weights",
    "side_files",
    "tensor_digest",
    "weights_stem",
    "write_export",
]
