"""The network inside a LightningModule, and what the module puts before the names of the network's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tva.checkpoints.names import WRAPPERS

if TYPE_CHECKING:
    from torch import nn

UNNAMED = ("module", "_orig_mod")  # wrappers whose names `canonical_names` drops


def network_of(module: nn.Module) -> tuple[str, nn.Module]:
    """Return the network that a module wraps, and the prefix of its weights' names; the module itself if it is none.

    A module is a wrapper if all weights that it saves are in one child, which is a library's model or has a name that
    wrappers give (``model``, ``network``, ``encoder`` …).

    Example:
        >>> import torch
        >>> class Task(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.network = torch.nn.Linear(2, 1)
        >>> network_of(Task())
        ('network.', Linear(in_features=2, out_features=1, bias=True))
        >>> network_of(torch.nn.Linear(2, 1))[0]
        ''
    """
    own = [*module._parameters.values(), *_persistent(module)]
    children = [(name, child) for name, child in module.named_children() if _saves(child)]
    if any(tensor is not None for tensor in own) or len(children) != 1:
        return "", module
    name, child = children[0]
    if name in UNNAMED:
        return network_of(child)
    if f"{name}." not in WRAPPERS and not is_library_model(child):
        return "", module
    return f"{name}.", _unwrapped(child)


def is_library_model(module: Any) -> bool:
    """Whether a module is a model of transformers, timm or open_clip."""
    if hasattr(module, "save_pretrained") and hasattr(module, "config"):
        return True
    return hasattr(module, "pretrained_cfg") or type(module).__module__.startswith("open_clip.")


def _unwrapped(module: Any) -> Any:
    inner = module._modules.get("_orig_mod")
    return module if inner is None else inner


def _saves(module: nn.Module) -> bool:
    """Whether a module has tensors in a state dict; not so modules that save themselves in another way."""
    from torch import nn

    for part in module.modules():
        tensors = [*part._parameters.values(), *_persistent(part)]
        plainly = type(part)._save_to_state_dict is nn.Module._save_to_state_dict
        if plainly and any(tensor is not None for tensor in tensors):
            return True
    return False


def _persistent(module: nn.Module) -> list[Any]:
    return [tensor for name, tensor in module._buffers.items() if name not in module._non_persistent_buffers_set]
