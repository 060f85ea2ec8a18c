"""The processes of one Trainer: which strategies are supported, and how their results are combined."""

import os
import socket
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher


def is_sharded(strategy: Strategy) -> bool:
    """Whether each process holds a shard of every weight, in a form that an edit can set."""
    return isinstance(strategy, (FSDPStrategy, ModelParallelStrategy))


def check_strategy(trainer: L.Trainer) -> None:
    """Check that a model can be edited and evaluated under a Trainer's strategy.

    Raises:
        ValueError: The strategy shards the model in a way that an edit cannot set, or starts new processes for every
            evaluation.
    """
    strategy = trainer.strategy
    whole = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) and not isinstance(strategy, DeepSpeedStrategy)
    if not whole and not is_sharded(strategy):
        raise ValueError(
            f"An edit sets whole weights, or their shards under FSDP, and {type(strategy).__name__} holds neither. Use "
            f"--trainer.devices 1, --trainer.strategy ddp for more, or where one device does not hold the model "
            f"--trainer.strategy fsdp or ModelParallelStrategy."
        )
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise ValueError(
            "An edit evaluates many times in the same processes, and this strategy starts new ones each time. Use "
            "--trainer.strategy ddp, in a script or on the command line, or --trainer.devices 1."
        )


def wait_for_rank_zero(trainer: L.Trainer) -> None:
    """Wait until rank 0 has finished its work; on other ranks, until it has ended, if they can see it, for 5 s at most.

    Lightning kills the first process if another one ends with a status that is not 0 before it does.
    """
    if trainer.world_size == 1:
        return
    host, process = gather(trainer, (socket.gethostname(), os.getpid()))[0]  # waits for all
    until = time.monotonic() + 5
    while not trainer.is_global_zero and host == socket.gethostname() and time.monotonic() < until:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return
        except PermissionError:
            pass
        time.sleep(0.05)


def gather(trainer: L.Trainer, value: Any) -> list[Any]:
    """Collect a value from every process, in the order of their ranks; all must call this."""
    if trainer.world_size == 1:
        return [value]
    found: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(found, value)
    return found


def in_turn(shares: list[list[Any]]) -> list[Any]:
    """Interleave the items that processes took in turn.

    Example:
        >>> in_turn([[0, 2, 4], [1, 3]])
        [0, 1, 2, 3, 4]
    """
    count = len(shares)
    return [shares[place % count][place // count] for place in range(sum(map(len, shares)))]
