"""Networks and tokenizers of transformers; the only importer of it in models."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tva.errors import some

Kind = Literal["AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"]
INSTALL = "pip install 'tva[text]'"


def load_network(kind: Kind, name: str) -> nn.Module:
    """Load a network with all its weights, in float32 on the CPU and in evaluation mode.

    Args:
        kind: transformers' class that knows the architecture.
        name: A local folder, or a name on the Hugging Face hub. Environment variables are filled in.

    Raises:
        FileNotFoundError: The folder is not there.
        ValueError: transformers is not installed, cannot load it, or would leave some weights at random.
    """
    transformers = import_transformers()
    name = _place(name)
    with quiet(transformers), _explained(name, "a network"):
        network, info = getattr(transformers, kind).from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    missing = [key for key in info["missing_keys"] if not key.startswith("pooler.")]
    if missing:
        raise ValueError(
            f"{name} has no weights for {some(sorted(missing))} of {type(network).__name__}, which would stay random. "
            f"Use a checkpoint that was saved as such a model."
        )
    return network.eval()


def load_tokenizer(name: str, tokenizer: str | None, network: nn.Module) -> Any:
    """Load a network's tokenizer, and check that it is not another's.

    Args:
        name: As for `load_network`.
        tokenizer: Folder or hub name of the tokenizer, where ``name`` brings none.
        network: The network, whose embedding must have a row for each token.

    Raises:
        ValueError: There is none, or it is that of another model.
    """
    transformers = import_transformers()
    own = None
    with quiet(transformers):
        with contextlib.suppress(OSError, ValueError, TypeError):  # whatever it says where there is none
            own = transformers.AutoTokenizer.from_pretrained(_place(name))
        if own is not None and len(own.get_vocab()) <= len(own.all_special_tokens):
            own = None  # transformers 5 makes an empty one of a folder without
        if tokenizer is not None:
            with _explained(_place(tokenizer), "a tokenizer"):
                found = transformers.AutoTokenizer.from_pretrained(_place(tokenizer))
        elif own is None:
            raise ValueError(f"{name} brings no tokenizer. Pass tokenizer= the folder or hub name of the one it needs.")
        else:
            found = own
    source, rows = tokenizer or name, network.get_input_embeddings().num_embeddings
    highest = max(found.get_vocab().values())
    if highest >= rows:
        raise ValueError(
            f"The tokenizer {source} has token ids up to {highest}, but {name} has embeddings for {rows} tokens: it is "
            f"that of another model. Pass tokenizer= that of {name}."
        )
    if own is not None and own.get_vocab() != found.get_vocab():
        theirs, ours = found.get_vocab(), own.get_vocab()
        other = [token for token in ours if theirs.get(token) != ours[token]]
        raise ValueError(
            f"The tokenizer {source} is not that of {name}: {len(other)} of {len(ours)} tokens have another id, such "
            f"as {some(sorted(other))}. Leave tokenizer= out."
        )
    return found


def longest_input(tokenizer: Any, network: nn.Module) -> int | None:
    """Return how many tokens a network takes at most; None if it does not say."""
    known = [tokenizer.model_max_length, getattr(network.config, "max_position_embeddings", None)]
    known = [length for length in known if length is not None and length < 10**9]  # a huge number stands for "none"
    return min(known) if known else None


def split_padding(tokens: Tensor, tokenizer: Any) -> dict[str, Tensor]:
    """Turn token ids that are padded with -1 into what a network takes.

    Args:
        tokens: Shape (batch, length), int64.
        tokenizer: Says which token pads.

    Returns:
        ``input_ids`` and ``attention_mask``, int64, both (batch, length).
    """
    mask = tokens >= 0
    return {"input_ids": tokens.masked_fill(~mask, tokenizer.pad_token_id or 0), "attention_mask": mask.long()}


def import_transformers() -> Any:
    """Import transformers, or say how to install it."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"Text models need transformers: {INSTALL}.") from error
    return transformers


def _place(name: str) -> str:
    """Fill in environment variables, and refuse a folder that is not there before the hub is asked for it."""
    name = os.path.expandvars(os.path.expanduser(name))
    if not Path(name).is_dir() and (name.startswith((".", "/", "$")) or name.count("/") > 1):
        raise FileNotFoundError(f"A folder with config.json and weights was expected at {name}, but none is there.")
    return name


@contextlib.contextmanager
def _explained(name: str, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"transformers could not load {what} from {name}: {said} Give a local folder, or a name on the hub while "
            f"online."
        ) from error


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Silence progress bars and reports of transformers."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
