"""Settings of torch's allocators on GPUs. Does not import torch, which reads them."""

from __future__ import annotations

import os

_VARIABLE = "PYTORCH_ALLOC_CONF"


def allocator_settings() -> dict[str, str]:
    """Return the environment variable that sets torch's allocators; a value that the user set stays.

    Device memory is not in fixed blocks: a run that loses workers needs larger ones. Page-locked memory above 64 MiB is
    not rounded up to a power of two: the copies of the state would take up to twice their size.
    """
    return {_VARIABLE: os.environ.get(_VARIABLE, "expandable_segments:True,pinned_max_round_threshold_mb:64")}
