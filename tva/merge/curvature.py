r"""Kronecker-factored curvature: how much a change of weights changes a model's outputs on a task's examples.

For a weight matrix the expected squared change of the outputs is :math:`\mathrm{tr}(G\,\Delta W\,A\,\Delta W^\top)`,
with :math:`A = E[aa^\top]` of the layer's inputs and :math:`G = E[gg^\top]` of the outputs' derivatives at its own.

Source: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML 2015; for
layers applied at many positions, "expand" of Eschenhagen et al., NeurIPS 2023; as a penalty between tasks, Porrello et
al., "Dataless weight disentanglement in task arithmetic via Kronecker-factored approximate curvature", ICLR 2026.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tva.checkpoints import canonical_names, open_weights
from tva.checkpoints.foreign import parse_json
from tva.errors import some
from tva.merge.model_statistics import Gram, evaluating

Probe = Literal["outputs", "labels"]
MAX_SIZE = 8192  # a factor of more rows, such as a vocabulary's, keeps its diagonal only


@dataclass(frozen=True)
class Block:
    """The curvature of one use of a weight.

    Attributes:
        weight: The weight's name.
        kind: ``linear`` or ``conv`` (outputs × inputs), ``transposed`` (inputs × outputs, GPT-2's) or ``embedding``
            (rows are inputs).
        bias: Name of the bias, which is one more input that is always 1.
        a: A, shape (inputs, inputs), the bias last; or its diagonal.
        g: G, shape (outputs, outputs); or its diagonal.
    """

    weight: str
    kind: str
    bias: str | None
    a: Tensor
    g: Tensor

    def multiply(self, deltas: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        r"""Return the penalty of a change, and :math:`G\,\Delta W\,A`, which is half its gradient, by name."""
        delta = deltas[self.weight]
        rows = delta.flatten(1) if self.kind in ("linear", "conv") else delta.T  # (outputs, inputs)
        if self.bias is not None:
            rows = torch.cat([rows, deltas[self.bias][:, None]], dim=1)
        product = _times(self.g, _times(self.a, rows.T).T)
        found, value = {}, (rows * product).sum()
        if self.bias is not None:
            found[self.bias], product = product[:, -1], product[:, :-1]
        found[self.weight] = (product if self.kind in ("linear", "conv") else product.T).reshape(delta.shape)
        return value, found


def _times(factor: Tensor, matrix: Tensor) -> Tensor:
    return factor @ matrix if factor.ndim == 2 else factor[:, None] * matrix


@dataclass(frozen=True)
class Curvature:
    """The curvature of a model on a task, or summed over tasks.

    Attributes:
        blocks: Of weight matrices and their biases.
        diagonals: By name the diagonal of every other parameter, of its shape.
        num_examples: How many examples were seen.
        facts: What the file says besides.
    """

    blocks: Sequence[Block]
    diagonals: Mapping[str, Tensor]
    num_examples: int
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """The parameters that it has something of."""
        found = {name for block in self.blocks for name in (block.weight, block.bias) if name is not None}
        return found | self.diagonals.keys()

    def penalty(self, deltas: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        r"""Return :math:`\sum_l \mathrm{tr}(G_l\,\Delta W_l\,A_l\,\Delta W_l^\top)` and its gradient by name.

        Args:
            deltas: Changes of all parameters of `names`, on its device; others are ignored.
        """
        total, gradients = torch.zeros((), device=next(iter(deltas.values())).device), {}
        for block in self.blocks:
            value, products = block.multiply(deltas)
            total = total + value
            for name, product in products.items():
                gradients[name] = gradients.get(name, 0) + 2 * product
        for name, diagonal in self.diagonals.items():
            total = total + (diagonal * deltas[name].square()).sum()
            gradients[name] = 2 * diagonal * deltas[name]
        return total, gradients

    def to(self, device: torch.device) -> Curvature:
        """Return it on a device."""
        blocks = [Block(b.weight, b.kind, b.bias, b.a.to(device), b.g.to(device)) for b in self.blocks]
        return Curvature(
            blocks, {name: each.to(device) for name, each in self.diagonals.items()}, self.num_examples, self.facts
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return what a file holds; `metadata` belongs to it."""
        found = {f"{name}/diagonal": diagonal for name, diagonal in self.diagonals.items()}
        for block in self.blocks:
            found |= {f"{block.weight}/{block.kind}/A": block.a, f"{block.weight}/{block.kind}/G": block.g}
        return found

    def metadata(self) -> dict[str, str]:
        """Return what the file's header says."""
        biases = {block.weight: block.bias for block in self.blocks if block.bias is not None}
        return {
            **self.facts,
            "tva.statistics": "curvature",
            "tva.num_examples": str(self.num_examples),
            "tva.biases": json.dumps(biases),
        }


def read_curvature(path: str | os.PathLike[str]) -> Curvature:
    """Read a file that `tva.callbacks.MergeStatistics` wrote.

    Raises:
        ValueError: It is another file.
    """
    weights = open_weights(path)
    header = weights.metadata
    if header.get("tva.statistics") != "curvature":
        raise ValueError(
            f"{path} must hold the curvature that MergeStatistics(kinds=['curvature']) writes; it holds "
            f"{some(list(weights), 2) or 'nothing'}."
        )
    biases = parse_json(header.get("tva.biases", "null"), f"{path}: tva.biases", {str: str})
    num_examples = parse_json(header.get("tva.num_examples", "null"), f"{path}: tva.num_examples", int)
    if lost := sorted({f"{name[:-1]}G" for name in weights if name.endswith("/A")} - set(weights)):
        raise ValueError(f"{path} lacks {some(lost)}, without which their A are of no use. Write it again.")
    diagonals, blocks = {}, []
    for name in weights:
        start, _, part = name.rpartition("/")
        if part == "diagonal":
            diagonals[start] = weights[name]
        elif part == "A":
            weight, _, kind = start.rpartition("/")
            bias = biases.get(weight) if kind != "embedding" else None
            blocks.append(Block(weight, kind, bias, weights[name], weights[f"{start}/G"]))
    return Curvature(blocks, diagonals, num_examples, header)


def add_up(parts: Iterable[Curvature]) -> Curvature:
    r"""Sum the curvature of several tasks in the memory of two of them.

    :math:`\sum_s A_s \otimes G_s` is approximated by :math:`\bar A \otimes \sum_s G_s` with :math:`\bar A` the mean of
    the tasks' A, each weighed by its examples; diagonals are summed exactly.

    Raises:
        ValueError: There is none, or they are of different parameters.
    """
    total: Curvature | None = None
    for part in parts:
        if total is None:
            total = part
            continue
        pairs = [(b.weight, b.kind, b.bias, b.a.shape) for b in total.blocks]
        if pairs != [(b.weight, b.kind, b.bias, b.a.shape) for b in part.blocks] or total.names != part.names:
            odd = sorted(total.names ^ part.names)
            raise ValueError(
                f"Curvature can be added up of one architecture, measured on the same layers; these differ in "
                f"{some(odd) or 'the way their layers are used'}."
            )
        count = total.num_examples + part.num_examples
        share = part.num_examples / count
        blocks = [
            Block(one.weight, one.kind, one.bias, one.a.lerp(two.a, share), one.g + two.g)
            for one, two in zip(total.blocks, part.blocks, strict=True)
        ]
        diagonals = {name: total.diagonals[name] + part.diagonals[name] for name in total.diagonals}
        total = Curvature(blocks, diagonals, count)
    if total is None:
        raise ValueError("At least one file of another task's curvature is needed; there was none.")
    return total


# --- measuring


def measure_curvature(
    model: nn.Module,
    examples: Iterable[Any],
    outputs: Callable[[Any], Tensor],
    num_examples: int = 256,
    probe: Probe = "outputs",
    num_samples: int = 1,
    seed: int = 0,
    max_size: int = MAX_SIZE,
) -> Curvature:
    r"""Measure the curvature of a model's outputs at its weights, an example at a time, in evaluation mode.

    Linear layers (torch's attention and GPT-2's ``Conv1D`` too), convolutions of one group and embeddings have A and G;
    every other parameter (normalization, class token …) has the diagonal. A is a mean over positions and examples, G a
    sum over positions and a mean over examples, so that a layer applied once an example has exactly its own block.

    Args:
        model: Its weights, gradients and modes are afterwards what they were.
        examples: Batches of one example each.
        outputs: From such a batch to the model's outputs, shape (rows, outputs): one row, or one for each token.
        num_examples: See at most this many.
        probe: ``"outputs"``: :math:`J^\top J` of the outputs, by normal probes, so that the penalty is the expected
            squared change of the outputs. ``"labels"``: the generalized Gauss-Newton matrix of the cross entropy, by
            labels drawn from the model, so that it is twice the expected divergence. A mean over rows.
        num_samples: Probes for each example.
        seed: Of the probes.
        max_size: A factor of more rows keeps its diagonal only.

    Raises:
        ValueError: There is no example, or nothing to train.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("The model has no parameter that is trained (requires_grad), so that it has no curvature.")
    names = {id(parameter): name for name, parameter in named.items()}
    squares = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in named.items()}
    sums: dict[tuple[str, str, str | None], tuple[Gram, Gram]] = {}
    unexplained: set[str] = set()
    generator, count = torch.Generator().manual_seed(seed), 0
    with evaluating(model), torch.enable_grad():
        for example in itertools.islice(examples, num_examples):
            with _Watch(names) as watch:
                found = outputs(example)
            goals = [_probed(found, probe, generator) for _ in range(num_samples)]
            for place, goal in enumerate(goals):
                watch.clear()
                gradients = torch.autograd.grad(
                    goal, list(named.values()), retain_graph=place + 1 < num_samples, allow_unused=True
                )
                by_name = dict(zip(named, gradients, strict=True))
                unexplained |= watch.unexplained(by_name)
                for name, gradient in by_name.items():
                    if gradient is not None:
                        squares[name] += gradient.detach().float().square() / num_samples
                for use in watch.uses:
                    if not use.gradient.numel():
                        continue
                    left, right = sums.setdefault(
                        use.key, (Gram(0 if use.key[1] == "embedding" else max_size), Gram(max_size))
                    )
                    left.add(use.rows() / (len(use.rows()) * num_samples) ** 0.5)
                    right.add(use.gradient / num_samples**0.5)
            count += 1
    if not count:
        raise ValueError("At least one example is needed to measure a model's curvature; there was none.")
    return _summed(named, squares, sums, unexplained, count)


def _summed(
    named: Mapping[str, Tensor],
    squares: Mapping[str, Tensor],
    sums: Mapping[tuple[str, str, str | None], tuple[Gram, Gram]],
    unexplained: set[str],
    count: int,
) -> Curvature:
    """Divide by the number of examples; what no layer explains keeps its diagonal."""
    new = {old: name for name, old in canonical_names(list(named)).items()}
    blocks = []
    for (weight, kind, bias), (a, g) in sums.items():
        if weight not in unexplained and bias not in unexplained:
            factors = [(gram.total() / count).float().cpu() for gram in (a, g)]
            blocks.append(Block(new[weight], kind, None if bias is None else new[bias], *factors))
    covered = {name for block in blocks for name in (block.weight, block.bias)}
    diagonals = {new[name]: (square / count).cpu() for name, square in squares.items() if new[name] not in covered}
    return Curvature(blocks, diagonals, count)


def _probed(outputs: Tensor, probe: Probe, generator: torch.Generator) -> Tensor:
    """Return the scalar whose gradient's outer product is on average the curvature of a mean over rows."""
    if outputs.ndim != 2 or not outputs.requires_grad:
        raise ValueError(
            f"Curvature is measured of outputs of shape (rows, outputs) that depend on the trained parameters; found "
            f"{list(outputs.shape)}{'' if outputs.requires_grad else ' without a gradient'}."
        )
    if probe == "labels":
        probabilities = outputs.detach().float().softmax(dim=-1).cpu()
        labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(outputs.device)
        return F.cross_entropy(outputs.float(), labels, reduction="sum") / len(outputs) ** 0.5
    directions = torch.randn(outputs.shape, generator=generator).to(outputs)
    return (outputs * directions).sum() / len(outputs) ** 0.5


class _Use:
    """One application of a weight: its inputs, and the gradient of what it gave.

    Args:
        key: Weight, kind and bias.
        inputs: What it was applied to.
        convolve: Stride, padding and dilation of a convolution.
        shape: Of the weight.
    """

    def __init__(self, key: tuple[str, str, str | None], inputs: Tensor, convolve: Any, shape: torch.Size) -> None:
        self.key, self.inputs, self.convolve, self.shape = key, inputs.detach(), convolve, shape
        self.gradient = torch.zeros(0)  # (positions, outputs)
        self._rows: Tensor | None = None

    def rows(self) -> Tensor:
        """Return the inputs, shape (positions, inputs), with a 1 for a bias."""
        if self._rows is None:
            if self.key[1] == "embedding":
                found = F.one_hot(self.inputs.flatten(), self.shape[0]).float()
            elif self.key[1] == "conv":
                stride, padding, dilation = self.convolve
                patches = F.unfold(self.inputs, tuple(self.shape[2:]), dilation, padding, stride)
                found = patches.transpose(1, 2).flatten(0, 1)
            else:
                found = self.inputs.reshape(-1, self.inputs.shape[-1])
            if self.key[2] is not None:
                found = torch.cat([found, found.new_ones(len(found), 1)], dim=1)
            self._rows = found
        return self._rows

    def keep(self, gradient: Tensor) -> None:
        """Keep the gradient of the outputs; the hook of autograd."""
        moved = gradient.detach().flatten(2).transpose(1, 2) if self.key[1] == "conv" else gradient.detach()
        self.gradient = moved.reshape(-1, moved.shape[-1])


class _Watch:
    """Record every application of a named weight by a linear map, a convolution or an embedding within the context.

    torch's attention multiplies without calling a layer, so that the functions are wrapped rather than layers hooked.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        self.names, self.uses = names, list[_Use]()
        self._before: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> _Watch:
        for owner, name in ((F, "linear"), (F, "conv2d"), (F, "embedding"), (torch, "addmm")):
            function = getattr(owner, name)
            self._before.append((owner, name, function))
            setattr(owner, name, functools.partial(self._noted, name, function))
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, function in self._before:
            setattr(owner, name, function)

    def _noted(self, name: str, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        output = function(*args, **kwargs)
        use = self._use(name, args, kwargs)
        if use is not None and output.requires_grad:
            output.register_hook(use.keep)
            self.uses.append(use)
        return output

    def _use(self, function: str, args: Any, kwargs: Mapping[str, Any]) -> _Use | None:
        if function == "linear":
            inputs, weight, bias = _given(args, kwargs, "input", "weight", "bias")
            kind, convolve = "linear", None
        elif function == "conv2d":
            inputs, weight, bias, stride, padding, dilation, groups = _given(
                args, kwargs, "input", "weight", "bias", "stride", "padding", "dilation", "groups"
            )
            kind, convolve = "conv", (stride or 1, padding or 0, dilation or 1)
            if groups not in (None, 1) or isinstance(padding, str) or inputs.ndim != 4:
                return None
        elif function == "embedding":
            inputs, weight = _given(args, kwargs, "input", "weight")
            kind, convolve, bias = "embedding", None, None
        elif not kwargs:
            bias, inputs, weight = args
            kind, convolve = "transposed", None
        else:
            return None
        name, added = self.names.get(id(weight)), None if bias is None else self.names.get(id(bias))
        return None if name is None else _Use((name, kind, added), inputs, convolve, weight.shape)

    def clear(self) -> None:
        """Forget gradients, before the next are computed."""
        for use in self.uses:
            use.gradient = torch.zeros(0)

    def unexplained(self, gradients: Mapping[str, Tensor | None]) -> set[str]:
        """Return the noted weights whose gradient is not the sum over their noted uses: something else used them."""
        sums: dict[str, Tensor] = {}
        sizes: dict[str, float] = {}  # of the terms, which may cancel, as those of a key's bias in attention do
        for use in self.uses:
            if not use.gradient.numel():
                continue
            weight, kind, bias = use.key
            rows = use.rows()
            whole = use.gradient.T.to(rows.dtype) @ rows  # (outputs, inputs)
            size = float(use.gradient.abs().sum(dim=0).max() * rows.abs().max())
            for name in (weight, bias):
                if name is not None:
                    sizes[name] = sizes.get(name, 0.0) + size
            if bias is not None:
                sums[bias] = sums.get(bias, 0) + whole[:, -1]
                whole = whole[:, :-1]
            whole = whole if kind in ("linear", "conv") else whole.T
            sums[weight] = sums.get(weight, 0) + whole.reshape(use.shape)
        odd = set()
        for name, found in sums.items():
            expected = gradients[name]
            if expected is None or not torch.allclose(
                found.float(), expected.float(), rtol=1e-2, atol=1e-3 * sizes[name]
            ):
                odd.add(name)
        return odd


def _given(args: Sequence[Any], kwargs: Mapping[str, Any], *names: str) -> list[Any]:
    return [args[place] if place < len(args) else kwargs.get(name) for place, name in enumerate(names)]
