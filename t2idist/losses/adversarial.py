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
from t2idist.nn.precision import full


def says_real(logits: Tensor) -> Tensor:
    """Mean cross-entropy of logits (N,) against target 1."""
    return F.softplus(-full(logits)).mean()


def says_fake(logits: Tensor) -> Tensor:
    """Mean cross-entropy of logits (N,) against target 0."""
    return F.softplus(full(logits)).mean()


def says_fake_where(logits: Tensor, keep: Tensor, groups: int) -> Tensor:
    """Cross-entropy against target 0 over the kept of each group (0 for a group that keeps none), mean over groups.

    logits and keep (N,), N = groups * samples of a group.
    """
    terms = F.softplus(full(logits)).view(groups, -1)
    kept = keep.view(groups, -1).to(terms.dtype)
    return ((terms * kept).sum(1) / kept.sum(1).clamp(min=1)).mean()


@dataclass(frozen=True)
class Verdict:
    """A discriminator's five mean cross-entropies in its own update."""

    real: Tensor
    wrong: Tensor
    fake: Tensor
    real_alone: Tensor
    fake_alone: Tensor


class PairJudge(Protocol):
    """A discriminator that judges pictures with their captions."""

    def features(self, images: Tensor) -> Tensor: ...

    def conditional(self, features: Tensor, condition: Tensor) -> Tensor: ...


class Judge(PairJudge, Protocol):
    """A discriminator of two heads on one trunk."""

    def unconditional(self, features: Tensor) -> Tensor: ...


def judge_pairs(net: Judge, real: Tensor, fake: Tensor, condition: Tensor, pairs: WrongPairs, groups: int) -> Verdict:
    """A discriminator's verdict on real and generated pictures (N, 3, S, S) of conditions (N, D).

    One pass over the real pictures serves their own condition, the wrong one and the unconditional head.
    """
    real_features = net.features(real)
    fake_features = net.features(fake)
    return Verdict(
        real=says_real(net.conditional(real_features, condition)),
        wrong=says_fake_where(net.conditional(real_features, condition[pairs.caption]), pairs.keep, groups),
        fake=says_fake(net.conditional(fake_features, condition)),
        real_alone=says_real(net.unconditional(real_features)),
        fake_alone=says_fake(net.unconditional(fake_features)),
    )


@dataclass(frozen=True)
class PairVerdict:
    """Mean cross-entropies of the three kinds of pairs, and the share of pictures that prefer their own condition."""

    real: Tensor
    wrong: Tensor
    fake: Tensor
    accuracy_matching: Tensor


def judge_three(
    net: PairJudge, real: Tensor, fake: Tensor, condition: Tensor, pairs: WrongPairs, groups: int
) -> PairVerdict:
    """A matching-aware discriminator's verdict (GAN-CLS, section 4.2) on pictures (N, 3, S, S) of conditions (N, D).

    accuracy_matching has no gradient: how often a real picture's own condition gets a higher logit than the wrong one.
    """
    real_features = net.features(real)
    own = net.conditional(real_features, condition)
    other = net.conditional(real_features, condition[pairs.caption])
    preferred = (own > other)[pairs.keep].to(full(own).dtype)
    return PairVerdict(
        real=says_real(own),
        wrong=says_fake_where(other, pairs.keep, groups),
        fake=says_fake(net.conditional(net.features(fake), condition)),
        accuracy_matching=preferred.sum() / pairs.keep.sum().clamp(min=1),
    )


def passes_as_real(net: Judge, fake: Tensor, condition: Tensor) -> Tensor:
    """The generator's side of `judge_pairs`: both heads ought to call its pictures (N, 3, S, S) real."""
    features = net.features(fake)
    return says_real(net.conditional(features, condition)) + says_real(net.unconditional(features))


def halves_and_thirds(v: Verdict) -> Tensor:
    """AttnGAN, MirrorGAN and StackGAN v1's second stage: (real + real_alone) / 2 + (fake + wrong + fake_alone) / 3."""
    return (v.real + v.real_alone) / 2 + (v.fake + v.wrong + v.fake_alone) / 3


def conditional_only(real: Tensor, wrong: Tensor, fake: Tensor) -> Tensor:
    """GAN-CLS, StackGAN v1's first stage and AttnDCGAN: real + (wrong + fake) / 2."""
    return real + (wrong + fake) / 2


def balanced_joint(v: Verdict) -> Tensor:
    """StackGAN++'s joint loss (section 4.2, eq. 6) with a wrong-pair term: both heads weigh real and fake alike."""
    return conditional_only(v.real, v.wrong, v.fake) + v.real_alone + v.fake_alone


def authors_joint(v: Verdict) -> Tensor:
    """StackGAN-v2's released joint loss, which has the unconditional head call the wrong pair's picture real, too.

    That picture is a real one; here it is the same as in the real pair, so its term counts twice.
    """
    return v.real + v.wrong + v.fake + 2 * v.real_alone + v.fake_alone
