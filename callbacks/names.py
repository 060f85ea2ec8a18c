"""The tensors of a module under the names that they have in a checkpoint."""

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from tva.checkpoints import canonical_names

_WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # in parameters' names, never in a state dict's


def module_state(module: nn.Module) -> dict[str, Any]:
    """Return a module's state dict with all its parameters, even those that its own ``state_dict`` leaves out.

    Not those of modules that save themselves in another way (``_save_to_state_dict``), as tva's learned heads.
    """
    state = dict(nn.Module.state_dict(module))
    parameters = {
        _unwrapped(f"{prefix}.{name}" if prefix else name): parameter
        for prefix, part in module.named_modules(remove_duplicate=False)
        if type(part)._save_to_state_dict is nn.Module._save_to_state_dict
        for name, parameter in part.named_parameters(recurse=False)
    }
    absent = {name: parameter for name, parameter in parameters.items() if name not in state}
    if absent:  # under any name: a module may have hooks that rename
        held = {tensor.data_ptr() for tensor in state.values() if isinstance(tensor, Tensor)}
        state |= {name: p.detach() for name, p in absent.items() if p.data_ptr() not in held}
    return state


def names_of(module: nn.Module) -> list[str]:
    """Return the canonical names of all parameters and buffers, tied ones under each name."""
    return [*parameter_names(module), *buffer_names(module)]


def buffer_names(module: nn.Module) -> list[str]:
    """Return the canonical names of all buffers."""
    return _canonical([name for name, _ in module.named_buffers(remove_duplicate=False)])


def parameter_names(module: nn.Module) -> list[str]:
    """Return the canonical names of all parameters, tied ones under each name."""
    return _canonical([name for name, _ in module.named_parameters(remove_duplicate=False)])


def tied_names(module: nn.Module, exclude: Collection[str] = ()) -> list[str]:
    """Return the canonical names of tied parameters, but for the first of each that is not excluded."""
    seen: set[int] = set()
    tied = []
    parameters = [parameter for _, parameter in module.named_parameters(remove_duplicate=False)]
    for name, parameter in zip(parameter_names(module), parameters, strict=True):
        if name in exclude:
            continue
        if id(parameter) in seen:
            tied.append(name)
        seen.add(id(parameter))
    return tied


def _canonical(names: Sequence[str]) -> list[str]:
    return list(canonical_names([_unwrapped(name) for name in names]))


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
