"""Adversarial losses on logits: binary cross-entropy as published, in full precision.

``real`` pairs a picture with its own caption, ``wrong`` a real picture with another's, ``fake`` a generated picture
with the caption that it was drawn from; the unconditional head sees pictures alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from t2idist.losses.matching import WrongPairs
from t2idist.nn.precision import upcast


def bce_real(logits: Tensor) -> Tensor:
    """Mean cross-entropy of logits (N,) against target 1."""
    return F.softplus(-upcast(logits)).mean()


def bce_fake(logits: Tensor) -> Tensor:
    """Mean cross-entropy of logits (N,) against target 0."""
    return F.softplus(upcast(logits)).mean()


def masked_bce_fake(logits: Tensor, keep: Tensor, groups: int) -> Tensor:
    """Cross-entropy against target 0 over the kept of each group (0 for a group that keeps none), mean over groups.

    logits and keep (N,), N = groups * samples of a group.
    """
    terms = F.softplus(upcast(logits)).view(groups, -1)
    kept = keep.view(groups, -1).to(terms.dtype)
    return ((terms * kept).sum(1) / kept.sum(1).clamp(min=1)).mean()


@dataclass(frozen=True)
class UnconditionalLosses:
    """A discriminator's mean cross-entropies on pictures alone, and the shares of them that it judges rightly."""

    real: Tensor
    fake: Tensor
    accuracy_real: Tensor
    accuracy_fake: Tensor


def unconditional_losses(real: Tensor, fake: Tensor) -> UnconditionalLosses:
    """By the logits (N,) of real and of generated pictures. The accuracies have no gradient."""
    return UnconditionalLosses(bce_real(real), bce_fake(fake), _fraction(real > 0), _fraction(fake < 0))


@dataclass(frozen=True)
class PairLosses:
    """A discriminator's mean cross-entropies on the three kinds of pairs in its own update.

    accuracy_...: shares of pairs that it judges rightly. accuracy_matching: of real pictures that get a higher logit
    with their own condition than with the wrong one. None of them has a gradient.
    """

    real: Tensor
    wrong: Tensor
    fake: Tensor
    accuracy_real: Tensor
    accuracy_wrong: Tensor
    accuracy_fake: Tensor
    accuracy_matching: Tensor


@dataclass(frozen=True)
class JointLosses(PairLosses):
    """And on pictures alone."""

    real_alone: Tensor
    fake_alone: Tensor


class ConditionalDiscriminator(Protocol):
    """A discriminator that judges pictures with their captions."""

    def features(self, images: Tensor) -> Tensor: ...

    def conditionals(self, features: Tensor, *conditions: Tensor) -> list[Tensor]: ...

    def conditional(self, features: Tensor, condition: Tensor) -> Tensor: ...


class JointDiscriminator(ConditionalDiscriminator, Protocol):
    """A discriminator of two heads on one trunk."""

    def unconditional(self, features: Tensor) -> Tensor: ...


def joint_losses(
    net: JointDiscriminator, real: Tensor, fake: Tensor, condition: Tensor, pairs: WrongPairs, groups: int
) -> JointLosses:
    """A discriminator's verdict on real and generated pictures (N, 3, S, S) of conditions (N, D).

    One pass over the real pictures serves their own condition, the wrong one and the unconditional head.
    """
    real_features = net.features(real)
    fake_features = net.features(fake)
    return JointLosses(
        **vars(_pair_losses(net, real_features, fake_features, condition, pairs, groups)),
        real_alone=bce_real(net.unconditional(real_features)),
        fake_alone=bce_fake(net.unconditional(fake_features)),
    )


def matching_aware_losses(
    net: ConditionalDiscriminator, real: Tensor, fake: Tensor, condition: Tensor, pairs: WrongPairs, groups: int
) -> PairLosses:
    """A matching-aware discriminator's verdict (GAN-CLS, section 4.2) on pictures (N, 3, S, S) of conditions (N, D)."""
    return _pair_losses(net, net.features(real), net.features(fake), condition, pairs, groups)


def _pair_losses(
    net: ConditionalDiscriminator, real: Tensor, fake: Tensor, condition: Tensor, pairs: WrongPairs, groups: int
) -> PairLosses:
    """By the features of real and generated pictures."""
    own, other = net.conditionals(real, condition, condition[pairs.caption])
    drawn = net.conditional(fake, condition)
    return PairLosses(
        real=bce_real(own),
        wrong=masked_bce_fake(other, pairs.keep, groups),
        fake=bce_fake(drawn),
        accuracy_real=_fraction(own > 0),
        accuracy_wrong=_fraction(other < 0, pairs.keep),
        accuracy_fake=_fraction(drawn < 0),
        accuracy_matching=_fraction(own > other, pairs.keep),
    )


def _fraction(right: Tensor, among: Tensor | None = None) -> Tensor:
    """Of these (n,) answers, or of those `among` them; 0 where there are none."""
    if among is None:
        return right.sum() / max(len(right), 1)
    return (right & among).sum() / among.sum().clamp(min=1)


def generator_loss(net: JointDiscriminator, fake: Tensor, condition: Tensor) -> Tensor:
    """The generator's side of `joint_losses`: both heads ought to call its pictures (N, 3, S, S) real."""
    features = net.features(fake)
    return bce_real(net.conditional(features, condition)) + bce_real(net.unconditional(features))


def attngan_discriminator_loss(v: JointLosses) -> Tensor:
    """AttnGAN, MirrorGAN and StackGAN v1's second stage: (real + real_alone) / 2 + (fake + wrong + fake_alone) / 3."""
    return (v.real + v.real_alone) / 2 + (v.fake + v.wrong + v.fake_alone) / 3


def matching_aware_loss(real: Tensor, wrong: Tensor, fake: Tensor) -> Tensor:
    """GAN-CLS, StackGAN v1's first stage and AttnDCGAN: real + (wrong + fake) / 2."""
    return real + (wrong + fake) / 2


def stackgan_pp_discriminator_loss(v: JointLosses) -> Tensor:
    """StackGAN++'s joint loss (section 4.2, eq. 6) with a wrong-pair term: both heads weigh real and fake alike."""
    return matching_aware_loss(v.real, v.wrong, v.fake) + v.real_alone + v.fake_alone


def stackgan_v2_released_loss(v: JointLosses) -> Tensor:
    """StackGAN-v2's released joint loss, which has the unconditional head call the wrong pair's picture real, too.

    That picture is a real one; here it is the same as in the real pair, so its term counts twice.
    """
    return v.real + v.wrong + v.fake + 2 * v.real_alone + v.fake_alone
