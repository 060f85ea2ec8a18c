"""The base class of merge methods: parameters, optional passes over the deltas, and a function of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tva._torch import Tensor
from tva.checkpoints import HashedWeights
from tva.merge.program import Steps


@dataclass(frozen=True)
class Chunk:
    """The positions of the elements that a method sees, so that randomness depends on nothing else.

    Attributes:
        tensor: Name of the tensor.
        start: Index of the first element in the flattened tensor.
        sources: For each vector what identifies it: the fingerprint of its fine-tuned model, or its name.
        shape: Shape of the whole tensor, of which the elements may be a part.
        layers: For every tensor of the model that is in a layer, which one, from 0, and how many there are.
    """

    tensor: str
    start: int = 0
    sources: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    layers: Mapping[str, tuple[int, int]] = field(default_factory=dict, compare=False, repr=False)


class Method:
    """Base class of merge methods; a subclass is a frozen dataclass whose fields are its parameters.

    A method is applied to a model chunk by chunk: `merge` sees the same elements of every vector, flattened, in chunks
    of any length, and must give the same values whatever the chunks. What it must know of a whole tensor or of the
    whole model beforehand it collects in ``num_passes`` earlier passes over the same chunks. A method that sets
    ``whole`` sees every tensor in one chunk, as decompositions of matrices need, at the cost of that memory.

    Attributes:
        name: Its name in a recipe.
        usage: How it is written in a recipe.
        num_vectors: How many vectors it takes; None for one or more.
        linear: Whether it is a fixed linear combination, so that it also applies to running statistics.
        random: Whether it draws random numbers, keyed by the vectors' identities.
        num_passes: Passes over the deltas before the one that combines, at most.
        whole: Whether every chunk must be a whole tensor, of shape ``chunk.shape`` when viewed as such.
        counts: Whether `observe` takes the deltas one after the other, each gone when it asks for the next, and as
            tensors or numpy arrays.
    """

    name: ClassVar[str]
    usage: ClassVar[str]
    num_vectors: ClassVar[int | None] = None
    linear: ClassVar[bool] = False
    random: ClassVar[bool] = False
    num_passes: ClassVar[int] = 0
    whole: ClassVar[bool] = False
    counts: ClassVar[bool] = False

    @property
    def over_model(self) -> bool:
        """Whether what it collects is collected over the whole model rather than tensor by tensor."""
        return False

    @property
    def usual_passes(self) -> int:
        """Typical number of these passes, for a plan."""
        return self.num_passes

    def observing_bytes(self, num_vectors: int) -> int:
        """Predict the memory in bytes that `observe` takes in one thread, if it is more than a few numbers."""
        return 0

    def inputs(self) -> Mapping[str, HashedWeights]:
        """Return the files that it reads besides the vectors, by path."""
        return {}

    def start(self, num_vectors: int) -> Any:
        """Make the empty state that `observe` fills."""
        return None

    def observe(self, state: Any, deltas: Iterable[Tensor], chunk: Chunk, pass_number: int) -> None:
        """Observe one chunk of each delta in pass ``pass_number``, from 0; several threads may observe at once."""

    def finish(self, state: Any, pass_number: int) -> None:
        """Close pass ``pass_number``: all chunks have been seen."""

    def ready(self, state: Any, pass_number: int) -> bool:
        """Whether pass ``pass_number`` can be left out, since an earlier one has found all that it is for."""
        return False

    def merge(self, deltas: Sequence[Tensor], state: Any, chunk: Chunk) -> Tensor:
        """Combine one chunk of each delta, float32 or float64, shape (elements,); the inputs are left unchanged."""
        raise NotImplementedError  # every subclass says how

    def in_steps(self, arguments: Sequence[Steps], state: Any, chunk: Chunk) -> Steps | None:
        """Return what `merge` does as steps that run fused; None if it cannot be written so.

        Args:
            arguments: Steps that give the value of each vector.
            state: What `observe` has collected.
            chunk: The tensor, from its first element on.
        """
        return None
