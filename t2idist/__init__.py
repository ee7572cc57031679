"""Distributed training of text-to-image GANs: Ray Train workers, webdataset shards, elastic restarts.

In Python, `load` opens an export to draw with; training is started by the command ``t2idist train``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from t2idist.sampling.model import Images as Images
    from t2idist.sampling.model import Model as Model
    from t2idist.sampling.model import load as load

# Large tensors in huge pages: torch reads this at its first allocation. On a virtual machine whose fresh memory is dear
# a float32 step takes a tenth less, and the first copy of a checkpoint half the time (tools/bench/bench_checkpoint.py).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"

_API = ("Images", "Model", "load")


if not TYPE_CHECKING:  # so that type checkers know which names there are

    def __getattr__(name: str) -> object:
        """Import the Python API when it is first used: torch takes seconds."""
        if name not in _API:
            raise AttributeError(f"module 't2idist' has no attribute '{name}'")
        from t2idist.sampling import model

        return getattr(model, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *_API})
