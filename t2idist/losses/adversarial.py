"""Adversarial losses on logits, in float32 at least: binary cross-entropy, as published, or another `LogitLoss`.

``real`` is a real image with its own caption, ``wrong`` a real image with a mismatched caption, ``fake`` a generated
image with its caption. ``_alone`` marks the terms of the unconditional head, which sees images only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2idist.losses.matching import WrongPairs
from t2idist.nn.blocks import couples_samples
from t2idist.nn.precision import upcast


@dataclass(frozen=True)
class LogitLoss:
    """The losses of single logits, as functions of tensors of any shape."""

    real: Callable[[Tensor], Tensor]
    """Of the discriminator, for what it should accept."""
    fake: Callable[[Tensor], Tensor]
    """Of the discriminator, for what it should reject."""
    generator: Callable[[Tensor], Tensor]
    """Of the generator, for its images."""
    relativistic: bool = False
    """Take the difference of two logits in place of each: of a real and a generated image with the same caption
    (RSGAN: Jolicoeur-Martineau 2018), and of a real image with its own and with the wrong caption."""
    boundary: float = 0.0
    """Logit from which on an image is taken for real."""
    kept: float = 1.0
    """Share of each group's logits, the largest, that the generator learns from (top-k: Sinha et al. 2020)."""

    def compared(self, logits: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the losses take for logits (N,) of pairs to accept and of pairs to reject."""
        logits, other = upcast(logits), upcast(other)
        return (logits - other, other - logits) if self.relativistic else (logits, other)


def _softplus_of_minus(logits: Tensor) -> Tensor:
    return F.softplus(-logits)


BCE = LogitLoss(_softplus_of_minus, F.softplus, _softplus_of_minus)
"""Cross-entropy against targets 1 and 0; the generator has the loss that does not saturate (Goodfellow et al. 2014)."""
HINGE = LogitLoss(lambda logits: F.relu(1 - logits), lambda logits: F.relu(1 + logits), torch.neg)
"""Hinge loss (Lim and Ye 2017; Miyato et al. 2018)."""
LEAST_SQUARES = LogitLoss(
    lambda logits: (logits - 1).square(), torch.square, lambda logits: (logits - 1).square(), boundary=0.5
)
"""Squared distance from the targets 1 and 0 (LSGAN: Mao et al. 2017, eq. 9), without the factor 1/2 there."""


def loss_real(logits: Tensor, kind: LogitLoss = BCE) -> Tensor:
    """Mean loss of the discriminator's logits (N,) of real pairs."""
    return kind.real(upcast(logits)).mean()


def loss_fake(logits: Tensor, kind: LogitLoss = BCE) -> Tensor:
    """Mean loss of the discriminator's logits (N,) of generated images."""
    return kind.fake(upcast(logits)).mean()


def loss_generated(logits: Tensor, kind: LogitLoss = BCE, groups: int = 1) -> Tensor:
    """Mean loss of the generator, from the logits (N,) of its images."""
    of_groups = upcast(logits).reshape(groups, -1)
    if kind.kept < 1:
        of_groups = of_groups.topk(math.ceil(kind.kept * of_groups.shape[1] - 1e-9), sorted=False).values
    return kind.generator(of_groups).mean()


def masked_loss_fake(logits: Tensor, keep: Tensor, groups: int, kind: LogitLoss = BCE) -> Tensor:
    """Mean over groups of the mean loss of the kept samples of each, as pairs to reject.

    logits and keep are (N,). A group that keeps no sample contributes 0.
    """
    terms = kind.fake(upcast(logits)).view(groups, -1)
    kept = keep.view(groups, -1).to(terms.dtype)
    return ((terms * kept).sum(1) / kept.sum(1).clamp(min=1)).mean()


class _ScalarsByName:
    """Base of the losses of a discriminator."""

    def scalars(self) -> dict[str, Tensor]:
        """Return the losses and accuracies by name."""
        return {name: value for name, value in vars(self).items() if value.dim() == 0}


@dataclass(frozen=True)
class UnconditionalLosses(_ScalarsByName):
    """A discriminator's mean losses on images without captions, and its accuracies (without gradient)."""

    real: Tensor
    fake: Tensor
    accuracy_real: Tensor
    accuracy_fake: Tensor
    accepted: Tensor
    """(N,) bool: the logits of real images that are taken for real."""


def unconditional_losses(real: Tensor, fake: Tensor, kind: LogitLoss = BCE) -> UnconditionalLosses:
    """Losses from the logits (N,) of real and of generated images."""
    real, fake = kind.compared(real, fake)
    accepted = real > kind.boundary
    accuracies = _fraction(accepted), _fraction(fake < kind.boundary)
    return UnconditionalLosses(loss_real(real, kind), loss_fake(fake, kind), *accuracies, accepted)


def patch_losses(net: nn.Module, real: Tensor, fake: Tensor, kind: LogitLoss = BCE) -> UnconditionalLosses:
    """Losses of a network that maps images (N, C, S, S) to a logit for each of their patches, mean over patches."""
    if couples_samples(net):
        real_logits, fake_logits = net(real), net(fake)
    else:
        real_logits, fake_logits = net(torch.cat([real, fake])).chunk(2)
    return unconditional_losses(real_logits.flatten(), fake_logits.flatten(), kind)


def half_loss(losses: UnconditionalLosses) -> Tensor:
    """Half the discriminator's loss, which slows it down relative to the generator (pix2pix, section 3.3; CycleGAN)."""
    return (losses.real + losses.fake) / 2


@dataclass(frozen=True)
class PairLosses(_ScalarsByName):
    """A discriminator's mean losses on the three kinds of pairs, and its accuracies (without gradient)."""

    real: Tensor
    wrong: Tensor
    fake: Tensor
    accuracy_real: Tensor
    accuracy_wrong: Tensor
    accuracy_fake: Tensor
    accuracy_matching: Tensor
    """Share of real images with a higher logit for their own condition than for the wrong one."""
    accepted: Tensor
    """(N,) bool: the logits of real pairs that are taken for real."""


@dataclass(frozen=True)
class JointLosses(PairLosses):
    """`PairLosses`, and the mean losses of the unconditional head."""

    real_alone: Tensor
    fake_alone: Tensor


class ConditionalDiscriminator(Protocol):
    """A discriminator of images with conditions."""

    def features(self, images: Tensor) -> Tensor: ...

    def conditionals(self, features: Tensor, *conditions: Tensor) -> list[Tensor]: ...

    def conditional(self, features: Tensor, condition: Tensor) -> Tensor: ...


class JointDiscriminator(ConditionalDiscriminator, Protocol):
    """A discriminator with a conditional and an unconditional head on one trunk."""

    def unconditional(self, features: Tensor) -> Tensor: ...


def joint_losses(
    net: JointDiscriminator,
    real: Tensor,
    fake: Tensor,
    condition: Tensor,
    pairs: WrongPairs,
    groups: int,
    kind: LogitLoss = BCE,
) -> JointLosses:
    """Compute the discriminator's losses of both heads on images (N, 3, S, S) with conditions (N, D).

    One pass over the real images serves their own condition, the wrong one and the unconditional head.
    """
    real_features, fake_features = both_features(net, real, fake)
    losses = _cyclic_losses(net, real_features, fake_features, condition, pairs, groups, kind)
    return with_unconditional(losses, net.unconditional(real_features), net.unconditional(fake_features), kind)


def matching_aware_losses(
    net: ConditionalDiscriminator,
    real: Tensor,
    fake: Tensor,
    condition: Tensor,
    pairs: WrongPairs,
    groups: int,
    kind: LogitLoss = BCE,
) -> PairLosses:
    """Compute the losses of GAN-CLS (section 4.2, algorithm 1) on images (N, 3, S, S) with conditions (N, D)."""
    return _cyclic_losses(net, *both_features(net, real, fake), condition, pairs, groups, kind)


def both_features(net: ConditionalDiscriminator, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the features of real and of generated images, in one pass unless BatchNorm would mix them."""
    if couples_samples(net):
        return net.features(real), net.features(fake)
    features = net.features(torch.cat([real, fake]))
    return features[: len(real)], features[len(real) :]


def _cyclic_losses(
    net: ConditionalDiscriminator,
    real: Tensor,
    fake: Tensor,
    condition: Tensor,
    pairs: WrongPairs,
    groups: int,
    kind: LogitLoss,
) -> PairLosses:
    """Compute the pair losses from the features of real and generated images."""
    own, other = net.conditionals(real, condition, condition[pairs.caption])
    return pair_losses(own, net.conditional(fake, condition), own, other, pairs.keep, groups, kind)


def pair_losses(
    own: Tensor, generated: Tensor, matching: Tensor, other: Tensor, keep: Tensor, groups: int, kind: LogitLoss
) -> PairLosses:
    """Compute the losses from the logits of the conditional head.

    Args:
        own: (N,), of real images with their own conditions.
        generated: (N,), of generated images.
        matching: (M,), of a matching pair for each mismatched one.
        other: (M,), of the mismatched pairs.
        keep: (M,) bool, the mismatched pairs that count.
    """
    as_real, as_fake = kind.compared(own, generated)
    _, as_wrong = kind.compared(matching, other)
    accepted = as_real > kind.boundary
    return PairLosses(
        real=loss_real(as_real, kind),
        wrong=masked_loss_fake(as_wrong, keep, groups, kind),
        fake=loss_fake(as_fake, kind),
        accuracy_real=_fraction(accepted),
        accuracy_wrong=_fraction(as_wrong < kind.boundary, keep),
        accuracy_fake=_fraction(as_fake < kind.boundary),
        accuracy_matching=_fraction(matching > other, keep),
        accepted=accepted,
    )


def with_unconditional(losses: PairLosses, real: Tensor, fake: Tensor, kind: LogitLoss) -> JointLosses:
    """Add the losses of the unconditional head, from its logits (N,) of real and of generated images."""
    real, fake = kind.compared(real, fake)
    return JointLosses(**vars(losses), real_alone=loss_real(real, kind), fake_alone=loss_fake(fake, kind))


def _fraction(correct: Tensor, among: Tensor | None = None) -> Tensor:
    """Fraction of true elements in `correct` (N,), of those selected by `among` if given; 0 if there are none."""
    if among is None:
        return correct.sum() / max(len(correct), 1)
    return (correct & among).sum() / among.sum().clamp(min=1)


def joint_logits(net: JointDiscriminator, images: Tensor, condition: Tensor) -> list[Tensor]:
    """Logits (N,) of the conditional and the unconditional head, of images (N, 3, S, S) with conditions (N, D)."""
    features = net.features(images)
    return [net.conditional(features, condition), net.unconditional(features)]


def conditional_logits(net: ConditionalDiscriminator, images: Tensor, condition: Tensor) -> list[Tensor]:
    """Logits (N,) of the conditional head, of images (N, 3, S, S) with conditions (N, D)."""
    return [net.conditional(net.features(images), condition)]


def unconditional_logits(net: JointDiscriminator, images: Tensor) -> list[Tensor]:
    """Logits (N,) of the unconditional head, of images (N, 3, S, S)."""
    return [net.unconditional(net.features(images))]


LogitsOf = Callable[..., list[Tensor]]
"""``logits_of(net, images, *condition)``: the logits (N,) of every head that a loss is of."""


def generator_loss(
    logits_of: LogitsOf,
    net: nn.Module,
    fake: Tensor,
    *condition: Tensor,
    kind: LogitLoss = BCE,
    real: Tensor | None = None,
    groups: int = 1,
) -> Tensor:
    """The generator's counterpart of the discriminator's losses: every head should accept its images (N, 3, S, S).

    Args:
        real: (N, 3, S, S), the real images with the same captions; needed by a relativistic loss only.
    """
    logits = logits_of(net, fake, *condition)
    if kind.relativistic:
        assert real is not None, "a relativistic loss needs the real images"
        with torch.no_grad():
            references = logits_of(net, real, *condition)
        logits = [kind.compared(own, other)[0] for own, other in zip(logits, references, strict=True)]
    return torch.stack([loss_generated(each, kind, groups) for each in logits]).sum()


def attngan_discriminator_loss(losses: JointLosses) -> Tensor:
    """Loss of AttnGAN, MirrorGAN and StackGAN v1's stage II, as released: the mean of real and of fake terms."""
    real = (losses.real + losses.real_alone) / 2
    return real + (losses.fake + losses.wrong + losses.fake_alone) / 3


def matching_aware_loss(losses: PairLosses) -> Tensor:
    """Loss of GAN-CLS (algorithm 1), StackGAN v1's stage I and AttnDCGAN."""
    return losses.real + (losses.wrong + losses.fake) / 2


def stackgan_pp_discriminator_loss(losses: JointLosses) -> Tensor:
    """Joint loss of StackGAN++ (section 4.2, eq. 6) with a term for mismatched pairs; both heads have equal weight."""
    return matching_aware_loss(losses) + losses.real_alone + losses.fake_alone
