"""Partial fine-tuning: selected parameters, LoRA (by peft), or the tangent space."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tva.checkpoints import LazyWeights, canonical_state_dict, open_finetuned, open_weights
from tva.errors import MismatchError, some
from tva.models.tangent import linearize
from tva.vectors.kind import KEY, TANGENT

PRESETS = ("attention", "linear", "bias")
_LINEAR = (nn.Linear, nn.MultiheadAttention)  # the latter's in_proj_weight and in_proj_bias are its own


class Lora(TypedDict, total=False):
    """Options of LoRA.

    Attributes:
        r: Rank; 8.
        alpha: What is added to a weight is B A · alpha / r; 16.
        target_modules: Names of modules, or the ends of names, such as ``[query, value]`` or ``[attn]``; a module that
            holds linear layers stands for these. By default every linear layer, those of attention included, but not
            the one that makes a language model's logits.
        dropout: Probability that an input of A is dropped in training; 0, as it must be for ``nn.MultiheadAttention``.
    """

    r: int
    alpha: float
    target_modules: list[str]
    dropout: float


def adapt(
    module: nn.Module,
    weights: str | None = None,
    train_only: str | list[str] | None = None,
    lora: Lora | None = None,
    tangent: bool = False,
    part: str = "encoder",
) -> None:
    """Load weights into a module, and set which part of it is trained and how; the last step of a constructor.

    Args:
        module: Changed in place; nothing of it but the part is frozen or adapted.
        weights: Checkpoint of ``module`` to load. A linearized encoder stays linearized around the weights before.
        train_only: ``"attention"``, ``"linear"`` (the linear layers, those of attention included) or ``"bias"``, or a
            list of these and of regular expressions that are searched for in the names of the encoder's parameters;
            what none of them names is frozen.
        lora: Train only low-rank additions, by peft (``pip install 'tva[lora]'``); see `Lora`. ``{}`` takes the
            defaults.
        tangent: Linearize the encoder in its weights; see `tva.models.tangent.linearize`.
        part: Name of the attribute that holds the encoder, or whatever network is to be fine-tuned.

    Raises:
        ValueError: Nothing in the encoder has such a name, options exclude each other, peft is missing, or ``weights``
            are of a linearized model and this is none.
    """
    if lora is not None and (tangent or train_only is not None):
        other = "tangent" if tangent else "train_only"
        raise ValueError(f"lora and {other} exclude each other; give one of them.")
    if tangent:
        linearize(getattr(module, part))
    if weights is not None:
        opened = open_weights(weights)
        _check_kind(opened, tangent)
        module.load_state_dict(dict(_named(opened, weights, module)), strict=True)
    if train_only is not None:
        chosen = select(getattr(module, part), train_only)
        for name, parameter in getattr(module, part).named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name in chosen)
    if lora is not None:
        setattr(module, part, add_lora(getattr(module, part), lora))


def _named(opened: LazyWeights, path: str, module: nn.Module) -> Mapping[str, Tensor]:
    """Return weights under a module's names, which may have a wrapper's prefix more, and tied tensors twice."""
    live = canonical_state_dict(module.state_dict())
    if opened.keys() == live.keys():
        return opened
    try:
        return open_finetuned(path, live, advice="Give a checkpoint of this network")
    except MismatchError as error:
        raise MismatchError(f"weights={path!r}: {error}") from error


def _check_kind(weights: LazyWeights, tangent: bool) -> None:
    kind = weights.metadata.get(KEY)
    if kind == TANGENT and not tangent:
        raise ValueError(
            f"weights={str(weights.path)!r} are those of a linearized model: in an ordinary one the same numbers are "
            f"another function. Set tangent: true."
        )


# --- some parameters


def select(encoder: nn.Module, train_only: str | Sequence[str]) -> set[str]:
    """Return the names of the parameters that a selection names.

    Args:
        encoder: Any module.
        train_only: As for `adapt`.

    Raises:
        ValueError: An entry names no parameter, or is not a regular expression.
    """
    if isinstance(train_only, str) and train_only not in PRESETS:
        raise ValueError(
            f"train_only must be one of {', '.join(PRESETS)}, or a list of regular expressions; found {train_only!r}. "
            f"Write [{train_only!r}] if it is one."
        )
    names = [name for name, _ in encoder.named_parameters()]
    chosen: set[str] = set()
    for entry in [train_only] if isinstance(train_only, str) else train_only:
        found = _preset(encoder, names, entry) if entry in PRESETS else _search(names, entry)
        if not found:
            raise ValueError(
                f"train_only names {entry!r}, which no parameter of {type(encoder).__name__} matches. "
                + _nearest(entry, names)
            )
        chosen |= found
    if not chosen:
        raise ValueError("train_only is an empty list, so that nothing would be trained. Leave it out to train all.")
    return chosen


def _search(names: Iterable[str], pattern: str) -> set[str]:
    try:
        return {name for name in names if re.search(pattern, name)}
    except re.error as error:
        raise ValueError(f"train_only holds {pattern!r}, which is not a regular expression: {error}.") from error


def _preset(encoder: nn.Module, names: Iterable[str], preset: str) -> set[str]:
    owners = {name: encoder.get_submodule(name.rpartition(".")[0]) for name in names}
    if preset == "bias":
        return {name for name in names if name.rpartition(".")[2].endswith("bias")}
    if preset == "linear":
        return {name for name, owner in owners.items() if isinstance(owner, _LINEAR) or _is_conv1d(owner)}
    return {
        name
        for name, owner in owners.items()
        if re.search("att(entio)?n", name.rpartition(".")[0], re.IGNORECASE) and "Norm" not in type(owner).__name__
    }


def _is_conv1d(module: nn.Module) -> bool:
    """Whether a module is the linear layer of transformers' GPT-2, whose weight is transposed."""
    return type(module).__name__ == "Conv1D"


def _nearest(wanted: str, names: Collection[str]) -> str:
    """Name the nearest, by the ends of names or by whole ones."""
    parts = [name.split(".") for name in names]
    ends = dict.fromkeys(".".join(part[start:]) for part in parts for start in reversed(range(len(part))))
    near = difflib.get_close_matches(wanted, ends, n=3, cutoff=0.5)
    return f"The nearest are {', '.join(near)}." if near else f"It has {some(list(names))}."


# --- LoRA


def add_lora(encoder: nn.Module, options: Lora) -> nn.Module:
    """Put LoRA into an encoder and freeze all else.

    Args:
        encoder: Any module; changed in place.
        options: See `Lora`.

    Returns:
        The peft model around it.

    Raises:
        ValueError: A target matches no module, or one that peft has no LoRA for, or peft is missing.

    Source: Hu et al., "LoRA: low-rank adaptation of large language models", ICLR 2022.
    """
    unknown = sorted(options.keys() - Lora.__annotations__.keys())
    if unknown:
        raise ValueError(f"lora has no option {unknown[0]!r}; its options are {', '.join(Lora.__annotations__)}.")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("lora needs peft: pip install 'tva[lora]'.") from error

    modules, parameters = _targets(encoder, options.get("target_modules"))
    settings: dict[str, Any] = {"target_parameters": parameters} if parameters else {}
    config = LoraConfig(
        r=options.get("r", 8),
        lora_alpha=options.get("alpha", 16),
        lora_dropout=options.get("dropout", 0.0),
        target_modules=modules,
        **settings,
    )
    for part in encoder.modules():
        if type(part) is nn.MultiheadAttention:
            part.__class__ = CallingAttention
    with warnings.catch_warnings():
        # peft 0.21 asks for what transformers 5 deprecates
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return get_peft_model(encoder, config)


def _targets(encoder: nn.Module, wanted: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Find the modules that get LoRA, and the parameters that are not a module's ``weight``."""
    named = {name: part for name, part in encoder.named_modules() if name}
    if wanted is None:
        # of transformers: what makes logits shares its weight with the embedding in most language models
        output = getattr(encoder, "get_output_embeddings", lambda: None)()
        linear = {name: part for name, part in named.items() if isinstance(part, _LINEAR) or _is_conv1d(part)}
        found = {name for name, part in linear.items() if part is not output}
        if not found:
            raise ValueError(
                f"lora needs target_modules: {type(encoder).__name__} has no linear layer, which is what gets LoRA by "
                f"default. It has {some([name for name, part in named.items() if not list(part.children())])}."
            )
    else:
        found = set()
        for target in wanted:
            matching = {name for name in named if name == target or name.endswith(f".{target}")}
            if not matching:
                raise ValueError(
                    f"lora.target_modules names {target!r}, which no module of {type(encoder).__name__} matches. "
                    + _nearest(target, named.keys())
                )
            for name in matching:
                found |= _linear_within(name, named) or {name}
    if not found:
        raise ValueError("lora.target_modules is empty. Leave it out for every linear layer.")
    attentions = [name for name in found if isinstance(named[name], nn.MultiheadAttention)]
    for name in attentions:
        if named[name].in_proj_weight is None or named[name].bias_k is not None or named[name].add_zero_attn:
            raise ValueError(f"lora cannot be put into {name}: its attention is not of the plain kind.")
    modules = {name for name in found if name not in attentions} | {f"{name}.out_proj" for name in attentions}
    return sorted(modules), sorted(f"{name}.in_proj_weight" for name in attentions)


def _linear_within(name: str, named: dict[str, nn.Module]) -> set[str]:
    if isinstance(named[name], _LINEAR):
        return {name}
    return {
        inner
        for inner, part in named.items()
        if inner.startswith(f"{name}.") and (isinstance(part, _LINEAR) or _is_conv1d(part))
    }


class CallingAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` that calls its output projection, where torch's reads the weight past what LoRA adds.

    Parameters, their names and the result are the same. peft 0.21's own layer for ``nn.MultiheadAttention`` is not
    used: it adds the output projection's delta twice, and moves the frozen weights by rounding in every step.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attend; see ``torch.nn.MultiheadAttention``. ``need_weights`` must be false."""
        if need_weights or key_padding_mask is not None:
            raise ValueError("Attention with LoRA gives no attention weights and takes no key_padding_mask.")
        if query is key and key is value:
            parts = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            weights = self.in_proj_weight.chunk(3)
            parts = [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]
        if not self.batch_first:
            parts = [part.transpose(0, 1) for part in parts]
        # (batch, length, heads * width) -> (batch, heads, length, width)
        q, k, v = (part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for part in parts)
        if attn_mask is not None:
            attn_mask = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask  # there, true is to be left out
            attn_mask = attn_mask.unflatten(0, (len(q), self.num_heads)) if attn_mask.dim() == 3 else attn_mask
            is_causal = False
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal)
        out = self.out_proj(attended.transpose(1, 2).flatten(2))
        return (out if self.batch_first else out.transpose(0, 1)), None
