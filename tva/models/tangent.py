r"""Networks linearized in their weights: :math:`f(x; \theta_0) + J(x)(\theta - \theta_0)`, to be fine-tuned and edited.

Source: Ortiz-Jimenez et al., "Task arithmetic in the tangent space: improved editing of pre-trained models", NeurIPS
2023, https://arxiv.org/abs/2305.12827
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from tva.errors import MismatchError, some
from tva.vectors.kind import TANGENT


def linearize(network: nn.Module) -> None:
    r"""Make a network linear in its weights, in place, around those that it has now.

    From now on its output is :math:`f(x; \theta_0) + J(x)(\theta - \theta_0)`, with :math:`\theta_0` the weights at
    this call, kept outside the state dict, and :math:`\theta` its parameters, whose names and values stay as they are.
    So it is trained, saved, loaded and edited like any other, and its task vectors are marked as tangent.

    Args:
        network: Any module whose outputs are tensors, or nested containers of them, that depend on its parameters
            through operations with a forward derivative. Buffers are not linearized.

    Raises:
        ValueError: It is linearized already.
    """
    if isinstance(vars(network).get("forward"), LinearizedForward):
        raise ValueError("This network is linearized already.")
    if getattr(getattr(network, "config", None), "use_cache", False):
        network.config.use_cache = False  # of transformers: what a cache holds is not an output
    network.vector_kind = TANGENT
    network.forward = LinearizedForward(network)


def check_at_base(module: nn.Module) -> None:
    """Check that the weights of every linearized network in a module are those that it is linearized around.

    Raises:
        MismatchError: Some are not.
    """
    for part in module.modules():
        forward = vars(part).get("forward")
        if isinstance(forward, LinearizedForward) and (moved := forward.moved()):
            raise MismatchError(
                f"A linearized model is edited from the weights that it is linearized around, but its base differs "
                f"from them in {some(moved)}. Make the model from the base itself (pretrained=), without weights=."
            )


class LinearizedForward:
    """Takes the place of a network's ``forward``.

    Args:
        network: The network; its weights now are the point of expansion.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._base = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
        self._inside = False

    def _at_base(self, name: str, parameter: Tensor) -> Tensor:
        if self._base[name].device != parameter.device:
            self._base[name] = self._base[name].to(parameter.device)
        return self._base[name].to(parameter.dtype)  # rounded as the parameter was, if it was

    def moved(self) -> list[str]:
        """List the parameters that are not at the point of expansion."""
        parameters = self.network.named_parameters()
        return [name for name, parameter in parameters if not torch.equal(parameter, self._at_base(name, parameter))]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._inside:
            return type(self.network).forward(self.network, *args, **kwargs)
        _check_options(self.network)
        if kwargs.get("labels") is not None:
            raise ValueError(
                "A linearized network gives linear outputs, and a loss among them would be linear too. Compute it "
                "from the logits, without passing labels."
            )
        self._inside = True
        try:
            with _forward_derivatives():
                return self._linear(args, kwargs)
        finally:
            self._inside = False

    def _linear(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        primals, tangents = {}, {}
        for name, parameter in self.network.named_parameters():
            base = self._at_base(name, parameter)
            # a frozen parameter that has not moved adds nothing, at the cost of a derivative
            if (parameter.requires_grad and torch.is_grad_enabled()) or not torch.equal(parameter, base):
                primals[name], tangents[name] = base, parameter - base

        def run(parameters: dict[str, Tensor]) -> Any:
            return torch.func.functional_call(self.network, parameters, args, kwargs)

        if not primals:
            return run({})
        _load_decompositions()
        output, change = torch.func.jvp(run, (primals,), (tangents,))
        return tree_map(torch.add, output, change)


@contextmanager
def _forward_derivatives() -> Iterator[None]:
    """Keep to operations with a forward derivative, which fused attention lacks (pytorch #117629, #128971)."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if torch.is_inference_mode_enabled():  # in which there are no forward derivatives
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@functools.cache
def _load_decompositions() -> None:
    with warnings.catch_warnings():
        # torch 2.15 scripts the derivatives that it takes apart, when first asked for one, and deprecates scripting
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.zeros(()),))


def _check_options(network: nn.Module) -> None:
    names = ("gradient_checkpointing", "grad_checkpointing")  # of transformers; of open_clip and timm
    checkpointing = any(getattr(part, name, False) is True for part in network.modules() for name in names)
    if checkpointing and torch.is_grad_enabled():
        raise ValueError(
            "A linearized network cannot be trained with gradient checkpointing, which forgets the derivatives that "
            "run forward. Leave gradient_checkpointing out."
        )
    moving = [
        name
        for name, part in network.named_modules()
        if isinstance(part, _BatchNorm) and part.training and part.track_running_stats
    ]
    if moving:
        raise ValueError(
            f"A linearized network cannot be trained while its BatchNorm statistics move, as those of {some(moving)} "
            f"would. Use batch_norm='fold' or 'freeze'."
        )
