"""Run benchmarks into the ledger, and make the tables of the documentation from it.

python -m benchmarks run NAME --seeds 0 1 2 [--OPTION VALUE]
python -m benchmarks tables            # rewrites README.md and docs/results
python -m benchmarks check             # status 1 if a table is not what the ledger gives; lists what is older
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

from benchmarks import ledger


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands; return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure, and write the values into docs/results/data")
    run.add_argument("name")
    run.add_argument("--seeds", type=int, nargs="+", required=True)
    commands.add_parser("tables", help="rewrite the tables of README.md and docs/results")
    commands.add_parser("check", help="compare the tables with the ledger, and list results older than the code")
    options, rest = parser.parse_known_args(words)
    if options.command == "run":
        given = _given(parser, options.name, rest)
        ledger.run(options.name, options.seeds, given, shlex.join(["python", "-m", "benchmarks", *words]))
        return 0
    if rest:
        parser.error(f"unexpected argument {rest[0]!r}")
    return rewrite() if options.command == "tables" else check()


def _given(parser: argparse.ArgumentParser, name: str, words: Sequence[str]) -> dict[str, object]:
    """Return the options of a benchmark."""
    try:
        defaults = ledger.benchmark(name).OPTIONS
    except ValueError as error:
        parser.error(str(error))
    own = argparse.ArgumentParser(prog=f"python -m benchmarks run {name}")
    for key, value in defaults.items():
        own.add_argument(f"--{key}", type=type(value) if value is not None else str, default=value)
    found = vars(own.parse_args(words))
    return {key: value for key, value in found.items() if value != defaults[key]}


def rewrite() -> int:
    """Rewrite the pages whose tables are not what the ledger gives."""
    for page in ledger.pages():
        text = page.read_text()
        if (made := ledger.rewrite(text)) != text:
            page.write_text(made)
            print(f"{page.relative_to(ledger.ROOT)} rewritten")
    return 0


def check() -> int:
    """Return 1 if a page is not what the ledger gives; print that, and which results are older than their code."""
    wrong = [page for page in ledger.pages() if ledger.rewrite(page.read_text()) != page.read_text()]
    for page in wrong:
        print(f"{page.relative_to(ledger.ROOT)} is not what the ledger gives: python -m benchmarks tables")
    for page in ledger.pages():
        for heading in ledger.unmarked(page.read_text()):
            print(
                f"{page.relative_to(ledger.ROOT)}: a table under {heading!r} is not of the ledger, nor said to be older"
            )
    stale = list(ledger.older())
    if stale:
        print("older than the code they depend on:", *stale, sep="\n  ")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
