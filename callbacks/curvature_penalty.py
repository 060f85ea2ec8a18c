"""A callback that keeps fine-tuning from changing what the model says on other tasks, without their examples."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from tva.callbacks.merge_statistics import check_whole

from tva.checkpoints import canonical_state_dict, fingerprint
from tva.checkpoints.wrappers import network_of
from tva.errors import some
from tva.merge.curvature import Curvature, add_up, read_curvature
from tva.models.tangent import check_at_base


class CurvaturePenalty(L.Callback):
    r"""Add :math:`\beta \sum_l \mathrm{tr}(G_l\,\Delta W_l\,A_l\,\Delta W_l^\top)` of other tasks to the loss.

    ΔW is what fitting has changed so far. With ``tangent: true`` this is TAK: the outputs are linear in ΔW, and the
    penalty is their expected squared change on the other tasks, up to the factors' approximation. In ordinary
    fine-tuning it is elastic weight consolidation with Kronecker factors, which is accurate only near the base.

    The gradient is added before each optimizer step, whatever the model's steps are; ``train/curvature_penalty`` is
    logged. The factors of any number of tasks take the memory of one (see `tva.merge.curvature.add_up`).

    Args:
        factors: Files that ``MergeStatistics(kinds=["curvature"])`` wrote of the base on each other task, or patterns
            such as ``runs/*/curvature.safetensors``. A file that was measured on the fit's own task is left out.
        beta: Factor on the penalty.

    Raises:
        ValueError: The factors are of another base or of parameters that the model does not train, or none is left.
        FileNotFoundError: A file is missing.

    Source: Porrello et al., "Dataless weight disentanglement in task arithmetic via Kronecker-factored approximate
    curvature", ICLR 2026; for ordinary fine-tuning Kirkpatrick et al., PNAS 2017, and Ritter et al., NeurIPS 2018.
    """

    def __init__(self, factors: str | Sequence[str], beta: float = 1.0) -> None:
        super().__init__()
        if beta < 0:
            raise ValueError(f"beta must be at least 0; found {beta}.")
        self.factors = [factors] if isinstance(factors, str) else list(factors)
        self.beta = beta
        self._base: dict[str, torch.Tensor] = {}
        self._curvature: Curvature | None = None
        self._device: torch.device | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_whole(trainer, self)
        check_at_base(pl_module)
        prefix, _ = network_of(pl_module)
        state = canonical_state_dict(pl_module.state_dict())
        digest = fingerprint({name.removeprefix(prefix): tensor for name, tensor in state.items()}).digest
        task = getattr(getattr(trainer, "datamodule", None), "name", None)
        self._curvature = add_up(
            found for path in self._paths() if (found := self._read(path, digest, task)) is not None
        )
        named = self._parameters(pl_module)
        missing = sorted(self._curvature.names - named.keys())
        if missing:
            raise ValueError(
                f"The factors have {some(missing)}, which this model does not train under that name. Measure them with "
                f"the model's own options (train_only); with LoRA there is no such penalty."
            )
        self._base = {name: named[name].detach().clone() for name in self._curvature.names}

    def _paths(self) -> list[str]:
        found = []
        for given in self.factors:
            path = os.path.expandvars(os.path.expanduser(given))
            paths = sorted(glob.glob(path)) if glob.has_magic(path) else [path]
            if not paths:
                raise FileNotFoundError(f"No file matches {given!r}, of which factors of other tasks were expected.")
            found += paths
        return found

    def _read(self, path: str, digest: str, task: str | None) -> Curvature | None:
        curvature = read_curvature(path)
        if task is not None and curvature.facts.get("tva.task") == task:
            return None
        if curvature.facts.get("tva.base") != digest:
            raise ValueError(
                f"The factors must be measured at the weights that fitting starts from, {digest}; those in {path} are "
                f"of {curvature.facts.get('tva.base')}. Measure them again: fit for no epochs with "
                f"MergeStatistics(kinds=['curvature'])."
            )
        return curvature

    def _parameters(self, pl_module: L.LightningModule) -> dict[str, torch.nn.Parameter]:
        prefix, _ = network_of(pl_module)
        named: Any = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        return {name.removeprefix(prefix): p for name, p in canonical_state_dict(named).items()}

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        named = self._parameters(pl_module)
        device = pl_module.device
        assert self._curvature is not None
        if self._device != device:
            self._base = {name: tensor.to(device) for name, tensor in self._base.items()}
            self._curvature, self._device = self._curvature.to(device), device
        deltas = {name: (named[name] - base).float() for name, base in self._base.items()}
        value, gradients = self._curvature.penalty(deltas)
        for name, gradient in gradients.items():
            added = (self.beta * gradient).to(named[name].dtype)
            named[name].grad = added if named[name].grad is None else named[name].grad + added
        self.log("train/curvature_penalty", self.beta * value)
