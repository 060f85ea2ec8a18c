"""What Fisher and RegMean merging need of a fine-tuned model: Fisher information and Gram matrices of inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tva.checkpoints import canonical_names


@dataclass(frozen=True)
class Information:
    """Measured on one model, on the CPU, under the names of its state dict.

    Attributes:
        fisher: For every trained parameter its diagonal Fisher information, float32, of the parameter's shape.
        grams: For every trained weight matrix the Gram matrix of its inputs, float32, shape (inputs, inputs).
        num_examples: How many examples were seen.
    """

    fisher: dict[str, Tensor]
    grams: dict[str, Tensor]
    num_examples: int


def measure_information(
    model: nn.Module,
    examples: Iterable[Any],
    loss: Callable[[Any], Tensor],
    num_examples: int = 256,
    conv: bool = False,
    add_up: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Information:
    r"""Measure the diagonal Fisher information and the Gram matrices of layers' inputs, an example at a time.

    The Fisher information is :math:`\frac1N \sum_i (\nabla_\theta \log p(y_i | x_i))^2` with the labels of the data
    (the "empirical" one), in evaluation mode. A Gram matrix is :math:`X^\top X / N` with one row of :math:`X` for each
    position that a layer is applied to; it is divided by the number of examples, not of positions, so that models
    measured on different numbers of them weigh the same.

    Args:
        model: Its weights, gradients and modes are afterwards what they were.
        examples: Batches of one example each.
        loss: From such a batch to its negative log-likelihood, with the model as it is.
        num_examples: See at most this many.
        conv: Also measure convolutions (of one group that leave padding to torch), whose inputs are the patches.
        add_up: Adds a tensor up over processes that each see other examples of one model; all of them must call.

    Returns:
        Matrices are those of `torch.nn.Linear` and of GPT-2's ``Conv1D``; a layer that was never called has none.

    Raises:
        ValueError: There is no example, nothing to train, or a gradient is not finite.

    Source: Matena and Raffel, "Merging models with Fisher-weighted averaging", NeurIPS 2022; Jin et al., "Dataless
    knowledge fusion by merging weights of language models", ICLR 2023.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> found = measure_information(layer, [torch.tensor([[3.0, 4.0]])], lambda x: layer(x).sum())
        >>> found.fisher["weight"], found.grams["weight"]
        (tensor([[ 9., 16.]]), tensor([[ 9., 12.],
                [12., 16.]]))
    """
    parameters = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    if not parameters:
        raise ValueError("The model has no parameter that is trained (requires_grad), so that it has no information.")
    distinct = list({id(parameter): parameter for parameter in parameters.values()}.values())
    squares = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in distinct]
    count = 0
    with evaluating(model), _watching(model, conv) as grams, torch.enable_grad():
        for example in examples:
            if count == num_examples:
                break
            gradients = torch.autograd.grad(loss(example), distinct, allow_unused=True)
            for square, gradient in zip(squares, gradients, strict=True):
                if gradient is not None:
                    square.addcmul_(gradient.float(), gradient.float())
            count += 1
    count = int(add_up(torch.tensor(float(count))))
    if not count:
        raise ValueError("At least one example is needed to measure a model's information; there was none.")
    means = [(add_up(square) / count).cpu() for square in squares]
    found = {id(parameter): mean for parameter, mean in zip(distinct, means, strict=True)}
    broken = [name for name, parameter in parameters.items() if not bool(found[id(parameter)].isfinite().all())]
    if broken:
        raise ValueError(f"The gradients of {', '.join(broken[:3])} are not finite; the model or an example is broken.")
    matrices = dict(zip(grams, _matrices(list(grams.values()), count, add_up), strict=True))
    seen = [name for name, matrix in matrices.items() if matrix is not None]
    return Information(
        {new: found[id(parameters[old])] for new, old in canonical_names(list(parameters)).items()},
        {new: matrices[old] for new, old in canonical_names(seen).items()},
        count,
    )


class Gram:
    """Sum of products of rows, in float64; rows wait until there are enough for one large product.

    Args:
        max_size: Of rows that are longer only the diagonal is summed.
    """

    def __init__(self, max_size: int | None = None) -> None:
        self.seen, self.max_size = False, max_size
        self._rows: list[Tensor] = []
        self._total = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Add rows, shape (positions, columns)."""
        if not self.seen:
            diagonal = self.max_size is not None and rows.shape[1] > self.max_size
            self._total = torch.zeros(rows.shape[1:] if diagonal else 2 * rows.shape[1:], dtype=torch.float64)
        self.seen = True
        self._rows.append(rows.detach())
        if self._total.ndim == 1 or sum(map(len, self._rows)) >= len(self._total):
            self._flush()

    def _flush(self) -> None:
        rows = torch.cat(self._rows).float()
        self._total += (rows.T @ rows if self._total.ndim == 2 else rows.square().sum(dim=0)).cpu()
        self._rows = []

    def total(self) -> Tensor:
        """Return the sum, shape (columns, columns), or its diagonal."""
        if self._rows:
            self._flush()
        return self._total


def _matrices(grams: list[Gram], count: int, add_up: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
    """Return the matrices over all processes, of which some may never have called a layer."""
    if not grams:
        return []
    seen = add_up(torch.tensor([float(gram.seen) for gram in grams]))
    sizes = add_up(torch.tensor([float(len(gram.total())) for gram in grams])) / seen.clamp(min=1)
    done: dict[int, Tensor | None] = {}  # tied layers share one
    for gram, calls, size in zip(grams, seen.tolist(), sizes.tolist(), strict=True):
        if id(gram) in done:
            continue
        total = gram.total() if gram.seen else torch.zeros(int(size), int(size), dtype=torch.float64)
        done[id(gram)] = (add_up(total) / count).float() if calls else None
    return [done[id(gram)] for gram in grams]


@contextmanager
def _watching(model: nn.Module, conv: bool) -> Iterator[dict[str, Gram]]:
    grams: dict[str, Gram] = {}
    hooks = []
    by_module: dict[nn.Module, Gram] = {}

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not isinstance(module, nn.Conv2d):
            by_module[module].add(inputs[0].reshape(-1, inputs[0].shape[-1]))
            return
        patches = F.unfold(inputs[0], module.kernel_size, module.dilation, module.padding, module.stride)
        if patches.shape[-1] == output.shape[-2:].numel():  # else it pads by itself, in a way that cannot be known
            by_module[module].add(patches.transpose(1, 2).flatten(0, 1))  # (images · positions, inputs · kernel)

    for name, module in model.named_modules(remove_duplicate=False):
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # transformers', for GPT-2
        patched = conv and isinstance(module, nn.Conv2d) and module.groups == 1
        patched = patched and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        if (linear or patched) and module.weight.requires_grad:
            if module not in by_module:
                by_module[module] = Gram()
                hooks.append(module.register_forward_hook(watch))
            grams[f"{name}.weight" if name else "weight"] = by_module[module]
    try:
        yield grams
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and each of its modules back into its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
