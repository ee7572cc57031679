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
class Alone:
    """A discriminator's mean cross-entropies on pictures alone, and the shares of them that it judges rightly."""

    real: Tensor
    fake: Tensor
    accuracy_real: Tensor
    accuracy_fake: Tensor


def judge_alone(real: Tensor, fake: Tensor) -> Alone:
    """By the logits (N,) of real and of generated pictures. The accuracies have no gradient."""
    return Alone(says_real(real), says_fake(fake), _share(real > 0), _share(fake < 0))


@dataclass(frozen=True)
class PairVerdict:
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
class Verdict(PairVerdict):
    """And on pictures alone."""

    real_alone: Tensor
    fake_alone: Tensor


class PairJudge(Protocol):
    """A discriminator that judges pictures with their captions."""

    def features(self, images: Tensor) -> Tensor: ...

    def conditionals(self, features: Tensor, *conditions: Tensor) -> list[Tensor]: ...

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
        **vars(_pair_verdict(net, real_features, fake_features, condition, pairs, groups)),
        real_alone=says_real(net.unconditional(real_features)),
        fake_alone=says_fake(net.unconditional(fake_features)),
    )


def judge_three(
    net: PairJudge, real: Tensor, fake: Tensor, condition: Tensor, pairs: WrongPairs, groups: int
) -> PairVerdict:
    """A matching-aware discriminator's verdict (GAN-CLS, section 4.2) on pictures (N, 3, S, S) of conditions (N, D)."""
    return _pair_verdict(net, net.features(real), net.features(fake), condition, pairs, groups)


def _pair_verdict(
    net: PairJudge, real: Tensor, fake: Tensor, condition: Tensor, pairs: WrongPairs, groups: int
) -> PairVerdict:
    """By the features of real and generated pictures."""
    own, other = net.conditionals(real, condition, condition[pairs.caption])
    drawn = net.conditional(fake, condition)
    return PairVerdict(
        real=says_real(own),
        wrong=says_fake_where(other, pairs.keep, groups),
        fake=says_fake(drawn),
        accuracy_real=_share(own > 0),
        accuracy_wrong=_share(other < 0, pairs.keep),
        accuracy_fake=_share(drawn < 0),
        accuracy_matching=_share(own > other, pairs.keep),
    )


def _share(right: Tensor, among: Tensor | None = None) -> Tensor:
    """Of these (n,) answers, or of those `among` them; 0 where there are none."""
    if among is None:
        return right.sum() / max(len(right), 1)
    return (right & among).sum() / among.sum().clamp(min=1)


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
