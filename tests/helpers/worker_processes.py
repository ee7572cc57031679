"""Real worker processes for tests: spawned once, gloo between them, any number of them as a world."""

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

MOST = 4


class Workers:
    """`MOST` processes; ``run(n, fn, *args)`` gives ``[fn(world, *args) for each of n workers]``."""

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._calls = [context.Queue() for _ in range(MOST)]
        self._answers = context.Queue()
        self._numbers = itertools.count()
        self._processes = [
            context.Process(
                target=_serve, args=(rank, self._folder.name, self._calls[rank], self._answers), daemon=True
            )
            for rank in range(MOST)
        ]
        for process in self._processes:
            process.start()

    def run(self, size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
        number = next(self._numbers)
        for rank in range(size):
            self._calls[rank].put((number, size, fn, args))
        answers: dict[int, Any] = {}
        while len(answers) < size:
            answered, rank, value, fault = self._answers.get(timeout=240)
            if answered != number:
                continue
            if fault is not None:
                raise AssertionError(f"worker {rank} of {size}:\n{fault}")
            answers[rank] = value
        return [answers[rank] for rank in range(size)]

    def close(self) -> None:
        for calls in self._calls:
            calls.put(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()


def _serve(rank: int, folder: str, calls: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=MOST)
    groups, aside = ({size: dist.new_group(list(range(size))) for size in range(2, MOST + 1)} for _ in range(2))
    while (call := calls.get()) is not None:
        number, size, fn, args = call
        world = World(rank, size, torch.device("cpu"), groups.get(size), aside.get(size))
        try:
            answers.put((number, rank, fn(world, *args), None))
        except BaseException:
            answers.put((number, rank, None, traceback.format_exc()))
