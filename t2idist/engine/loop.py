"""The loop of a stage: steps, and at their cadences reports, pictures and checkpoints. All cadences are in images."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from t2idist.config import GuardConfig, StageConfig
from t2idist.engine.batches import TrackedBatches
from t2idist.engine.checkpoint.manager import CheckpointManager
from t2idist.engine.checkpoint.replicas import ReplicaManager
from t2idist.engine.guard import Diverged
from t2idist.engine.metrics import MetricLogger
from t2idist.engine.preemption import PreemptionHandler
from t2idist.engine.trainer import Trainer


class Evaluate(Protocol):
    def __call__(
        self, nets: Mapping[str, nn.Module], images_seen: int, *, pictures: bool, scores: bool
    ) -> Mapping[str, float]:
        """Called on the first worker with the evaluation networks where pictures or scores are due; gives values to
        log."""
        ...


STATISTICS_STEPS = 32


def due(every_images: int, before: int, after: int) -> bool:
    """Whether a multiple of `every_images` was reached between two counts."""
    return after // every_images > before // every_images


def statistics_momentum(stage: StageConfig, step: int) -> float:
    """By how much the averaged networks' BatchNorm statistics move in a step (see `Trainer.run_step`).

    They are the mean over the last `STATISTICS_STEPS` before each look at the networks; what is averaged of weights
    that move fast has other statistics than the average of theirs. A function of the step alone, so that a run that was
    taken up again is the same.
    """
    images = stage.images_per_step
    cadences = [every for every in (stage.pictures_every_images, stage.scores_every_images) if every]
    looks = [-(-(step * images // every + 1) * every // images) for every in cadences]
    start = max(0, min(stage.steps, *looks) - STATISTICS_STEPS)
    return 1 / (step - start + 1) if step >= start else 0.0


def report_every_images(stage: StageConfig) -> int:
    """Images between two metric lines: about 300 lines a stage, and never more than one a step."""
    return max(stage.images_per_step, stage.images // 300)


def run(
    trainer: Trainer,
    batches: TrackedBatches,
    stage: StageConfig,
    steps: int,
    checkpoints: CheckpointManager,
    memory: ReplicaManager | None,
    notices: PreemptionHandler,
    log: MetricLogger | None,
    look: Evaluate,
    guard: GuardConfig,
) -> None:
    """Train until so many steps of the stage are done: all, or fewer where it is to stop before its budget.

    `log` is None on all workers but the first; memory: if any is kept.
    Raises `Diverged`, on every worker, where too many steps in a row were skipped.
    """
    pace, state = _Pace(trainer), _State(trainer, batches, checkpoints, memory, log)
    while trainer.step < steps:
        before = trainer.images
        trainer.run_step(next(batches), statistics_momentum(stage, trainer.step))
        images, last = trainer.images, trainer.step == steps
        if log is not None:
            log.stepped(images)
        if last or due(report_every_images(stage), before, images):
            losses, others = trainer.reduce_reports(), batches.settle()
            _check(trainer, guard)
            others["guard/skipped_steps"] = float(trainer.guard.skipped)
            others |= pace.settle(others["data/wait_share"])
            notices.pace(others["time/step"])
            if memory is not None:
                others |= memory.settle(others["time/step"])
            batches.write_ledger()
            if log is not None:
                log.add(losses, others, trainer.step)
        if memory is not None and memory.due(trainer.step):
            memory.take(trainer, state.notes())
        notices.check(trainer, state)
        paused = time.monotonic()
        pictures = last or due(stage.pictures_every_images, before, images)
        scores = stage.scores_every_images > 0 and (last or due(stage.scores_every_images, before, images))
        if pictures or scores:
            nets = trainer.evaluation_nets()
            if log is not None:
                log.note(look(nets, images, pictures=pictures, scores=scores))
        looked = time.monotonic()
        if last or due(stage.checkpoint_every_images, before, images):
            state.save()
        pace.pause(looked - paused, time.monotonic() - looked)
        if log is not None:
            log.pause(time.monotonic() - paused)
    checkpoints.finish()


@dataclass(frozen=True)
class _State:
    """Where a stage's state goes (`notice.State`): checkpoints, and copies in memory where there are any."""

    trainer: Trainer
    batches: TrackedBatches
    checkpoints: CheckpointManager
    memory: ReplicaManager | None
    log: MetricLogger | None

    def save(self) -> None:
        if self.log is not None:
            self.log.flush()
        self.batches.write_ledger()
        self.checkpoints.save(self.trainer)

    def finish(self) -> None:
        self.checkpoints.finish()

    def keep(self) -> None:
        if self.memory is None or not self.memory.keep(self.trainer, self.notes()):
            self.save()
            self.finish()

    def notes(self) -> dict[str, Any]:
        """What goes with a copy in memory, as it may be lost with this worker."""
        metrics = self.log.unwritten() if self.log is not None else []
        return {"ledger": self.batches.unwritten(), "metrics": metrics}


class _Pace:
    """What a step has taken lately and of what, as the first worker saw it."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._since = (time.monotonic(), trainer.step)
        self._looking = self._saving = 0.0

    def pause(self, looking_seconds: float, saving_seconds: float) -> None:
        """Time after a step that went into pictures and scores, and into a checkpoint."""
        self._looking += looking_seconds
        self._saving += saving_seconds

    def settle(self, wait_share: float) -> dict[str, float]:
        """Mean seconds of the steps since the last call, and of what they wait for: values to log. A collective.

        wait_share: of the time, waited for data. On an accelerator, with the most memory that a worker has held of it.
        """
        moment, step = self._since
        self._since = (time.monotonic(), self._trainer.step)
        steps = max(self._since[1] - step, 1)
        seconds = (self._since[0] - moment) / steps
        device = self._trainer.world.device
        held = torch.accelerator.max_memory_allocated(device) if device.type != "cpu" else 0
        mine = (seconds, wait_share * seconds, self._looking / steps, self._saving / steps)
        self._looking = self._saving = 0.0
        parts = self._trainer.world.all_gather_object((mine, held))
        names = ("time/step", "time/data", "time/pictures", "time/checkpoint")
        found = dict(zip(names, parts[0][0], strict=True))
        return found if device.type == "cpu" else found | {"memory/device_gib": max(part[1] for part in parts) / 2**30}


def _check(trainer: Trainer, guard: GuardConfig) -> None:
    """See whether the latest steps were all skipped."""
    if (in_a_row := trainer.guard.in_a_row) >= guard.skips_in_a_row:
        raise Diverged(
            f"{in_a_row} steps in a row up to step {trainer.step} were not finite; first: {trainer.first_bad}"
        )
