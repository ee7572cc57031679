"""Full precision inside the engine's bfloat16 autocast."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """Convert half precision to float32; float32 and float64 are returned as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Disable autocast on the device of `x`, so that matrix products keep the precision of their inputs."""
    if x.is_meta:
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
