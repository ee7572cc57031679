"""Preemption notices: the state is saved in time, and the run resumes from it."""

from __future__ import annotations

import math
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from t2idist.config import CheckpointConfig, GuardConfig, StageConfig
from t2idist.contract import Batch
from t2idist.engine import cadence, hooks, loop, preemption
from t2idist.engine.batches import TrackedBatches, read_ledger
from t2idist.engine.checkpoint import export
from t2idist.engine.checkpoint.format import list_folders
from t2idist.engine.checkpoint.manager import CheckpointManager
from t2idist.engine.checkpoint.replicas import ReplicaManager
from t2idist.engine.metrics import MetricLogger, read_metrics
from t2idist.engine.preemption import PreemptionHandler, PreemptionNotice, StopRequested
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import Share, World
from tests.engine.test_cadence import Clock
from tests.engine.test_replicas import FolderReplicaStore
from tests.engine.test_trainer import (
    GROUP_SIZE,
    GROUPS,
    SINGLE_WORKER,
    largest_difference,
    make_trainer,
    snapshot,
    train_steps,
)
from tests.helpers import toy_gan
from tests.helpers.runs import (
    ROOT,
    command_environment,
    command_line,
    export_bytes,
    images_in_progress,
    run_command,
    write_recipe,
)
from tests.helpers.worker_processes import Workers

IMAGES = GROUPS * GROUP_SIZE


def fail() -> None:
    raise AssertionError("not to be called")


@dataclass(frozen=True)
class FakeSaver:
    """A `StateSaver` of functions; one that is not given must not be called."""

    save: Callable[[], None] = fail
    finish: Callable[[], None] = fail
    replicate_or_save: Callable[[], None] = fail


def saved_steps(world: World, folder: Path, polled: list[PreemptionNotice | None]) -> list[int]:
    """Return the steps with a checkpoint after a run in which the polls return these values, one per step."""
    results = iter(polled)
    trainer = make_trainer(world)
    checkpoints = CheckpointManager(str(folder), world, CheckpointConfig(keep=100), {})
    handler = PreemptionHandler(lambda: next(results), 0.0, world)
    try:
        for _ in range(len(polled)):
            train_steps(trainer, 1)
            handler.check(trainer, FakeSaver(lambda: checkpoints.save(trainer), checkpoints.finish))
    finally:
        checkpoints.finish()
    return sorted(int(name[:12]) // IMAGES for name in list_folders(str(folder)))


def test_first_notice_saves_and_training_continues(tmp_path: Path) -> None:
    soon, unknown = PreemptionNotice(100.0), PreemptionNotice(math.inf)
    assert saved_steps(SINGLE_WORKER, tmp_path, [None, soon, soon, unknown, None, soon, None]) == [2, 6]


def test_workers_save_and_wait_shortly_before_the_shutdown(
    workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(preemption.time, "sleep", waited.append)
    assert saved_steps(
        SINGLE_WORKER, tmp_path / "shutdown", [PreemptionNotice(100.0), PreemptionNotice(50.0), PreemptionNotice(3.0)]
    ) == [1, 3]
    assert 60 <= waited[-1] <= 63
    withdrawn = [PreemptionNotice(3.0), PreemptionNotice(0.1), PreemptionNotice(0.1), None, PreemptionNotice(2.0)]
    assert saved_steps(SINGLE_WORKER, tmp_path / "withdrawn", withdrawn) == [1, 5] and len(waited) == 3
    for saved in workers.run(2, saved_steps, tmp_path / "two", [None, PreemptionNotice(100.0), None]):
        assert saved == [2]


def test_stop_request_saves_and_raises(tmp_path: Path) -> None:
    with pytest.raises(StopRequested, match=f"saved at {2 * IMAGES} images"):
        saved_steps(SINGLE_WORKER, tmp_path, [None, PreemptionNotice(0.0), None])
    assert [int(name[:12]) for name in list_folders(str(tmp_path))] == [2 * IMAGES]


class ToySource:
    """A `BatchSource` of random batches."""

    samples_read, bad_reads, wait_seconds = 0, 0, 0.0

    def __init__(self) -> None:
        self.quarantine: dict[str, str] = {}
        self._batches = toy_gan.batches(range(GROUPS), GROUP_SIZE, (8,), 5)

    def __next__(self) -> Batch:
        return next(self._batches)

    def close(self) -> None:
        pass


def test_ledger_is_written_before_the_save_of_a_notice(tmp_path: Path) -> None:
    trainer, url = make_trainer(SINGLE_WORKER), str(tmp_path)
    handler = PreemptionHandler(lambda: PreemptionNotice(0.0) if trainer.step == 4 else None, 0.0, SINGLE_WORKER)
    with pytest.raises(StopRequested):
        run_loop(trainer, url, handler, None)
    assert list(read_ledger(url)) == [(step, group) for step in range(4) for group in range(GROUPS)]


def run_loop(
    trainer: Trainer,
    url: str,
    handler: PreemptionHandler,
    replicas: ReplicaManager | None,
    log: MetricLogger | None = None,
) -> None:
    stage = StageConfig("toy", GROUP_SIZE, GROUPS, images=300 * 10 * IMAGES)  # metrics and ledger every 10 steps
    checkpoints = CheckpointManager(url, SINGLE_WORKER, CheckpointConfig(), {})
    share = Share.of(SINGLE_WORKER, GROUPS)
    batches = TrackedBatches(
        ToySource(), SINGLE_WORKER, share, url, step=0, attempt="a", max_bad=1.0, epoch_images=99, ledger=True
    )
    state = hooks.StageState(trainer, batches, checkpoints, replicas, log)
    stage_hooks = hooks.stage_hooks(state, stage, GuardConfig(), handler, lambda nets, images_seen, **due: {}, 0.0, 0)
    loop.run(trainer, batches, stage, stage.steps, lambda: stage_hooks)


def test_loop_logs_losses_counters_and_times(tmp_path: Path) -> None:
    trainer, url = make_trainer(SINGLE_WORKER), str(tmp_path)
    metadata = {"restarts": 0}
    log = MetricLogger(url, "toy", images=0, step=0, budget_images=10 * IMAGES, metadata=metadata, on_progress=None)
    replicas = ReplicaManager(FolderReplicaStore(tmp_path), "toy/0", SINGLE_WORKER, CheckpointConfig(), "a")
    handler = PreemptionHandler(lambda: PreemptionNotice(0.0) if trainer.step == 10 else None, 0.0, SINGLE_WORKER)
    with pytest.raises(StopRequested):
        run_loop(trainer, url, handler, replicas, log)
    (line,) = read_metrics(f"{url}/toy")
    assert (line["step"], line["images"], line["restarts"]) == (10, 10 * IMAGES, 0)
    assert list(line)[6:] == [
        "norm/discriminator", "discriminator/loss", "generator/loss", "norm/generator",
        "data/wait_share", "data/bad_samples", "data/quarantined", "guard/skipped_steps",
        "time/step", "time/data", "time/pictures", "time/checkpoint", "checkpoint/memory_every_steps",
    ]  # fmt: skip


class WorkerReplaced(Exception):
    """Raised where Ray would end the worker."""


def raise_replaced(seconds: float) -> None:
    raise WorkerReplaced


@pytest.mark.parametrize("saved_to", ["replicas", "storage", "storage, as the store is unreachable"])
def test_resize_copies_or_saves_the_state_and_pauses(tmp_path: Path, saved_to: str) -> None:
    (tmp_path / "store").mkdir()
    trainer = make_trainer(SINGLE_WORKER)
    store = FolderReplicaStore(tmp_path / ("missing" if "unreachable" in saved_to else "store"))
    replicas = None
    if saved_to != "storage":
        replicas = ReplicaManager(store, "toy/0", SINGLE_WORKER, CheckpointConfig(memory_every_steps=3), "a")
    handler = PreemptionHandler(
        lambda: PreemptionNotice(math.inf, resize=True) if trainer.step == 4 else None,
        0.0,
        SINGLE_WORKER,
        raise_replaced,
    )
    with pytest.raises(WorkerReplaced):
        run_loop(trainer, str(tmp_path), handler, replicas)
    restored = make_trainer(SINGLE_WORKER)
    checkpoints = CheckpointManager(str(tmp_path), SINGLE_WORKER, CheckpointConfig(), {})
    if saved_to == "replicas":
        assert checkpoints.newest_images() <= 0
        replicas = ReplicaManager(store, "toy/0", SINGLE_WORKER, CheckpointConfig(), "b")
        assert replicas.restore(restored, -1) is not None and len(replicas.notes[0]["ledger"]) == 4 * GROUPS
    else:
        assert checkpoints.restore(restored) is not None
    assert restored.step == 4 and largest_difference(snapshot(restored), snapshot(trainer)) == 0


def test_training_continues_if_a_resize_is_called_off() -> None:
    trainer, calls = make_trainer(SINGLE_WORKER), []
    results = iter([PreemptionNotice(math.inf, resize=True), None, PreemptionNotice(math.inf, resize=True)])
    handler = PreemptionHandler(
        lambda: next(results), 0.0, SINGLE_WORKER, lambda seconds: calls.append(("paused", trainer.step))
    )
    for _ in range(3):
        train_steps(trainer, 1)
        handler.check(trainer, FakeSaver(replicate_or_save=lambda: calls.append(("copied", trainer.step))))
    assert calls == [("copied", 1), ("paused", 1), ("copied", 3), ("paused", 3)]


def test_run_stops_when_it_is_asked_to_after_it_has_waited_for_a_shutdown() -> None:
    notices, saves = iter([PreemptionNotice(3.0), PreemptionNotice(0.0)]), []
    handler = PreemptionHandler(lambda: next(notices), 0.0, SINGLE_WORKER, lambda seconds: None)
    trainer, saver = make_trainer(SINGLE_WORKER), FakeSaver(lambda: saves.append("saved"), lambda: None)
    train_steps(trainer, 1)
    handler.check(trainer, saver)
    train_steps(trainer, 1)
    with pytest.raises(StopRequested):
        handler.check(trainer, saver)
    assert saves == ["saved", "saved"]


def test_worker_that_waits_for_the_shutdown_of_a_node_serves_the_next_group_once_its_own_ends() -> None:
    handler = PreemptionHandler(lambda: PreemptionNotice(3.0), 0.0, SINGLE_WORKER, raise_replaced)
    with pytest.raises(WorkerReplaced):
        handler.check(make_trainer(SINGLE_WORKER), FakeSaver(lambda: None, lambda: None))


def test_slow_steps_wait_at_the_last_poll_before_the_shutdown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    clock = Clock()
    monkeypatch.setattr(cadence, "time", clock)
    monkeypatch.setattr(preemption.time, "sleep", waited.append)
    trainer = make_trainer(SINGLE_WORKER)
    checkpoints = CheckpointManager(str(tmp_path), SINGLE_WORKER, CheckpointConfig(), {})
    handler = PreemptionHandler(lambda: PreemptionNotice(30.0), 2.0, SINGLE_WORKER)
    handler.check(trainer, FakeSaver(lambda: checkpoints.save(trainer), checkpoints.finish))
    for step_seconds, waits in ((10.0, 0), (20.0, 1)):
        clock.seconds += step_seconds
        train_steps(trainer, 1)
        handler.check(trainer, FakeSaver(lambda: checkpoints.save(trainer), checkpoints.finish))
        assert len(waited) == waits
    checkpoints.finish()


@pytest.mark.whole
def test_sigterm_saves_and_the_same_command_resumes_bitwise(tmp_path: Path) -> None:
    for name in ("uninterrupted", "interrupted"):
        (tmp_path / name).mkdir()
    settings = ["stages.damsm.images=160", "stages.damsm.checkpoint_every_images=160", "stages.attngan.images=8"]
    assert run_command(str(write_recipe(tmp_path / "uninterrupted")), "--local", *settings).returncode == 0
    command = command_line(str(write_recipe(tmp_path / "interrupted")), "--local", *settings)
    process = subprocess.Popen(command, cwd=ROOT, env=command_environment(), stderr=subprocess.PIPE, text=True)
    run_folder = tmp_path / "interrupted/runs/tiny"
    while not (run_folder / "versions.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 143 and "ended on request, saved at" in stderr
    assert not export.exists(str(run_folder / "damsm/export")) and 0 <= images_in_progress(run_folder, "damsm") < 160
    (checkpoint,) = (run_folder / "damsm/checkpoints").iterdir()
    assert 8 <= int(checkpoint.name[:12]) < 160
    resumed = run_command(str(write_recipe(tmp_path / "interrupted")), "--local", *settings)
    assert resumed.returncode == 0 and f"resumes from {int(checkpoint.name[:12])} images" in resumed.stderr
    assert export_bytes(tmp_path / "interrupted", "damsm") == export_bytes(tmp_path / "uninterrupted", "damsm")


@pytest.mark.parametrize(
    ("done", "expected"), [(0, ["opened at 1", 1, 2, "finished"]), (2, ["opened at 2", "finished"])]
)
def test_hooks_are_opened_once_after_the_first_step(done: int, expected: list[Any]) -> None:
    calls: list[Any] = []

    class Hook(loop.Hook):
        def after_step(self, step: loop.FinishedStep) -> None:
            calls.append(step.images)

        def finish(self) -> None:
            calls.append("finished")

    class Trainer:
        step = done
        images = property(lambda self: self.step)

        def run_step(self, batch: None, momentum: float) -> None:
            self.step += 1

    trainer: Any = Trainer()

    def open_hooks() -> list[loop.Hook]:
        calls.append(f"opened at {trainer.step}")
        return [Hook()]

    batches: Any = iter([None, None])
    loop.run(trainer, batches, StageConfig("toy", 1, 1, images=2), 2, open_hooks)
    assert calls == expected
