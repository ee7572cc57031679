"""Learning-rate schedules and EMA decay as functions of images seen."""

from __future__ import annotations

import math

from t2idist.contract import Schedule


def lr_factor(schedule: Schedule, images: int) -> float:
    """Return the factor on the learning rate after `images` images. Raises ValueError for an unknown kind."""
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "exponential":
        return max(schedule.floor, schedule.factor ** math.floor(images / schedule.every_images))
    if schedule.kind == "linear":
        done = (images - schedule.start_images) / max(schedule.end_images - schedule.start_images, 1.0)
        return 1.0 + (schedule.floor - 1.0) * min(max(done, 0.0), 1.0)
    raise ValueError(f"schedule kind {schedule.kind!r}; allowed are constant, exponential, linear")


def ema_decay(half_life_images: float, images_per_step: int, images: int = 0, rampup: float = 0.0) -> float:
    """Return the weight of the old average in a step, so that it is halved every `half_life_images`.

    Args:
        images: Images seen before the step.
        rampup: The half-life is at most this times the images seen (Karras et al. 2020, StyleGAN2-ADA); 0: no limit.
    """
    if rampup:
        half_life_images = min(half_life_images, rampup * (images + images_per_step))
    return float(0.5 ** (images_per_step / half_life_images))
