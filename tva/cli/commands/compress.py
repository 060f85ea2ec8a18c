"""The command ``tva compress``."""

from __future__ import annotations

from tva.cli.tables import make_table, print_json, print_line
from tva.console import make_console
from tva.vectors.compress import CompressReport


def show_compressed(result: CompressReport, json: bool = False) -> None:
    """Show what was stored how.

    Args:
        result: What was written.
        json: Print JSON instead of a table.
    """
    if json:
        return print_json(result)
    console = make_console()
    table = make_table("encoding", "tensors", "bytes", "of float32", "error")
    for name, share in (*sorted(result.shares.items(), key=lambda item: -item[1].num_bytes), ("whole", result.whole)):
        part = share.num_bytes / (4 * share.elements) if share.elements else 0.0
        table.add_row(name, f"{share.tensors}", f"{share.num_bytes:,}", f"{part:.2%}", f"{share.error:.3g}")
    console.print(table)
    error, name = result.largest_error
    print_line(console, f"largest error of a tensor: {error:.3g}, of {name}")
    part = result.num_bytes / result.float32_bytes if result.float32_bytes else 0.0
    print_line(
        console,
        f"wrote {result.output}: {result.num_bytes:,} bytes with its header, {part:.2%} of the float32 size "
        f"({result.float32_bytes:,}), error {result.whole.error:.3g}, in {result.seconds:.1f} s",
    )
