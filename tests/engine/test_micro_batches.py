"""Steps in micro-batches (engine/micro_batches.py) are those of all groups at once."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from t2idist.engine.trainer import Trainer
from t2idist.engine.world import World
from t2idist.nn.fast.torch_internals import TorchDispatchMode, tree_leaves
from tests.helpers import small_systems
from tests.helpers.hardware import needs_bfloat16
from tests.helpers.worker_processes import Workers
from tests.systems.test_systems import full_state, labels, relative_distances

SINGLE = World()
Result = tuple[dict[str, Tensor], dict[str, float]]


def train(world: World, system: str, precision: str, micro_batch_groups: int | None, zero: int = 0) -> Result:
    trainer = small_systems.trainer(world, system, precision, micro_batch_groups=micro_batch_groups, zero=zero)
    small_systems.run_steps(trainer, 7)
    return full_state(trainer), trainer.reduce_reports()


def check_equal(ours: Result, reference: Result, tolerance: float) -> None:
    distances = relative_distances(ours[0], reference[0])
    assert max(distances.values(), default=0.0) < tolerance, max(distances.items(), key=lambda each: each[1])
    single = max(tolerance, 1e-6)  # accuracies are float32
    assert ours[1] == pytest.approx(reference[1], rel=single, abs=single)


@pytest.mark.parametrize("system", labels(pytest.mark.whole))
def test_parts_give_the_state_and_the_reports_of_all_groups_at_once(system: str) -> None:
    at_once = train(SINGLE, system, "float64", None)
    for groups in (1, 3):  # 3: parts of 3 groups and of 1
        check_equal(train(SINGLE, system, "float64", groups), at_once, 1e-9)


def test_parts_in_float32() -> None:
    check_equal(train(SINGLE, "attngan", "float32", 1), train(SINGLE, "attngan", "float32", None), 1e-4)


@needs_bfloat16
def test_parts_in_bfloat16() -> None:
    at_once, in_parts = (train(SINGLE, "attngan", "bfloat16", groups)[0] for groups in (None, 1))

    def weights(state: dict[str, Tensor]) -> Tensor:
        return torch.cat([value.flatten() for name, value in state.items() if "/net/" in name and value.dim() > 1])

    assert (weights(in_parts) - weights(at_once)).norm() < 0.01 * weights(at_once).norm()


@pytest.mark.parametrize("size", [2, 3])  # 3: one worker has two groups, all others one
def test_parts_on_several_workers(workers: Workers, size: int) -> None:
    at_once = train(SINGLE, "attngan", "float64", None)
    for ours in workers.run(size, train, "attngan", "float64", 1):
        check_equal(ours, at_once, 1e-9)


@pytest.mark.parametrize("zero", [1, 2])
def test_parts_under_zero(workers: Workers, zero: int) -> None:
    at_once = workers.run(3, train, "attngan", "float32", None)[0]
    for ours in workers.run(3, train, "attngan", "float32", 1, zero):
        check_equal(ours, at_once, 1e-4)


class PeakBytes(TorchDispatchMode):
    """Measures the largest size of all tensors that exist at one time and were made in the context."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak_bytes_of_a_step(make_trainer: Callable[[], Trainer]) -> int:
    trainer = make_trainer()
    small_systems.run_steps(trainer, 2)
    with PeakBytes() as measured:
        small_systems.run_steps(trainer, 1)
    return measured.peak


def test_a_step_leaves_nothing_to_the_garbage_collector() -> None:
    trainer = small_systems.trainer(SINGLE, "attngan", "float32", micro_batch_groups=1)
    small_systems.run_steps(trainer, 3)
    gc.collect()
    gc.disable()
    try:
        with PeakBytes() as measured:
            small_systems.run_steps(trainer, 2)
            after_two = measured.now
            small_systems.run_steps(trainer, 2)
        assert measured.now < after_two + 1000, "reports only"
    finally:
        gc.enable()


@pytest.mark.parametrize("system", ["attngan", "stackgan"])
def test_more_groups_take_no_more_memory(system: str) -> None:
    def peak(groups: int, micro_batch_groups: int | None) -> int:
        return peak_bytes_of_a_step(
            lambda: small_systems.trainer(SINGLE, system, "float32", groups, micro_batch_groups)
        )

    one, at_once, in_parts = peak(1, None), peak(8, None), peak(8, 1)
    assert in_parts < one + 0.25 * (at_once - one)
