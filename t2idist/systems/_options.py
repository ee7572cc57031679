"""Options of GAN training that are in no paper's preset: losses, norms, penalties, augmentation, falling rates."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from t2idist.contract import Adam, Schedule, Train, check_ranges
from t2idist.losses import augmentation
from t2idist.losses.adversarial import BCE, HINGE, LEAST_SQUARES, LogitLoss, LogitsOf, generator_loss
from t2idist.losses.penalties import matching_aware_penalty, r1_penalty
from t2idist.nn.blocks import replace_batch_norm
from t2idist.nn.discriminators import remove_logit_biases
from t2idist.nn.spectral_norm import add_spectral_norm

CONSTANT = Schedule()
_AVERAGED_IMAGES = 256
"""Images of a group over which the share of those that are taken for real is averaged, as in ADA."""
_LOSSES = {"bce": BCE, "hinge": HINGE, "least_squares": LEAST_SQUARES}


@dataclass(frozen=True)
class GanOptions:
    """Settings that the configs of systems inherit; the defaults are as published."""

    adversarial_loss: Literal["bce", "hinge", "least_squares"] = "bce"
    """Loss of the logits: binary cross-entropy, hinge, or the squared distance from 1 and 0 (LSGAN)."""
    relativistic: bool = False
    """Take differences of logits: of a real and a generated image with the same caption, and of the own and the wrong
    caption of a real image (relativistic GAN)."""
    top_k: float = 1.0
    """Share of a group's images that the generator learns from: those that a discriminator takes for real most."""
    top_k_start_images: float = 0.0
    """`top_k` applies after this many images."""
    augment: tuple[str, ...] = ()
    """Differentiable augmentation of all images that discriminators see (DiffAugment): color, translation, cutout."""
    augment_target: float = 0.0
    """Adaptive augmentation (ADA; Karras et al. 2020): each image is augmented with a probability, 0 at first. It rises
    while a discriminator takes more than this share of the real images for real, and falls while it takes fewer. If
    0, every image is augmented."""
    augment_ramp_images: float = 500_000.0
    """That probability rises from 0 to 1 in no fewer images."""
    discriminator_norm: Literal["batch", "group", "instance", "spectral", "none"] = "batch"
    """Normalisation of the discriminators; "group": GroupNorm with 8 channels a group; "instance": of each channel of
    each image; "spectral": of the weights."""
    r1_weight: float = 0.0
    """Weight of the R1 penalty of the discriminators on real images; 0: none."""
    r1_every: int = 4
    """Steps from one R1 penalty to the next; it has this times its weight."""
    ma_gp_weight: float = 0.0
    """Weight of the matching-aware gradient penalty of the discriminators on real pairs, in every step; 0: none."""
    ema_rampup: float = 0.0
    """Largest half-life of the generator's EMA as a share of the images seen, so that it forgets its start; 0: none."""
    decay_start_images: float = 0.0
    """From here on the learning rates fall linearly."""
    decay_end_images: float = 0.0
    """Here they are `decay_floor` times their value, and stay so; 0: the published schedule."""
    decay_floor: float = 0.1

    def __post_init__(self) -> None:
        check_ranges(
            self,
            at_least_1="r1_every",
            at_least_0="r1_weight ma_gp_weight ema_rampup decay_start_images decay_end_images top_k_start_images",
            share="decay_floor top_k augment_target",
            above_0="top_k augment_ramp_images",
        )
        if self.relativistic and self.adversarial_loss == "least_squares":
            raise ValueError("relativistic: true, but adversarial_loss is least_squares; allowed are bce and hinge")
        if unknown := [kind for kind in self.augment if kind not in augmentation.KINDS]:
            raise ValueError(f"augment: '{unknown[0]}'; there are {', '.join(augmentation.KINDS)}")
        if self.augment_target and not self.augment:
            raise ValueError("augment_target: there is nothing to adapt; set augment=[color,translation,cutout]")

    @property
    def logit_loss(self) -> LogitLoss:
        return replace(_LOSSES[self.adversarial_loss], relativistic=self.relativistic)

    def finish_discriminator(self, net: nn.Module, init: Callable[[nn.Module], None] | None) -> None:
        """Replace the norms of a new discriminator and initialise it, in place; init None: as PyTorch does."""
        replace_batch_norm(net, self.discriminator_norm)
        if self.relativistic:
            remove_logit_biases(net)
        if init is not None:
            init(net)
        if self.discriminator_norm == "spectral":
            add_spectral_norm(net)

    def memory_of(self, roles: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Return the shape of each discriminator's state of adaptive augmentation (`contract.KeepsMemory.memory`)."""
        discriminators = [role for role in roles if role.startswith("discriminator")]
        return {_memory_name(role): (2,) for role in discriminators if self.augment_target}

    def augmented(self, train: Train, role: str, images: Tensor) -> Tensor:
        """Augment images (N, 3, S, S) for the discriminator of this role."""
        if not self.augment:
            return images
        changed = augmentation.augment(images, train.noise(augmentation.DRAWS), self.augment)
        if not self.augment_target:
            return changed
        probabilities = train.memory(_memory_name(role))[:, 0]
        of_images = probabilities.repeat_interleave(len(images) // len(probabilities)).unsqueeze(1)
        chosen = torch.special.ndtr(train.noise(1)) < of_images
        return torch.where(chosen[:, :, None, None], changed, images)

    def adapt_augmentation(self, train: Train, role: str, accepted: Tensor, images: int) -> None:
        """Change the probability of each group.

        Args:
            accepted: (M,) bool, for each logit of a real image, whether it is taken for real; NaN is not.
            images: real images of all groups of the worker.
        """
        memory = train.memory(_memory_name(role))  # (groups, 2): the probability, and the average share
        probability, share = memory.unbind(1)
        of_groups = accepted.view(len(memory), -1).to(memory.dtype)
        share.lerp_(of_groups.mean(1), min(1.0, images / len(memory) / _AVERAGED_IMAGES))
        images_per_step = train.decide(lambda step, images: images / step if step else 0.0)
        change = images_per_step / self.augment_ramp_images
        probability.add_((share - self.augment_target).sign(), alpha=change).clamp_(0, 1)
        train.report(f"{role}/augmented", probability.mean())

    def adversarial_loss_of(
        self, train: Train, role: str, logits_of: LogitsOf, fake: Tensor, real: Tensor, groups: int, *condition: Tensor
    ) -> Tensor:
        """Return the generator's loss on the images `fake` (N, 3, S, S) with conditions (N, D).

        Args:
            real: (N, 3, S, S), the real images of the batch.
        """
        seen = self.augmented(train, role, fake)
        reference = self.augmented(train, role, real) if self.relativistic else None
        kept = train.decide(lambda step, images: self.top_k if images >= self.top_k_start_images else 1.0)
        with train.frozen(role) as discriminator:
            kind = replace(self.logit_loss, kept=kept)
            return generator_loss(logits_of, discriminator, seen, *condition, kind=kind, real=reference, groups=groups)

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
        logits_of: LogitsOf,
        real: Tensor,
        fake: Tensor,
        *args: Any,
        suffix: str = "",
    ) -> None:
        """Update a discriminator with ``combine(losses(net, real, fake, *args, kind=...))`` and what penalties are due.

        Reports the penalties, the losses and the accuracies.

        Args:
            logits_of: Called with the discriminator, images and ``args[:1]``; the penalties are of the sum.
            real: (N, 3, S, S), as `fake`, which gets no gradient.
            suffix: Appended to the reported names.
        """
        weights = {"r1": train.decide(lambda step, images: self.r1_weight_in(step)), "ma_gp": self.ma_gp_weight}
        due = [name for name, weight in weights.items() if weight]
        losses = functools.partial(losses, kind=self.logit_loss)
        real, fake = self.augmented(train, role, real), self.augmented(train, role, fake.detach())
        parts, penalties = train.forward(role, _penalised_losses, due, losses, logits_of, real, fake, *args)
        loss = combine(parts)
        for name, penalty in penalties.items():
            train.report(f"{role}/{name}{suffix}", penalty)
            loss = loss + weights[name] * penalty
        train.apply(role, loss)
        if self.augment_target:
            self.adapt_augmentation(train, role, parts.accepted, len(real))
        for part, value in parts.scalars().items():
            train.report(f"{role}/{part}{suffix}", value)


def _memory_name(role: str) -> str:
    return f"augmentation_{role}"


def _penalised_losses(
    net: nn.Module,
    due: Sequence[str],
    losses: Callable[..., Any],
    logits_of: LogitsOf,
    real: Tensor,
    fake: Tensor,
    *args: Any,
) -> tuple[Any, dict[str, Tensor]]:
    """Compute ``losses(net, real, fake, *args)`` and the penalties of the real images that are due."""

    def score(images: Tensor, *condition: Tensor) -> Tensor:
        return functools.reduce(operator.add, logits_of(net, images, *condition))

    parts, penalties = losses(net, real, fake, *args), {}
    if "r1" in due:
        penalties["r1"] = r1_penalty(lambda images: score(images, *args[:1]), real)
    if "ma_gp" in due:
        penalties["ma_gp"] = matching_aware_penalty(score, real, *args[:1])
    return parts, penalties
