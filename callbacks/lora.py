r"""LoRA modules (peft) in a model: the names of the model without them, and what they add to its weights.

A difference of the factors A and B is no task vector: :math:`B'A' - BA` is not :math:`(B'-B)(A'-A)`. So either the
dense product is taken, as merging the adapter would, or the adapter is kept as it is, beside its base.

Source: Hu et al., "LoRA: low-rank adaptation of large language models", ICLR 2022.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from tva.checkpoints import save_weights
from tva.checkpoints.wrappers import network_of
from tva.errors import some


class LoraView:
    """A model viewed as the network that it wraps, without the LoRA modules that were put into it.

    Args:
        module: Any module; one without LoRA and without a wrapper is viewed as it is.

    Attributes:
        prefix: What a wrapper puts before the network's names, or an empty string.

    Raises:
        ValueError: It has modules of peft that change weights in another way than LoRA's product.
    """

    def __init__(self, module: nn.Module) -> None:
        self.prefix = network_of(module)[0]
        self.layers: dict[str, nn.Module] = {}
        self._copies: dict[str, nn.Module] = {}
        self.roots: dict[str, nn.Module] = {}
        refused = []
        for raw, part in module.named_modules():
            name = ".".join(word for word in raw.split(".") if word != "_orig_mod")
            if hasattr(part, "base_layer") and hasattr(part, "active_adapters"):
                self.layers[name] = part
                reason = _unsupported(part)
                if reason:
                    refused.append(f"{name} ({reason})")
            elif hasattr(part, "original_module") and hasattr(part, "modules_to_save"):
                self._copies[name] = part
            elif hasattr(part, "peft_config") and hasattr(part, "get_base_model"):
                self.roots[name] = part
        if refused:
            raise ValueError(
                f"TaskVectorCallback reads only plain LoRA, and not {some(refused)}. Train without it, merge the "
                f"adapter (merge_and_unload), and take the vector from the base to the merged model."
            )

    def __bool__(self) -> bool:
        return bool(self.layers)

    def plain_names(self, names: Iterable[str]) -> dict[str, str]:
        """Map the network's own names to those of the state dict; what LoRA adds is left out."""
        plain = {}
        for stored in names:
            name = self._plain(stored) if self else stored
            if name is not None:
                plain[name.removeprefix(self.prefix)] = stored
        return plain

    def _plain(self, name: str) -> str | None:
        parts, plain = iter(name.split(".")), []
        owner = ""  # layers are within layers where a module's own parameter has LoRA and a module within it too
        for part in parts:
            if owner in self.layers:
                if part != "base_layer":
                    return None
                owner = f"{owner}.{part}"
            elif owner in self._copies:
                adapter = next(parts, None)
                if part != "modules_to_save" or adapter not in self._copies[owner].active_adapters:
                    return None
                owner = f"{owner}.{part}.{adapter}"
            else:
                plain.append(part)
                owner = f"{owner}.{part}" if owner else part
        return self._without_root(".".join(plain))

    def _without_root(self, name: str) -> str:
        for root in self.roots:
            before = f"{root}.base_model.model." if root else "base_model.model."
            if name.startswith(before):
                return (f"{root}." if root else "") + name[len(before) :]
        return name

    def deltas(self) -> dict[str, Callable[[], Tensor]]:
        """Map plain names of weights to functions that return the flattened float32 delta of the active adapters."""
        return {
            f"{self._plain(name)}.{_parameter(layer)}".removeprefix(self.prefix): (lambda layer=layer: _delta(layer))
            for name, layer in self.layers.items()
            if layer.active_adapters
        }

    def save_adapter(self, folder: Path, metadata: dict[str, str]) -> None:
        """Write the active adapter of the one peft model as an adapter folder for `tva.checkpoints.open_adapter`.

        Raises:
            ValueError: As `check_adapter`.
        """
        from peft import get_peft_model_state_dict

        self.check_adapter()
        (root,) = self.roots.values()
        (adapter,) = root.active_adapters
        weights = get_peft_model_state_dict(root, adapter_name=adapter)
        weights = {key.replace("_orig_mod.", ""): value for key, value in weights.items()}
        root.peft_config[adapter].save_pretrained(str(folder))
        save_weights(weights, folder / "adapter_model.safetensors", metadata)

    def check_adapter(self) -> None:
        """Raise if there is no adapter to keep as it is.

        Raises:
            ValueError: There is not exactly one peft model with one active adapter.
        """
        odd = sorted({_parameter(layer) for layer in self.layers.values()} - {"weight"})
        if odd:
            raise ValueError(
                f"lora='adapter' keeps only adapters of modules' weights, as readers of adapters expect, and here "
                f"{some(odd)} has one too (attention of nn.MultiheadAttention). Use lora='merge'."
            )
        active = {name: list(root.active_adapters) for name, root in self.roots.items()}
        if len(active) != 1 or any(len(adapters) != 1 for adapters in active.values()):
            raise ValueError(
                f"lora='adapter' keeps one adapter of one peft model; found {active or 'none'}. Use lora='merge'."
            )


def _unsupported(layer: nn.Module) -> str | None:
    if not hasattr(layer, "lora_A") or not hasattr(layer, "get_delta_weight"):
        return type(layer).__name__
    if getattr(layer, "lora_variant", None) or any(getattr(layer, "use_dora", {}).values()):
        return "a LoRA variant such as DoRA"
    if any(getattr(layer, "lora_bias", {}).values()):
        return "lora_bias"
    weight = getattr(layer.get_base_layer(), _parameter(layer), None)
    if weight is None or not weight.is_floating_point():
        return "a quantized or missing base weight"
    return None


def _parameter(layer: nn.Module) -> str:
    """Name the parameter that a layer adds to: its module's weight, unless peft was given another to target."""
    return getattr(layer, "parameter_name", "weight")


@torch.no_grad()
def _delta(layer: nn.Module) -> Tensor:
    if layer.merged:
        raise ValueError("A LoRA adapter is merged into its base while training; call unmerge() first.")
    deltas = [layer.get_delta_weight(adapter) for adapter in layer.active_adapters]
    total = sum(deltas[1:], deltas[0].float() if deltas[0].dtype != torch.float64 else deltas[0])
    return total.detach().cpu().reshape(-1)
