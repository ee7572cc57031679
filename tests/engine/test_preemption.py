"""Announced ends: what is not saved then is saved, and the run goes on from there."""

from __future__ import annotations

import math
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from t2idist.config import CheckpointConfig, GuardConfig, StageConfig
from t2idist.contract import Batch
from t2idist.engine import loop, preemption
from t2idist.engine.batches import TrackedBatches, read_ledger
from t2idist.engine.checkpoint import export
from t2idist.engine.checkpoint.format import list_folders
from t2idist.engine.checkpoint.manager import CheckpointManager
from t2idist.engine.checkpoint.replicas import ReplicaManager
from t2idist.engine.preemption import PreemptionHandler, PreemptionNotice, StopRequested
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import Share, World
from tests.engine.test_replicas import FolderKeepers
from tests.engine.test_trainer import ALONE, GROUP_SIZE, GROUPS, apart, snapshot, step, trainer
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


def never() -> None:
    raise AssertionError("nothing was announced")


@dataclass(frozen=True)
class Goes:
    """A `notice.State`; what is not given is not to be called."""

    save: Callable[[], None] = never
    finish: Callable[[], None] = never
    keep: Callable[[], None] = never


def saves(world: World, folder: Path, said: list[PreemptionNotice | None]) -> list[int]:
    """Steps that are saved where a run hears these answers, one a look."""
    answers = iter(said)
    made = trainer(world)
    checkpoints = CheckpointManager(str(folder), world, CheckpointConfig(keep=100), {})
    notices = PreemptionHandler(lambda: next(answers), 0.0, world)
    try:
        for _ in range(len(said)):
            step(made, 1)
            notices.check(made, Goes(lambda: checkpoints.save(made), checkpoints.finish))
    finally:
        checkpoints.finish()
    return sorted(int(name[:12]) // IMAGES for name in list_folders(str(folder)))


def test_the_first_notice_saves_and_training_goes_on(tmp_path: Path) -> None:
    soon, gone = PreemptionNotice(100.0), None
    assert saves(ALONE, tmp_path, [gone, soon, soon, PreemptionNotice(math.inf), gone, soon, gone]) == [2, 6]


def test_shortly_before_the_machine_goes_the_workers_wait(
    workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(preemption.time, "sleep", waited.append)
    assert saves(
        ALONE, tmp_path / "alone", [PreemptionNotice(100.0), PreemptionNotice(50.0), PreemptionNotice(3.0)]
    ) == [1, 3]
    assert 60 <= waited[-1] <= 63
    went_on = [PreemptionNotice(3.0), PreemptionNotice(0.1), PreemptionNotice(0.1), None, PreemptionNotice(2.0)]
    assert saves(ALONE, tmp_path / "stayed", went_on) == [1, 5] and len(waited) == 3
    for saved in workers.run(2, saves, tmp_path / "two", [None, PreemptionNotice(100.0), None]):
        assert saved == [2]


def test_one_that_is_to_end_saves_and_leaves(tmp_path: Path) -> None:
    with pytest.raises(StopRequested, match=f"saved at {2 * IMAGES} images"):
        saves(ALONE, tmp_path, [None, PreemptionNotice(0.0), None])
    assert [int(name[:12]) for name in list_folders(str(tmp_path))] == [2 * IMAGES]


class Toys:
    """Batches, as `intake.Source` gives them."""

    samples_read, bad_reads, wait_seconds = 0, 0, 0.0

    def __init__(self) -> None:
        self.quarantine: dict[str, str] = {}
        self._batches = toy_gan.batches(range(GROUPS), GROUP_SIZE, (8,), 5)

    def __next__(self) -> Batch:
        return next(self._batches)

    def close(self) -> None:
        pass


def test_what_was_trained_on_is_on_record_before_a_save_that_a_notice_causes(tmp_path: Path) -> None:
    made, url = trainer(ALONE), str(tmp_path)
    notices = PreemptionHandler(lambda: PreemptionNotice(0.0) if made.step == 4 else None, 0.0, ALONE)
    with pytest.raises(StopRequested):
        train(made, url, notices, None)
    assert list(read_ledger(url)) == [(number, group) for number in range(4) for group in range(GROUPS)]


def train(made: Trainer, url: str, notices: PreemptionHandler, memory: ReplicaManager | None) -> None:
    stage = StageConfig("toy", GROUP_SIZE, GROUPS, images=300 * 10 * IMAGES)  # a report, and its ledger, every 10 steps
    checkpoints = CheckpointManager(url, ALONE, CheckpointConfig(), {})
    share = Share.of(ALONE, GROUPS)
    batches = TrackedBatches(Toys(), ALONE, share, url, step=0, attempt="a", max_bad=1.0, epoch_images=99, ledger=True)
    loop.run(
        made, batches, stage, stage.steps, checkpoints, memory, notices, None, lambda nets, images: {}, GuardConfig()
    )


class Replaced(Exception):
    """As a worker is ended from outside."""


def replaced() -> None:
    raise Replaced


@pytest.mark.parametrize("kept_in", ["memory", "storage", "storage, as no keeper answers"])
def test_workers_that_are_to_be_replaced_keep_their_state_and_stand(tmp_path: Path, kept_in: str) -> None:
    (tmp_path / "held").mkdir()
    made, keepers = trainer(ALONE), FolderKeepers(tmp_path / ("nowhere" if "no keeper" in kept_in else "held"))
    memory = (
        None
        if kept_in == "storage"
        else ReplicaManager(keepers, "toy/0", ALONE, CheckpointConfig(memory_every_steps=3), "a")
    )
    notices = PreemptionHandler(
        lambda: PreemptionNotice(math.inf, resize=True) if made.step == 4 else None, 0.0, ALONE, replaced
    )
    with pytest.raises(Replaced):
        train(made, str(tmp_path), notices, memory)
    taken, checkpoints = trainer(ALONE), CheckpointManager(str(tmp_path), ALONE, CheckpointConfig(), {})
    if kept_in == "memory":
        assert checkpoints.newest_images() <= 0
        found = ReplicaManager(keepers, "toy/0", ALONE, CheckpointConfig(), "b")
        assert found.restore(taken, -1) is not None and len(found.notes[0]["ledger"]) == 4 * GROUPS
    else:
        assert checkpoints.restore(taken) is not None
    assert taken.step == 4 and apart(snapshot(taken), snapshot(made)) == 0


def test_workers_that_were_to_be_replaced_and_were_not_go_on() -> None:
    made, done = trainer(ALONE), []
    answers = iter([PreemptionNotice(math.inf, resize=True), None, PreemptionNotice(math.inf, resize=True)])
    notices = PreemptionHandler(lambda: next(answers), 0.0, ALONE, lambda: done.append(("stood", made.step)))
    for _ in range(3):
        step(made, 1)
        notices.check(made, Goes(keep=lambda: done.append(("kept", made.step))))
    assert done == [("kept", 1), ("stood", 1), ("kept", 3), ("stood", 3)]


def test_looks_keep_to_their_pace() -> None:
    made = trainer(ALONE)
    asked: list[int] = []

    def ask() -> None:
        asked.append(made.step)

    notices = PreemptionHandler(ask, 2.0, ALONE)
    notices.set_step_seconds(1.0)
    for _ in range(6):
        step(made, 1)
        notices.check(made, Goes())
    assert asked == [2, 4, 6]
    for step_seconds in (0.4, 0.67, 0.5, 0.67, 0.5):  # no step is a multiple of what is right at its moment
        notices.set_step_seconds(step_seconds)
        step(made, 1)
        notices.check(made, Goes())
    assert asked == [2, 4, 6, 10]


def test_slow_steps_are_held_at_the_last_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(preemption.time, "sleep", waited.append)
    made, checkpoints = trainer(ALONE), CheckpointManager(str(tmp_path), ALONE, CheckpointConfig(), {})
    notices = PreemptionHandler(lambda: PreemptionNotice(30.0), 2.0, ALONE)
    for step_seconds, held in ((10.0, 0), (20.0, 1)):
        notices.set_step_seconds(step_seconds)
        step(made, 1)
        notices.check(made, Goes(lambda: checkpoints.save(made), checkpoints.finish))
        assert len(waited) == held
    checkpoints.finish()


@pytest.mark.whole
def test_sigterm_saves_leaves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    for name in ("whole", "ended"):
        (tmp_path / name).mkdir()
    longer = ["stages.damsm.images=160", "stages.damsm.checkpoint_every_images=160", "stages.attngan.images=8"]
    assert run_command(str(write_recipe(tmp_path / "whole")), "--local", *longer).returncode == 0
    words = command_line(str(write_recipe(tmp_path / "ended")), "--local", *longer)
    process = subprocess.Popen(words, cwd=ROOT, env=command_environment(), stderr=subprocess.PIPE, text=True)
    at = tmp_path / "ended/runs/tiny"
    while not (at / "versions.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 143 and "ended on request, saved at" in said
    assert not export.exists(str(at / "damsm/export")) and 0 <= images_in_progress(at, "damsm") < 160
    (saved,) = (at / "damsm/checkpoints").iterdir()
    assert 8 <= int(saved.name[:12]) < 160
    again = run_command(str(write_recipe(tmp_path / "ended")), "--local", *longer)
    assert again.returncode == 0 and f"goes on from {int(saved.name[:12])} images" in again.stderr
    assert export_bytes(tmp_path / "ended", "damsm") == export_bytes(tmp_path / "whole", "damsm")
