"""The device of a worker: whether torch can use it, who else does, and the precision of a run on it."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import Any

import torch

from t2idist.config import RunConfig
from t2idist.engine.strategy import Precision
from t2idist.engine.world import World
from t2idist.training.allocator import allocator_settings
from t2idist.training.stages import stored_config

logger = logging.getLogger(__name__)

_OWN_SHARE = 0.9
"""Share of the memory that a process has at least if no other process uses the device."""


def prepare(gpus: int) -> None:
    """Set torch up for a worker's GPU; raises ValueError, which says why, if it cannot use the GPU."""
    if not gpus:
        return
    os.environ.update(allocator_settings())
    if not torch.accelerator.is_available():
        raise ValueError(f"cluster.gpus_per_worker: {gpus}, but {_reason()}")


def is_usable() -> bool:
    return torch.accelerator.is_available()


def _reason() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this machine's PyTorch {torch.__version__} is built for CPUs; install the build for its GPU"
    return (
        f"PyTorch {torch.__version__} finds no GPU that it can use; it needs a driver for CUDA {torch.version.cuda} "
        "(nvidia-smi shows the driver)"
    )


def is_shared(device: torch.device) -> bool:
    """Return whether another process holds a good part of the device's memory."""
    if device.type != "cuda":
        return False
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) < _OWN_SHARE * total


def describe(device: torch.device) -> str:
    """Return the name of a device and, if it is known, its memory."""
    if device.type != "cuda":
        return str(device)
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)"


def with_precision(config: RunConfig, world: World) -> RunConfig:
    """Replace precision "auto", alike on all workers.

    At the start of a run it becomes bfloat16 if the devices of all workers have instructions for it, else float32. A
    resumed run keeps the precision of its start, whatever its devices are now.

    Raises:
        ValueError: the run is in bfloat16, and a CPU has no instructions for it: torch lacks some of its operations.
    """
    slow = "float32" in world.all_gather_object(Precision.of("auto", world.device).name)
    precision: Any = config.precision
    if precision == "auto":
        stored = stored_config(config) if world.is_main else None
        precision = world.broadcast_object(stored and stored.get("precision"))
    if precision is None:
        precision = "float32" if slow else "bfloat16"
        if slow and world.is_main:
            logger.info("precision: float32, because a device of this run has no instructions for bfloat16")
    elif precision == "bfloat16" and slow and world.device.type == "cpu":
        remedy = "give precision=auto or float32"
        if config.precision == "auto":
            remedy = "the run was started with it: continue on other machines, or give name=ANOTHER for a new run"
        raise ValueError(f"precision: bfloat16, but a CPU of this run has no instructions for it; {remedy}")
    return replace(config, precision=precision)
