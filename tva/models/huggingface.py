"""Networks and tokenizers of transformers; the only importer of it in models."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tva.errors import is_local, nearby, some

Kind = Literal[
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForImageClassification",
]
_HEADS = {  # the mapping of transformers that knows the architectures of a task
    "sequence-classification": "SEQUENCE_CLASSIFICATION",
    "token-classification": "TOKEN_CLASSIFICATION",
    "image-classification": "IMAGE_CLASSIFICATION",
    "causal-lm": "CAUSAL_LM",
    "seq2seq-lm": "SEQ_TO_SEQ_CAUSAL_LM",
}
INSTALL = "pip install 'tva[text]'"


def load_network(kind: Kind, name: str) -> nn.Module:
    """Load a network with all its weights, in float32 on the CPU and in evaluation mode.

    Args:
        kind: transformers' class that knows the architecture.
        name: A local folder, or a name on the Hugging Face hub. Environment variables are expanded.

    Raises:
        FileNotFoundError: The folder is missing.
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


def read_task(name: str) -> str:
    """Return what the head of a model does, from its folder.

    Args:
        name: As for `load_network`.

    Raises:
        FileNotFoundError: The folder is missing.
        ValueError: The folder does not say, or the head does something else.
    """
    transformers = import_transformers()
    place = _place(name)
    if (Path(place) / "modules.json").exists():
        return "sentence-similarity"
    with _explained(place, "a configuration"):
        config = transformers.AutoConfig.from_pretrained(place)
    from transformers.models.auto import modeling_auto

    architecture = (config.architectures or ["none"])[0]
    for task, mapping in _HEADS.items():
        known = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values()
        if any(architecture == each or (isinstance(each, tuple) and architecture in each) for each in known):
            return task
    raise ValueError(
        f"The head of a model must be for one of {some(list(_HEADS), 6)}; the architecture of {name} is "
        f"{architecture!r}. Pass task= if its weights have such a head; a text encoder without "
        f"one is for TextClassifier."
    )


def head_names(network: nn.Module) -> list[str]:
    """Return the names of the parameters of a network of transformers that are not its base model's."""
    prefix = getattr(network, "base_model_prefix", "")
    inside = f"{prefix}."
    if not prefix or not hasattr(network, prefix):
        return []
    return [name for name, _ in network.named_parameters() if not name.startswith(inside)]


def load_image_transform(name: str) -> ImageTransform:
    """Load the image processor of a model, as a function from a PIL image to a tensor.

    Raises:
        ValueError: There is none.
    """
    transformers = import_transformers()
    with quiet(transformers), _explained(_place(name), "an image processor"):
        return ImageTransform(transformers.AutoImageProcessor.from_pretrained(_place(name)))


class ImageTransform:
    """The function of an image processor from a PIL image to a float tensor (3, height, width)."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Any) -> Tensor:
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]


def load_sentence_transformer(name: str) -> tuple[nn.Module, Any, int | None]:
    """Load a model of sentence-transformers on the CPU; return it, its tokenizer and the longest text in tokens.

    Raises:
        FileNotFoundError: The folder is missing.
        ValueError: sentence-transformers is not installed, or cannot load it.
    """
    transformers = import_transformers()
    try:
        import sentence_transformers
    except ImportError as error:
        raise ValueError(
            f"{name} is a model of sentence-transformers: pip install 'tva[sentence]'. Without it, TextClassifier "
            f"trains its encoder."
        ) from error
    with quiet(transformers), _explained(_place(name), "a sentence-transformers model"):
        network = sentence_transformers.SentenceTransformer(_place(name), device="cpu")
    return network.float().eval(), network.tokenizer, network.max_seq_length


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
    if name.startswith("hf://"):
        return name.removeprefix("hf://")
    if is_local(name) and not Path(name).is_dir():
        hub = (
            f" A repository of that name on the hub is hf://{name}." if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) else ""
        )
        raise FileNotFoundError(
            f"A folder with config.json and weights was expected at {name}, but none is there.{nearby(Path(name))}{hub}"
        )
    return name


@contextlib.contextmanager
def _explained(name: str, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        said = " ".join(str(error).split())
        if not Path(name).is_dir():
            raise ValueError(
                f"There is no folder {name}.{nearby(Path(name))} transformers could not load {what} of that name from "
                f"the hub either: {said}"
            ) from error
        raise ValueError(f"transformers could not load {what} from {name}: {said}") from error


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
