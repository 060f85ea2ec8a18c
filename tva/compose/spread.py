"""Compute the shards of an output on several workers, each of which reads only what its shard needs.

A worker writes a shard in its place under the output's hidden name; the process that was started keeps the journal,
writes headers and index, and gives the folder its name when all is there.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pickle
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tva._torch import num_threads
from tva.checkpoints import Output
from tva.checkpoints.shards import Shard, shard_tensors
from tva.checkpoints.spec import Elements
from tva.compose.engine import Composer
from tva.compose.inputs import input_names
from tva.compose.plan import NodeShare, Plan
from tva.compose.recipe import Recipe
from tva.console import progress
from tva.executors import Executor, Worker, make_executor


@dataclass
class ShardSink:
    """Writes one shard.

    Attributes:
        shard: The shard, open.
        done: Nothing: what is done is not sent to workers.
    """

    shard: Shard
    done: Mapping[str, Any] = field(default_factory=dict)

    def write(self, name: str, start: int, chunk: Elements) -> None:
        """Write elements of a tensor."""
        self.shard.write(name, start, chunk)

    def finish(self, name: str, record: dict[str, Any]) -> None:
        """Do nothing: the composer keeps the record."""


def open_workers(engine: str, output: Path, **others: object) -> Executor | None:
    """Return what computes shards, or None for ``local``: this process.

    Args:
        engine: As for `tva.compose`.
        output: Where the output goes.
        others: Options that one process serves, by name.

    Raises:
        ValueError: The engine cannot be had, or does not serve the other options.
    """
    if engine == "local":
        return None
    given = [name for name, value in others.items() if value]
    if output.suffix or given:
        what = given[0] if given else f"output={output}"
        raise ValueError(
            f"The engine {engine!r} computes the shards of a folder of safetensors, and {what} is written by one "
            f"process. Leave engine out, or {what.partition('=')[0] if given else 'give a folder'}."
        )
    return make_executor(engine, processes=True)


def compose_shards(composer: Composer, out: Output, executor: Executor, opening: Mapping[str, Any]) -> None:
    """Compute every shard that is not whole, and put its records into the composer.

    Args:
        composer: The edit, opened here: what must be known of the whole model is collected here, once.
        out: The output, begun.
        executor: Computes the shards.
        opening: Arguments of `Composer.open`, with the recipe left out.

    Raises:
        OSError: A worker was lost, and its shard again and again.
        ValueError: A worker cannot take part, or the edit cannot be made.
    """
    composer.records = dict(out.done)
    shards = out.hand_out()
    if not shards:
        return
    executor.check(out.path.parent)
    composer.observe()
    recipe = composer.recipe
    job = {
        "opening": dict(opening),
        "recipe": (recipe.text, input_names(opening["vectors"], opening.get("slices")), recipe.coefs, True),
        "chunk": composer.chunk,
        "workers": composer.workers,
        "states": recipe.packed(composer.model_states),
        "identities": composer.identities,
    }
    biggest_first = sorted(shards, key=lambda shard: -sum(spec.num_bytes for spec in shard.tensors.values()))
    ended = executor.run(functools.partial(compute_shard, job=pickle.dumps(job)), biggest_first)
    with closing(executor), closing(ended):
        for (shard, found), _ in zip(ended, progress(biggest_first, "composing"), strict=True):
            if isinstance(found, Exception):
                raise found
            out.take_back(shard, found)
            composer.records |= found
    for name, record in composer.records.items():
        for key, digest in record["vectors"].items():
            composer.sources[key].weights.take_digest(name, digest)


def compute_shard(shard: Shard, worker: Worker, job: bytes) -> dict[str, Mapping[str, Any]]:
    """Compute one shard, and return the records of its tensors."""
    composer = _opened(job)
    if not shard.path.is_file():
        raise ValueError(f"{worker.name} does not see {shard.path}. Give an output in a folder that all nodes share.")
    composer.records = {}
    shard.open()
    try:
        composer.compute(list(shard.tensors), ShardSink(shard))
        os.fsync(shard.file)
    finally:
        shard.close()
    return composer.records


def spread_plan(plan: Plan, composer: Composer, max_shard_bytes: int, executor: Executor) -> Plan:
    """Add to a plan what each node does: shards go to the node that has least to write, the largest first."""
    count = executor.num_nodes if executor.num_nodes > 1 else executor.num_workers
    over_model = [method for method in composer.recipe.observing if method.over_model]
    before = sum(method.usual_passes for method in over_model)
    nodes, shards = [NodeShare() for _ in range(count)], shard_tensors(composer.layout(), max_shard_bytes)
    sizes = [sum(spec.num_bytes for spec in shard.values()) for shard in shards]
    for size, shard in sorted(zip(sizes, shards, strict=True), key=lambda pair: -pair[0]):
        node = min(nodes, key=lambda node: node.write_bytes)
        node.shards += 1
        node.write_bytes += size
        node.read_bytes += (plan.passes - before) * sum(map(composer.stored_bytes, shard))
    first = before * sum(map(composer.stored_bytes, composer.names))
    if composer.recipe.is_random:  # a vector's identity keys its random numbers
        weights = [source.weights for source in composer.sources.values()]
        first += sum(each.entry(name).stored_bytes for each in weights for name in each)
    return dataclasses.replace(plan, nodes=nodes, first_read_bytes=first)


@functools.lru_cache(maxsize=1)
def _opened(job: bytes) -> Composer:
    given = pickle.loads(job)
    recipe = Recipe(*given["recipe"])
    composer = Composer.open(recipe=recipe, **given["opening"])
    composer.chunk, composer.workers = given["chunk"], min(given["workers"], num_threads())
    composer.model_states, composer.identities = recipe.unpacked(given["states"]), given["identities"]
    return composer
