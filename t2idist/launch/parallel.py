"""Map a function over independent tasks in this process, in several processes, or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
        gpus: GPUs per worker; workers that are started here share GPUs if there are fewer.

    Raises:
        ConnectionError: the cluster could not be joined.
        ValueError: workers need GPUs, and there is none here.
        RuntimeError: a worker died again and again.
        Exception: the first error of a task.
    """
    if not workers:
        yield from map(work, tasks)
        return
    import ray  # not needed in one process

    from t2idist.launch import connection

    with connection.join_workers(address) if address else connection.start_workers(workers, gpus) as share:
        remote = ray.remote(num_cpus=1, num_gpus=gpus if share is None else share, max_retries=3)(work)
        remaining = iter(tasks)
        pending = [remote.remote(task) for task in islice(remaining, 2 * workers)]
        while pending:
            done, pending = ray.wait(pending)
            pending += [remote.remote(task) for task in islice(remaining, len(done))]
            yield from _results(done)


def _results(done: Sequence[Any]) -> list[Any]:
    """Return the results of tasks; raises the error of a task as if it had been raised here."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return list(ray.get(done))
    except RayTaskError as error:
        raise (error.cause or error) from error  # the worker's traceback stays with errors of the program
    except RayError as error:
        raise RuntimeError(f"a worker failed: {' '.join(str(error).split())}") from error
