"""The command ``tva compress``."""

from __future__ import annotations

from tva.console import make_console, print_line
from tva.report.table import Column, print_table, words
from tva.vectors.compress import CompressReport, compress

HELP = "store a task vector in fewer bytes: by encoding, to a maximum error or to a maximum size"
ORDER = "vector"
run = compress
COLUMNS = [
    words("encoding", lambda row: row[0]),
    Column("tensors", lambda row: f"{row[1].tensors:,}"),
    Column("bytes", lambda row: f"{row[1].num_bytes:,}"),
    Column("of float32", lambda row: f"{_part(row[1].num_bytes, 4 * row[1].elements):.2%}"),
    Column("error", lambda row: f"{row[1].error:.3g}"),
]


def show(result: CompressReport) -> None:
    """Print how the tensors were stored."""
    console = make_console()
    shares = sorted(result.shares.items(), key=lambda item: -item[1].num_bytes)
    print_table(console, COLUMNS, shares, [("whole", result.whole)])
    error, name = result.largest_error
    print_line(console, f"largest error of any tensor: {error:.3g}, in {name}")
    print_line(
        console,
        f"wrote {result.output}: {result.num_bytes:,} bytes with its header, "
        f"{_part(result.num_bytes, result.float32_bytes):.2%} of the float32 size ({result.float32_bytes:,}), "
        f"error {result.whole.error:.3g}, in {result.seconds:.1f} s",
    )


def _part(num_bytes: int, whole: int) -> float:
    return num_bytes / whole if whole else 0.0
