"""Where numbers are held in full precision although the engine's autocast holds matrix products in bfloat16."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """`x` in at least float32: half precision is widened, float32 and float64 stay as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context, on the device of `x`, in which matrix products keep the precision of their inputs."""
    if x.is_meta:  # nothing is computed there
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
