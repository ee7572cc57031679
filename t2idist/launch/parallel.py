"""Map a function over independent tasks in this process, in several processes, or on a Ray cluster."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

T = TypeVar("T")


def map_unordered(
    work: Callable[[T], Any], tasks: Iterable[T], workers: int, address: str = "", *, gpus: int = 0
) -> Iterator[Any]:
    """Call `work` on every task; yields the results as they complete, in no particular order.

    Args:
        workers: number of Ray workers; 0 calls `work` in this process, one task after the other.
        address: a Ray cluster's address ("auto": the cluster that this process belongs to); "" starts Ray here.
        gpus: GPUs per worker.
    """
    if not workers:
        yield from map(work, tasks)
        return
    import ray  # not needed in one process

    with tempfile.TemporaryDirectory(prefix="t2idist-ray-") as folder:
        if address:
            ray.init(address=address, logging_level=logging.WARNING)
        else:
            ray.init(
                address="local",
                num_cpus=workers,
                num_gpus=gpus * workers,
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                _temp_dir=folder,
            )
        try:
            remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(work)
            remaining = iter(tasks)
            pending = [remote.remote(task) for task in islice(remaining, 2 * workers)]
            while pending:
                done, pending = ray.wait(pending)
                pending += [remote.remote(task) for task in islice(remaining, len(done))]
                yield from ray.get(done)
        finally:
            ray.shutdown()
