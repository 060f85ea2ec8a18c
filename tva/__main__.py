"""Run the command line as ``python -m tva``."""

from tva.cli import run

run()
