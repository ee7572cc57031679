"""Options of GAN training that are in no paper's preset: other norms, the R1 penalty, learning rates that fall."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from t2idist.contract import Adam, Schedule, Train, check_ranges
from t2idist.losses.penalties import r1_penalty

CONSTANT = Schedule()


@dataclass(frozen=True)
class GanOptions:
    """Settings that the configs of systems inherit; the defaults are as published."""

    discriminator_norm: Literal["batch", "group", "none"] = "batch"
    """Normalisation of the discriminators; "group": GroupNorm with 8 channels a group."""
    r1_weight: float = 0.0
    """Weight of the R1 penalty of the discriminators on real images; 0: none."""
    r1_every: int = 4
    """Steps from one R1 penalty to the next; it has this times its weight."""
    decay_start_images: float = 0.0
    """From here on the learning rates fall linearly."""
    decay_end_images: float = 0.0
    """Here they are `decay_floor` times their value, and stay so; 0: the published schedule."""
    decay_floor: float = 0.1

    def __post_init__(self) -> None:
        check_ranges(
            self,
            at_least_1="r1_every",
            at_least_0="r1_weight decay_start_images decay_end_images",
            share="decay_floor",
        )

    def adam(self, lr: float, published: Schedule = CONSTANT) -> Adam:
        """Return the settings of an optimizer with this learning rate and published schedule."""
        if not self.decay_end_images:
            return Adam(lr, schedule=published)
        start, end = self.decay_start_images, self.decay_end_images
        return Adam(lr, schedule=Schedule("linear", floor=self.decay_floor, start_images=start, end_images=end))

    def r1_weight_in(self, step: int) -> float:
        """Return the weight of the R1 penalty in this step; 0: none."""
        return self.r1_weight * self.r1_every if step % self.r1_every == 0 else 0.0

    def update_discriminator(
        self,
        train: Train,
        role: str,
        losses: Callable[..., Any],
        combine: Callable[[Any], Tensor],
        score: Callable[..., Tensor],
        real: Tensor,
        fake: Tensor,
        *args: Any,
        suffix: str = "",
    ) -> None:
        """Update a discriminator with ``combine(losses(net, real, fake, *args))``, and R1 where it is due.

        Reports the penalty and the fields of the losses.

        Args:
            score: ``score(net, images, *args[:1])``, the logits of images (N,) that the penalty is of.
            real: (N, 3, S, S), as `fake`, which gets no gradient.
            suffix: Appended to the reported names.
        """
        weight = self.r1_weight_in(train.step)
        parts, penalty = train.forward(role, _penalised_losses, weight > 0, losses, score, real, fake.detach(), *args)
        loss = combine(parts)
        if penalty is not None:
            train.report(f"{role}/r1{suffix}", penalty)
            loss = loss + weight * penalty
        train.apply(role, loss)
        for part, value in vars(parts).items():
            train.report(f"{role}/{part}{suffix}", value)


def _penalised_losses(
    net: nn.Module,
    penalise: bool,
    losses: Callable[..., Any],
    score: Callable[..., Tensor],
    real: Tensor,
    fake: Tensor,
    *args: Any,
) -> tuple[Any, Tensor | None]:
    """Compute ``losses(net, real, fake, *args)`` and, if wanted, the R1 penalty of the real images."""
    parts = losses(net, real, fake, *args)
    return parts, r1_penalty(lambda images: score(net, images, *args[:1]), real) if penalise else None
