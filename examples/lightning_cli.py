"""LightningCLI: add the callback to the YAML file; no code changes.

python examples/lightning_cli.py fit --config examples/lightning_cli.yaml
"""

from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel


def main() -> None:
    LightningCLI(BoringModel, BoringDataModule, seed_everything_default=0)


if __name__ == "__main__":
    main()
