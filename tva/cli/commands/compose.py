"""The command ``tva compose``."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import Any

import yaml
from rich.console import Console

from tva.cli.arguments import take_flag, take_value
from tva.cli.run_function import run_function
from tva.compose.adapter import AdapterReport
from tva.compose.apply import ComposeReport, compose
from tva.compose.mergekit import is_mergekit
from tva.compose.plan import Plan
from tva.console import make_console, print_line, size_text
from tva.report.table import EFFECTS, plan_columns, print_table

HELP = "apply a recipe to a checkpoint on disk in bounded memory: no Trainer, no data, any architecture"
run = compose
SAID_BY_MERGEKIT = ("base", "vectors", "recipe", "coefs", "scaling_coef", "slices")


def read_words(words: Sequence[str]) -> list[str]:
    """Return the arguments, with ``--as`` by the name that it has in Python, where ``as`` is a keyword."""
    return [re.sub(r"^--as(?==|$)", "--write_as", word) for word in words]


def start(words: Sequence[str], as_json: bool) -> bool:
    """Run the command; a mergekit configuration becomes its options first."""
    words, print_recipe = take_flag(words, "--print_recipe")
    words, file = take_value(words, "--mergekit")
    _, config = take_value(words, "--config")
    if config is not None and is_mergekit(config):
        raise ValueError(
            f"{config} is a mergekit configuration, not options of tva: give it by --mergekit {config}, and add "
            f"--print_recipe to see what it becomes."
        )
    if file is None:
        if print_recipe:
            raise ValueError("--print_recipe shows what a mergekit configuration becomes: give one by --mergekit FILE.")
        return run_function("compose", sys.modules[__name__], words, as_json)
    from tva.compose.mergekit_recipe import read_mergekit

    given = [word for word in words if word.partition("=")[0].removeprefix("--").partition(".")[0] in SAID_BY_MERGEKIT]
    if given:
        raise ValueError(
            f"{given[0].partition('=')[0]} is set by {file}. Leave it out; or save what --print_recipe prints, change "
            f"it and give it by --config."
        )
    found = read_mergekit(file)
    if print_recipe:
        print("".join(f"# {note}\n" for note in found.notes), end="")
        print(yaml.safe_dump(found.options, sort_keys=False, allow_unicode=True, width=10**6), end="")
        return True
    for note in found.notes:
        print(f"{file}: {note}", file=sys.stderr)
    options = [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in found.options.items()
    ]
    return run_function("compose", sys.modules[__name__], [*options, *words], as_json)


def show(result: ComposeReport | AdapterReport | Plan, mergekit: str | None = None, print_recipe: bool = False) -> None:
    """Print what was written with its effect by group of tensors, or what would be done.

    Args:
        result: What was written, or the plan.
        mergekit: A mergekit configuration, which replaces base, vectors, recipe, coefficients and slices.
        print_recipe: Print the mergekit configuration as a file for --config, and write nothing.
    """
    console = make_console()
    if isinstance(result, Plan):
        _print_plan(console, result)
        return
    if isinstance(result, AdapterReport):
        _print_adapter(console, result)
        return
    print_table(console, EFFECTS, result.effects.items())
    for note in result.notes:
        print_line(console, note if note.startswith("requantized") else f"read {note}")
    print_line(
        console,
        f"wrote {result.output}: {size_text(result.num_bytes)} in {result.seconds:.1f} s, {result.edited.digest}, "
        f"from the base {result.base.digest}",
    )
    if result.undo is not None:
        share = result.undo_bytes / max(1, result.num_bytes)
        print_line(
            console,
            f"wrote {result.undo}: {result.undo_bytes:,} bytes, {share:.1%} of the output's; from the two, tva revert "
            f"{result.output} --output BASE restores the base",
        )


def _print_adapter(console: Console, result: AdapterReport) -> None:
    for note in result.notes:
        print_line(console, f"read {note}")
    if result.core:
        print_line(console, "merged in the core space of the adapters; in the space of the weights it is another edit")
    low, high = result.ranks
    ranks = f"{low}" if low == high else f"{low} to {high}"
    whole = f", and {result.whole} tensors saved whole" if result.whole else ""
    worst, largest = result.worst
    lost = f"; recompressing lost {result.error:.2%} of the change, at most {largest:.2%}, in {worst}" if worst else ""
    print_line(
        console,
        f"wrote {result.output}: an adapter of {result.modules} modules of rank {ranks}"
        f"{whole}, {size_text(result.num_bytes)} in {result.seconds:.1f} s{lost}",
    )


def _print_plan(console: Console, plan: Plan) -> None:
    print_line(console, plan.formula, "bold")
    print_table(console, plan_columns(plan.columns), plan.rows)
    for note in plan.notes:
        print_line(console, f"read {note}")
    print_line(console, plan.summary())
    if plan.nodes:
        first = f"first one process reads {size_text(plan.first_read_bytes)}; then " if plan.first_read_bytes else ""
        most = {key: max(getattr(node, key) for node in plan.nodes) for key in vars(plan.nodes[0])}
        print_line(
            console,
            f"{first}{len(plan.nodes)} nodes compute {sum(node.shards for node in plan.nodes)} shards: each at most "
            f"{most['shards']}, reading {size_text(most['read_bytes'])} and writing "
            f"{size_text(most['write_bytes'])}.",
        )


def to_json(result: ComposeReport | AdapterReport | Plan) -> dict[str, Any]:
    """Return plain values."""
    if isinstance(result, AdapterReport):
        return vars(result)
    if isinstance(result, Plan):
        rows = [
            {
                "tensors": row.names,
                "dtype": f"torch.{row.spec.dtype_name}",
                "shape": list(row.spec.sizes),
                "coefs": row.coefs,
            }
            for row in result.rows
        ]
        return {**vars(result), "rows": rows}
    effects = {
        group: {**vars(effect), "relative_change": effect.relative_change} for group, effect in result.effects.items()
    }
    return {**vars(result), "base": result.base.digest, "edited": result.edited.digest, "effects": effects}
