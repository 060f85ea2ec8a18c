"""What an edit of files would do, from headers only: coefficients by tensor, memory, bytes read and written."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from tva.arithmetic import is_edited
from tva.checkpoints import LazyWeights, Spec
from tva.compose.recipe import Recipe
from tva.compose.syntax import BASE
from tva.console import size_text
from tva.layers import label_of
from tva.merge import Chunk
from tva.vectors.lazy import LazyTaskVector


@dataclass
class PlanRow:
    """Tensors that differ only in their layer.

    Attributes:
        names: Their names.
        label: The name they have in common, with ``*`` for the layer.
        spec: Dtype in the output, and shape.
        coefs: For each tensor the numbers that multiply the vectors (or, where the recipe is not linear, the values of
            its coefficients), by name; empty where the tensor is kept as it is.
    """

    label: str
    spec: Spec
    names: list[str] = field(default_factory=list)
    coefs: list[dict[str, float]] = field(default_factory=list)


@dataclass
class NodeShare:
    """What one node of several does.

    Attributes:
        shards: How many shards it computes.
        read_bytes: Bytes that it reads of the inputs.
        write_bytes: Bytes that it writes.
    """

    shards: int = 0
    read_bytes: int = 0
    write_bytes: int = 0


@dataclass
class Plan:
    """What `tva.compose` would do.

    Attributes:
        formula: The edited weights as a formula.
        columns: What the numbers in the rows belong to.
        rows: Tensors, those of all layers together.
        num_elements: Elements of all tensors.
        memory_bytes: Anonymous memory at most.
        read_bytes: Bytes that are read, counting each pass.
        write_bytes: Bytes that are written, and taken on the disk.
        passes: How often the vectors are read, mostly: methods that count may need one pass more.
        largest: Name of the largest tensor that is held whole, if the recipe needs whole tensors.
        notes: What was decided in reading the inputs.
        nodes: What each of several nodes does, if shards were to be spread.
        first_read_bytes: Bytes that one process reads before them, for what must be known of the whole model.
    """

    formula: str
    columns: list[str]
    rows: list[PlanRow]
    num_elements: int
    memory_bytes: int
    read_bytes: int
    write_bytes: int
    passes: int
    largest: str | None = None
    notes: list[str] = field(default_factory=list)
    nodes: list[NodeShare] = field(default_factory=list)
    first_read_bytes: int = 0

    def __repr__(self) -> str:
        return f"Plan({self.formula}: {self.summary()})"

    def _repr_html_(self) -> str:
        """Show it in a notebook: the formula, the coefficients by tensor, and what it would cost."""
        from tva.report.notebook import planned_cell

        return planned_cell(self.formula, self.columns, self.rows, [*self.notes, self.summary()])

    def summary(self) -> str:
        """Return in one sentence what composing would read, write and hold in memory."""
        whole = f", for {self.largest} as a whole" if self.largest else ""
        return (
            f"{self.num_elements:,} parameters; would read {size_text(self.read_bytes)} in {self.passes} "
            f"pass{'es' if self.passes > 1 else ''}, write {size_text(self.write_bytes)}, and take about "
            f"{self.memory_bytes / 2**20:.0f} MiB of memory{whole}. Nothing was written."
        )


def make_plan(
    base: LazyWeights,
    layout: Mapping[str, Spec],
    sources: Mapping[str, LazyTaskVector],
    recipe: Recipe,
    scaling_coef: float,
    kept: Collection[str],
    memory_bytes: int,
) -> Plan:
    """Make the plan of an edit.

    Args:
        base: The base.
        layout: Dtype and shape of every output tensor.
        sources: The vectors.
        recipe: Bound to the base's names.
        scaling_coef: Of the whole recipe.
        kept: Names of tensors that are not edited though they could be.
        memory_bytes: What was predicted.
    """
    rows: dict[tuple[str, Spec, bool], PlanRow] = {}
    for name, spec in layout.items():
        touched = recipe.uses_base or any(name in source.weights for source in sources.values())
        moved = is_edited(spec) and name not in kept and touched
        label = label_of(name)
        row = rows.setdefault((label, spec, moved), PlanRow(label, spec))
        row.names.append(name)
        row.coefs.append(_coefs(recipe, scaling_coef, Chunk(name, shape=spec.sizes)) if moved else {})
    opened = [base, *(source.weights for source in sources.values())]
    in_bytes = [sum(weights.entry(name).stored_bytes for name in weights) for weights in opened]
    passes = 1 + sum(method.usual_passes for method in recipe.observing)
    hashed = sum(in_bytes[1:]) if recipe.is_random else 0  # a vector's identity keys its random numbers
    largest = max(layout, key=lambda name: layout[name].numel(), default=None)
    return Plan(
        formula=f"base + {scaling_coef:g} · ({recipe.text.strip()})",
        columns=list(dict.fromkeys(key for row in rows.values() for coefs in row.coefs for key in coefs)),
        rows=list(rows.values()),
        num_elements=sum(spec.numel() for spec in layout.values()),
        memory_bytes=memory_bytes,
        read_bytes=passes * sum(in_bytes) + hashed,
        write_bytes=sum(spec.num_bytes for spec in layout.values()),
        passes=passes,
        largest=largest if recipe.needs_whole_tensors else None,
        notes=[str(weights.info) for weights in opened if weights.info.notes],
    )


def _coefs(recipe: Recipe, scaling_coef: float, chunk: Chunk) -> dict[str, float]:
    if recipe.is_linear:
        names = [*recipe.vectors, *([BASE] if recipe.uses_base else [])]
        return {vector: scaling_coef * recipe.coef_of(vector, chunk) for vector in names}
    return {"scaling_coef": scaling_coef, **{name: recipe.number(name, chunk) for name in recipe.coefs}}
