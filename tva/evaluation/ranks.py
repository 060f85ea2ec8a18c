"""The processes of one Trainer: which strategies an evaluation takes, and what each process saw put together."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher


def check_strategy(trainer: L.Trainer) -> None:
    """Check that every process of a Trainer holds the whole model, and stays between evaluations.

    Raises:
        ValueError: The strategy shards the model, or starts new processes for every evaluation.
    """
    strategy = trainer.strategy
    whole = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) and not isinstance(strategy, DeepSpeedStrategy)
    if not whole:
        raise ValueError(
            f"An edit needs the whole model in every process, which {type(strategy).__name__} does not keep. Use "
            f"--trainer.devices 1, or --trainer.strategy ddp for more."
        )
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise ValueError(
            "An edit evaluates many times in the same processes, and this strategy starts new ones each time. Use "
            "--trainer.strategy ddp, in a script or on the command line, or --trainer.devices 1."
        )


def gather(trainer: L.Trainer, value: Any) -> list[Any]:
    """Collect a value from every process, in the order of their ranks; all must call this."""
    if trainer.world_size == 1:
        return [value]
    found: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(found, value)
    return found


def in_turn(shares: list[list[Any]]) -> list[Any]:
    """Put together what processes took in turn.

    Example:
        >>> in_turn([[0, 2, 4], [1, 3]])
        [0, 1, 2, 3, 4]
    """
    count = len(shares)
    return [shares[place % count][place // count] for place in range(sum(map(len, shares)))]
