"""Real worker processes for tests: spawned once, with gloo, and reused for worlds of any size."""

from __future__ import annotations

import itertools
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from t2idist.engine.world import World

MAX_WORKERS = 4


class Workers:
    """`MAX_WORKERS` processes that run functions of a `World`."""

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._calls = [context.Queue() for _ in range(MAX_WORKERS)]
        self._results = context.Queue()
        self._call_ids = itertools.count()
        self._processes = [
            context.Process(
                target=_serve, args=(rank, self._folder.name, self._calls[rank], self._results), daemon=True
            )
            for rank in range(MAX_WORKERS)
        ]
        for process in self._processes:
            process.start()

    def run(self, size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """Return ``[fn(world, *args) for each of `size` workers]``. A failure of one is an AssertionError."""
        call_id = next(self._call_ids)
        for rank in range(size):
            self._calls[rank].put((call_id, size, fn, args))
        results: dict[int, Any] = {}
        while len(results) < size:
            result_id, rank, result, failure = self._results.get(timeout=240)
            if result_id != call_id:
                continue
            if failure is not None:
                raise AssertionError(f"worker {rank} of {size}:\n{failure}")
            results[rank] = result
        return [results[rank] for rank in range(size)]

    def close(self) -> None:
        for calls in self._calls:
            calls.put(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()


def _serve(rank: int, folder: str, calls: Any, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=MAX_WORKERS)
    sizes = range(2, MAX_WORKERS + 1)
    groups, side_groups = ({size: dist.new_group(list(range(size))) for size in sizes} for _ in range(2))
    while (call := calls.get()) is not None:
        call_id, size, fn, args = call
        world = World(rank, size, torch.device("cpu"), groups.get(size), side_groups.get(size))
        try:
            results.put((call_id, rank, fn(world, *args), None))
        except BaseException:
            results.put((call_id, rank, None, traceback.format_exc()))
