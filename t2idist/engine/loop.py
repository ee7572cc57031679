"""The training loop of a stage: run a step, then every hook. The hooks of a stage are in engine/hooks.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from t2idist.config import StageConfig
from t2idist.engine.batches import TrackedBatches
from t2idist.engine.trainer import Trainer

STATISTICS_STEPS = 32


def due(every_images: int, before: int, after: int) -> bool:
    """Return whether a multiple of `every_images` lies between two image counts (the second included)."""
    return after // every_images > before // every_images


@dataclass(frozen=True)
class FinishedStep:
    """The step that was just run."""

    images_before: int
    images: int
    last: bool
    """Whether training ends with this step."""

    def due(self, every_images: int) -> bool:
        """Return whether an action with this cadence follows the step. Every action follows the last one."""
        return self.last or due(every_images, self.images_before, self.images)


class Hook:
    """An action after steps, at a cadence of its own.

    Hooks call collectives, so every worker runs the same hooks in the same order.
    """

    def after_step(self, step: FinishedStep) -> None:
        """Act if the hook is due after this step."""
        raise NotImplementedError

    def finish(self) -> None:
        """Complete what is still in progress; called once, after the last step."""


def run(
    trainer: Trainer, batches: TrackedBatches, stage: StageConfig, steps: int, open_hooks: Callable[[], Sequence[Hook]]
) -> None:
    """Train until `steps` steps of the stage are done, counted from its start.

    Args:
        open_hooks: returns the hooks. It is called after the first step, because it may wait for storage.
    """
    hooks: Sequence[Hook] | None = None
    while trainer.step < steps:
        before = trainer.images
        trainer.run_step(next(batches), statistics_momentum(stage, trainer.step))
        step = FinishedStep(before, trainer.images, last=trainer.step == steps)
        hooks = open_hooks() if hooks is None else hooks
        for hook in hooks:
            hook.after_step(step)
    for hook in open_hooks() if hooks is None else hooks:
        hook.finish()


def statistics_momentum(stage: StageConfig, step: int) -> float:
    """Return the momentum of the BatchNorm statistics of the EMA networks in a step (see `Trainer.run_step`).

    The statistics become the mean over the last `STATISTICS_STEPS` steps before each evaluation; outside of these
    windows the momentum is 0. The statistics of averaged weights differ from the average of the live networks'
    statistics. The value depends on the step alone, so a resumed run computes the same.
    """
    images = stage.images_per_step
    cadences = [every for every in (stage.pictures_every_images, stage.scores_every_images) if every]
    evaluations = [-(-(step * images // every + 1) * every // images) for every in cadences]
    start = max(0, min(stage.steps, *evaluations) - STATISTICS_STEPS)
    return 1 / (step - start + 1) if step >= start else 0.0
