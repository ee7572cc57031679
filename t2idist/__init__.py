"""Distributed training of text-to-image GANs: Ray Train workers, webdataset shards, elastic restarts."""

import os

# Large tensors in huge pages: torch reads this at its first allocation. On a virtual machine whose fresh memory is dear
# a float32 step takes a tenth less, and the first copy of a checkpoint half the time (tools/bench/bench_checkpoint.py).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"
