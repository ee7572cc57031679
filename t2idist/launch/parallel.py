"""Many independent pieces of work on this process, on several of this machine, or on a Ray cluster."""

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
    """Do `work` on every task; gives the results as they come, in no order.

    workers: 0: here, one after the other. address: of a Ray cluster ("auto": the one that this process belongs to).
    gpus: of a worker.
    """
    if not workers:
        yield from map(work, tasks)
        return
    import ray  # not for the one process alone

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
            rest = iter(tasks)
            waiting = [remote.remote(task) for task in islice(rest, 2 * workers)]
            while waiting:
                done, waiting = ray.wait(waiting)
                waiting += [remote.remote(task) for task in islice(rest, len(done))]
                yield from ray.get(done)
        finally:
            ray.shutdown()
