"""The hooks of a stage: metrics, replicas, preemption, evaluation, checkpoints.

Replicas and preemption have cadences in steps, the others in images.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from t2idist.config import GuardConfig, StageConfig
from t2idist.engine.batches import TrackedBatches
from t2idist.engine.checkpoint.manager import CheckpointManager
from t2idist.engine.checkpoint.replicas import ReplicaManager
from t2idist.engine.guard import Diverged
from t2idist.engine.loop import FinishedStep, Hook
from t2idist.engine.metrics import MetricLogger
from t2idist.engine.preemption import PreemptionHandler
from t2idist.engine.trainer import Trainer


class EvaluateFn(Protocol):
    def __call__(
        self, nets: Mapping[str, nn.Module], images_seen: int, *, images: bool, scores: bool
    ) -> Mapping[str, float]:
        """Evaluate the networks and return values to log. Called on the first worker only.

        Args:
            nets: the networks that the stage exports, in eval mode.
            images_seen: of the run so far.
            images: whether sample images are due.
            scores: whether scores are due.
        """
        ...


@dataclass(frozen=True)
class StageState:
    """The parts of a running stage that hooks work on. Implements `preemption.StateSaver`."""

    trainer: Trainer
    batches: TrackedBatches
    checkpoints: CheckpointManager
    replicas: ReplicaManager | None
    """None if the run keeps no replicas."""
    log: MetricLogger | None
    """None on all workers but the first."""

    def save(self) -> None:
        if self.log is not None:
            self.log.flush()
        self.batches.write_ledger()
        self.checkpoints.save(self.trainer)

    def finish(self) -> None:
        self.checkpoints.finish()

    def replicate_or_save(self) -> None:
        if self.replicas is None or not self.replicas.copy_and_wait(self.trainer, self.unwritten()):
            self.save()
            self.finish()

    def unwritten(self) -> dict[str, Any]:
        """Return the records that would be lost with this worker; they travel with its replica."""
        metrics = self.log.unwritten() if self.log is not None else []
        return {"ledger": self.batches.unwritten(), "metrics": metrics}


def stage_hooks(
    state: StageState,
    stage: StageConfig,
    guard: GuardConfig,
    preemption: PreemptionHandler,
    evaluate: EvaluateFn,
    began: float,
    step: int,
) -> list[Hook]:
    """Return the hooks of a stage, in the order in which they follow a step.

    An evaluation comes before all that stores the state, because a run that resumes from a state does not evaluate it.

    Args:
        began: as in `StepTimer`.
        step: as in `StepTimer`.
    """
    timer = StepTimer(state, began, step)
    return [
        ReportMetrics(state, stage, guard, timer),
        EvaluateNetworks(state, stage, evaluate, timer),
        CopyToReplicas(state),
        CheckPreemption(state, preemption),
        SaveCheckpoints(state, stage, timer),
    ]


class CallAfterStep(Hook):
    """Calls a function after every step."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def after_step(self, step: FinishedStep) -> None:
        self._function()


class StepTimer:
    """Measures the mean duration of a step, and of its parts, between two reports.

    Args:
        began: when the training began, as `time.monotonic()`.
        step: steps done then.
    """

    def __init__(self, state: StageState, began: float, step: int) -> None:
        self._state = state
        self._since = (began, step)
        self._seconds = {"time/pictures": 0.0, "time/checkpoint": 0.0}

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Count the time inside under a name. It does not lower the images per second that are logged."""
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        self._seconds[name] += seconds
        if self._state.log is not None:
            self._state.log.exclude_seconds(seconds)

    def report(self, wait_share: float) -> dict[str, float]:
        """Return the means since the last call, as the first worker measured them. A collective.

        On an accelerator, also the largest memory that was allocated on any worker.

        Args:
            wait_share: share of the time that was spent waiting for data.
        """
        trainer = self._state.trainer
        began, step = self._since
        self._since = (time.monotonic(), trainer.step)
        steps = max(self._since[1] - step, 1)
        seconds = (self._since[0] - began) / steps
        values = {"time/step": seconds, "time/data": wait_share * seconds}
        values |= {name: total / steps for name, total in self._seconds.items()}
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        device = trainer.world.device
        allocated = torch.accelerator.max_memory_allocated(device) if device.type != "cpu" else 0
        gathered = trainer.world.all_gather_object((values, allocated))
        memory = {"memory/device_gib": max(entry[1] for entry in gathered) / 2**30} if device.type != "cpu" else {}
        return gathered[0][0] | memory


class ReportMetrics(Hook):
    """Reports progress after every step, and the metrics about 300 times in a stage.

    Raises `Diverged`, on every worker, if too many steps in a row were skipped.
    """

    def __init__(
        self,
        state: StageState,
        stage: StageConfig,
        guard: GuardConfig,
        timer: StepTimer,
    ) -> None:
        self._state, self._guard, self._timer = state, guard, timer
        self._every_images = max(stage.images_per_step, stage.images // 300)

    def after_step(self, step: FinishedStep) -> None:
        trainer, batches, replicas, log = (
            self._state.trainer, self._state.batches, self._state.replicas, self._state.log
        )  # fmt: skip
        if log is not None:
            log.log_step(step.images)
        if not step.due(self._every_images):
            return
        losses, others = trainer.reduce_reports(), batches.report()
        self._check_divergence()
        others["guard/skipped_steps"] = float(trainer.guard.skipped_steps)
        others |= self._timer.report(others["data/wait_share"])
        if replicas is not None:
            others |= replicas.report()
        batches.write_ledger()
        if log is not None:
            log.log_metrics(losses, others, trainer.step)

    def _check_divergence(self) -> None:
        trainer = self._state.trainer
        if (skips := trainer.guard.skips_in_a_row) >= self._guard.skips_in_a_row:
            raise Diverged(
                f"{skips} steps in a row up to step {trainer.step} were not finite; first: "
                f"{trainer.reports.first_nonfinite}"
            )


class CopyToReplicas(Hook):
    """Copies the state to other nodes every few steps, if the run keeps replicas."""

    def __init__(self, state: StageState) -> None:
        self._state = state

    def after_step(self, step: FinishedStep) -> None:
        replicas, trainer = self._state.replicas, self._state.trainer
        if replicas is not None and replicas.due(trainer.step):
            replicas.copy(trainer, self._state.unwritten())


class CheckPreemption(Hook):
    """Polls for preemption notices; raises `StopRequested` if this process is to end."""

    def __init__(self, state: StageState, preemption: PreemptionHandler) -> None:
        self._state, self._preemption = state, preemption

    def after_step(self, step: FinishedStep) -> None:
        self._preemption.check(self._state.trainer, self._state)


class EvaluateNetworks(Hook):
    """Evaluates the networks on the first worker when sample images or scores are due."""

    def __init__(self, state: StageState, stage: StageConfig, evaluate: EvaluateFn, timer: StepTimer) -> None:
        self._state, self._stage, self._evaluate, self._timer = state, stage, evaluate, timer

    def after_step(self, step: FinishedStep) -> None:
        images = step.due(self._stage.pictures_every_images)
        scores = self._stage.scores_every_images > 0 and step.due(self._stage.scores_every_images)
        if images or scores:
            with self._timer.measure("time/pictures"):
                nets = self._state.trainer.evaluation_nets()
                if self._state.log is not None:
                    self._state.log.log_values(self._evaluate(nets, step.images, images=images, scores=scores))


class SaveCheckpoints(Hook):
    """Begins a checkpoint when one is due; `finish` waits until the last one is committed."""

    def __init__(self, state: StageState, stage: StageConfig, timer: StepTimer) -> None:
        self._state, self._every_images, self._timer = state, stage.checkpoint_every_images, timer

    def after_step(self, step: FinishedStep) -> None:
        if step.due(self._every_images):
            with self._timer.measure("time/checkpoint"):
                self._state.save()

    def finish(self) -> None:
        self._state.finish()
