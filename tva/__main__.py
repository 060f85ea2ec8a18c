"""Run the command line as ``python -m tva``."""

from tva.cli.main import run

run()
