"""Replicas: complete sets only, bitwise equal to the state, at any number of workers."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from t2idist.config import CheckpointConfig
from t2idist.engine.checkpoint.manager import CheckpointManager, CommittedCheckpoint
from t2idist.engine.checkpoint.replica_protocol import ReplicaInfo
from t2idist.engine.checkpoint.replicas import ReplicaManager
from t2idist.engine.world import World
from tests.engine.test_trainer import (
    GROUP_SIZE,
    GROUPS,
    SINGLE_WORKER,
    largest_difference,
    make_trainer,
    save_and_wait,
    snapshot,
    train_steps,
)
from tests.helpers.worker_processes import Workers

EVERY_STEP = CheckpointConfig(memory_every_steps=1)


class FolderReplicaStore:
    """A `ReplicaStore` in a folder that the processes share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, key: str, info: ReplicaInfo, data: memoryview) -> None:
        name = f"{key.replace('/', '_')}-{info.rank}-{info.step:04d}-{info.attempt}"
        (self._folder / name).write_bytes(pickle.dumps((info, bytes(data))))

    def list_replicas(self, key: str) -> list[ReplicaInfo]:
        return [pickle.loads(file.read_bytes())[0] for file in self._files(key)]

    def get(self, key: str, info: ReplicaInfo) -> bytes:
        for file in self._files(key):
            stored, data = pickle.loads(file.read_bytes())
            if (stored.rank, stored.step, stored.attempt) == (info.rank, info.step, info.attempt):
                return bytes(data)
        raise OSError("not stored")

    def forget(self, prefix: str) -> None:
        for file in self._files(prefix):
            file.unlink()

    def _files(self, key: str) -> Iterator[Path]:
        return self._folder.glob(f"{key.replace('/', '_')}-*")


def train_and_copy(world: World, folder: Path, steps: int) -> dict[str, Tensor]:
    trainer = make_trainer(world)
    replicas = ReplicaManager(FolderReplicaStore(folder), "gan/0", world, EVERY_STEP, "a")
    for _ in range(steps):
        train_steps(trainer, 1)
        replicas.copy(trainer, {"rank": world.rank})
    replicas.close(forget=False)
    return snapshot(trainer)


def restore(
    world: World, folder: Path, newer_than: int = -1
) -> tuple[CommittedCheckpoint | None, list[Any], dict[str, Tensor]]:
    trainer = make_trainer(world)
    replicas = ReplicaManager(FolderReplicaStore(folder), "gan/0", world, EVERY_STEP, "b")
    checkpoint = replicas.restore(trainer, newer_than)
    return checkpoint, replicas.notes, snapshot(trainer)


@pytest.mark.parametrize(("copied_by", "restored_by"), [(1, 1), (1, 3), (3, 3), (3, 2)])
def test_restored_replicas_equal_the_state(workers: Workers, tmp_path: Path, copied_by: int, restored_by: int) -> None:
    expected = workers.run(copied_by, train_and_copy, tmp_path, 3)[0]
    for checkpoint, notes, state in workers.run(restored_by, restore, tmp_path):
        assert checkpoint is not None and checkpoint.images == 3 * GROUPS * GROUP_SIZE
        assert notes == [{"rank": rank} for rank in range(copied_by)]
        if restored_by == copied_by:
            assert all(torch.equal(state[name], expected[name]) for name in expected)
        assert largest_difference(state, expected) < 1e-12


def test_incomplete_replicas_are_not_restored(workers: Workers, tmp_path: Path) -> None:
    workers.run(2, train_and_copy, tmp_path, 3)
    (newest,) = tmp_path.glob("gan_0-1-0003-a")
    newest.unlink()
    for checkpoint, _, state in workers.run(2, restore, tmp_path):
        assert checkpoint is not None and checkpoint.images == 2 * GROUPS * GROUP_SIZE
        trainer = make_trainer(SINGLE_WORKER)
        train_steps(trainer, 2)
        assert largest_difference(state, snapshot(trainer)) < 1e-11
    for file in tmp_path.glob("gan_0-0-*"):
        file.unlink()
    assert [checkpoint for checkpoint, _, _ in workers.run(2, restore, tmp_path)] == [None, None]


def test_replicas_older_than_the_checkpoint_are_not_restored(tmp_path: Path) -> None:
    train_and_copy(SINGLE_WORKER, tmp_path, 2)
    trainer = make_trainer(SINGLE_WORKER)
    train_steps(trainer, 3)
    checkpoints = CheckpointManager(str(tmp_path / "checkpoints"), SINGLE_WORKER, CheckpointConfig(), {})
    assert checkpoints.newest_images() == -1
    save_and_wait(checkpoints, trainer)
    assert checkpoints.newest_images() == trainer.images
    assert restore(SINGLE_WORKER, tmp_path, checkpoints.newest_images())[0] is None
    assert restore(SINGLE_WORKER, tmp_path, trainer.images - 1 - GROUPS * GROUP_SIZE)[0] is not None


def test_damaged_replica_is_not_restored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train_and_copy(SINGLE_WORKER, tmp_path, 1)
    (file,) = tmp_path.iterdir()
    info, data = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps((info, data[: len(data) // 2])))
    assert restore(SINGLE_WORKER, tmp_path)[0] is None
    assert "not used" in caplog.text


def restore_where_the_last_worker_reads_nothing(world: World, folder: Path) -> CommittedCheckpoint | None:
    class Store(FolderReplicaStore):
        def get(self, key: str, info: ReplicaInfo) -> bytes:
            if world.rank == world.size - 1:
                raise OSError("not stored")
            return super().get(key, info)

    return ReplicaManager(Store(folder), "gan/0", world, EVERY_STEP, "b").restore(make_trainer(world), -1)


def test_replicas_that_one_worker_cannot_read_are_restored_by_none(workers: Workers, tmp_path: Path) -> None:
    workers.run(2, train_and_copy, tmp_path, 1)
    assert workers.run(2, restore_where_the_last_worker_reads_nothing, tmp_path) == [None, None]


def copied_steps(world: World, folder: Path, put_seconds: float, steps: int, step_seconds: float) -> list[int]:
    """Return the steps that are copied in a run of `steps` short steps, in which the store is slow."""

    class SlowStore(FolderReplicaStore):
        def put(self, key: str, info: ReplicaInfo, data: memoryview) -> None:
            time.sleep(put_seconds)

    trainer = make_trainer(world)
    replicas = ReplicaManager(SlowStore(folder), "gan/0", world, CheckpointConfig(), "a")
    copied = []
    for step in range(1, steps + 1):
        time.sleep(step_seconds)
        if replicas.due(step):
            trainer.step = step
            replicas.copy(trainer, None)
            copied.append(step)
    replicas.close(forget=False)
    return copied


def test_copies_take_at_most_one_percent_of_the_time_from_the_first_one_on(tmp_path: Path, workers: Workers) -> None:
    assert copied_steps(SINGLE_WORKER, tmp_path, 0.2, 200, 0.001) == [1]  # the next one is due after 20 s
    one, two = workers.run(2, copied_steps, tmp_path, 0.02, 60, 0.1)
    assert one == two
    assert len(one) in (2, 3) and one[0] == 1 and one[1] > 15  # a copy costs at least 0.02 s, so 2 s lie between two


def test_unreachable_store_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class UnreachableStore(FolderReplicaStore):
        def put(self, key: str, info: ReplicaInfo, data: memoryview) -> None:
            raise OSError("no node responds")

    trainer = make_trainer(SINGLE_WORKER)
    replicas = ReplicaManager(UnreachableStore(tmp_path), "gan/0", SINGLE_WORKER, EVERY_STEP, "a")
    for _ in range(3):
        train_steps(trainer, 1)
        replicas.copy(trainer, None)
        replicas.close(forget=False)
        replicas.report()
    assert caplog.text.count("no node responds") == 1
