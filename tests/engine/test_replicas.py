"""Copies in the memory of other processes: whole ones only, bitwise, at any number of workers, and in a real run."""

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
from tests.engine.test_trainer import ALONE, GROUP_SIZE, GROUPS, apart, saved, snapshot, step, trainer
from tests.helpers.worker_processes import Workers

EVERY = CheckpointConfig(memory_every_steps=1)


class FolderKeepers:
    """`Keepers` for processes that share a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, key: str, held: ReplicaInfo, data: memoryview) -> None:
        name = f"{key.replace('/', '_')}-{held.rank}-{held.step:04d}-{held.attempt}"
        (self._folder / name).write_bytes(pickle.dumps((held, bytes(data))))

    def list_replicas(self, key: str) -> list[ReplicaInfo]:
        return [pickle.loads(file.read_bytes())[0] for file in self._files(key)]

    def get(self, key: str, held: ReplicaInfo) -> bytes:
        for file in self._files(key):
            found, data = pickle.loads(file.read_bytes())
            if (found.rank, found.step, found.attempt) == (held.rank, held.step, held.attempt):
                return bytes(data)
        raise OSError("gone")

    def forget(self, prefix: str) -> None:
        for file in self._files(prefix):
            file.unlink()

    def _files(self, key: str) -> Iterator[Path]:
        return self._folder.glob(f"{key.replace('/', '_')}-*")


def train_and_keep(world: World, folder: Path, steps: int) -> dict[str, Tensor]:
    made = trainer(world)
    memory = ReplicaManager(FolderKeepers(folder), "gan/0", world, EVERY, "a")
    for _ in range(steps):
        step(made, 1)
        memory.copy(made, {"rank": world.rank})
    memory.close(forget=False)
    return snapshot(made)


def restored(
    world: World, folder: Path, newer_than: int = -1
) -> tuple[CommittedCheckpoint | None, list[Any], dict[str, Tensor]]:
    made = trainer(world)
    memory = ReplicaManager(FolderKeepers(folder), "gan/0", world, EVERY, "b")
    found = memory.restore(made, newer_than)
    return found, memory.notes, snapshot(made)


@pytest.mark.parametrize(("kept_by", "taken_by"), [(1, 1), (1, 3), (3, 3), (3, 2)])
def test_a_copy_is_the_state(workers: Workers, tmp_path: Path, kept_by: int, taken_by: int) -> None:
    whole = workers.run(kept_by, train_and_keep, tmp_path, 3)[0]
    for found, notes, state in workers.run(taken_by, restored, tmp_path):
        assert found is not None and found.images == 3 * GROUPS * GROUP_SIZE
        assert notes == [{"rank": rank} for rank in range(kept_by)]
        if taken_by == kept_by:
            assert all(torch.equal(state[name], whole[name]) for name in whole)
        assert apart(state, whole) < 1e-12


def test_only_a_whole_copy_counts(workers: Workers, tmp_path: Path) -> None:
    workers.run(2, train_and_keep, tmp_path, 3)
    (lost,) = tmp_path.glob("gan_0-1-0003-a")
    lost.unlink()
    for found, _, state in workers.run(2, restored, tmp_path):
        assert found is not None and found.images == 2 * GROUPS * GROUP_SIZE
        made = trainer(ALONE)
        step(made, 2)
        assert apart(state, snapshot(made)) < 1e-11
    for file in tmp_path.glob("gan_0-0-*"):
        file.unlink()
    assert [found for found, _, _ in workers.run(2, restored, tmp_path)] == [None, None]


def test_a_newer_checkpoint_in_storage_comes_first(tmp_path: Path) -> None:
    train_and_keep(ALONE, tmp_path, 2)
    made = trainer(ALONE)
    step(made, 3)
    checkpoints = CheckpointManager(str(tmp_path / "checkpoints"), ALONE, CheckpointConfig(), {})
    assert checkpoints.newest_images() == -1
    saved(checkpoints, made)
    assert checkpoints.newest_images() == made.images
    assert restored(ALONE, tmp_path, checkpoints.newest_images())[0] is None
    assert restored(ALONE, tmp_path, made.images - 1 - GROUPS * GROUP_SIZE)[0] is not None


def test_a_part_that_is_gone_or_damaged_is_no_copy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train_and_keep(ALONE, tmp_path, 1)
    (file,) = tmp_path.iterdir()
    held, data = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps((held, data[: len(data) // 2])))
    assert restored(ALONE, tmp_path)[0] is None
    assert "not used" in caplog.text


def test_copies_keep_to_a_hundredth_of_the_time(tmp_path: Path) -> None:
    class Slow(FolderKeepers):
        def put(self, key: str, held: ReplicaInfo, data: memoryview) -> None:
            time.sleep(0.02)

    made = trainer(ALONE)
    memory = ReplicaManager(Slow(tmp_path), "gan/0", ALONE, CheckpointConfig(), "a")
    for _ in range(5):
        step(made, 1)
        memory.copy(made, None)
    memory.report(0.05)
    assert 40 <= memory.every_steps < 1000  # a copy takes 0.02 s and more, a step 0.05 s
    assert [memory.due(number) for number in (0, 1, memory.every_steps)] == [True, False, True]


def test_keepers_that_fail_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Gone(FolderKeepers):
        def put(self, key: str, held: ReplicaInfo, data: memoryview) -> None:
            raise OSError("no keeper answers")

    made = trainer(ALONE)
    memory = ReplicaManager(Gone(tmp_path), "gan/0", ALONE, EVERY, "a")
    for _ in range(3):
        step(made, 1)
        memory.copy(made, None)
        memory.close(forget=False)
        memory.report(0.1)
    assert caplog.text.count("no keeper answers") == 1
