"""Allocators of memory: the C library keeps what PyTorch frees on CPUs, and settings of PyTorch's own.

Does not import torch, which reads the settings.
"""

from __future__ import annotations

import ctypes
import os

_ALLOCATOR = "PYTORCH_ALLOC_CONF"
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory in this process instead of returning it to the system. Does nothing without glibc.

    Large tensors are otherwise unmapped when freed, and the next ones get new, zeroed pages: up to a third of a
    training step on CPUs.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def allocator_settings() -> dict[str, str]:
    """Return the environment variable that sets torch's allocators; a value that the user set stays.

    Device memory is not in fixed blocks: a run that loses workers needs larger ones. Page-locked memory above 64 MiB is
    not rounded up to a power of two: the copies of the state would take up to twice their size.
    """
    return {_ALLOCATOR: os.environ.get(_ALLOCATOR, "expandable_segments:True,pinned_max_round_threshold_mb:64")}
