"""Discriminator losses of the released code, with its mismatched pairs and the order of its passes.

The order matters because every pass moves the running statistics of BatchNorm. The released code also mismatches
samples of one class. N samples are ``groups`` x B, with the samples of one group contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from t2idist.losses.adversarial import (
    BCE,
    JointDiscriminator,
    JointLosses,
    LogitLoss,
    PairLosses,
    both_features,
    loss_real,
    pair_losses,
    with_unconditional,
)
from t2idist.nn.blocks import samples_per_group


def neighbour_losses(
    net: JointDiscriminator,
    real: Tensor,
    fake: Tensor,
    condition: Tensor,
    groups: int,
    *,
    joint: bool,
    wrong_last: bool,
    kind: LogitLoss = BCE,
) -> PairLosses:
    """Compute the losses of AttnGAN, MirrorGAN and StackGAN (v1).

    The mismatched pairs of a group are B - 1: each image but the last, with the condition of the next sample.

    Args:
        real: (N, 3, S, S), as `fake`.
        condition: (N, D).
        joint: whether to return `JointLosses`, with those of the unconditional head; AttnDCGAN and stage I have none.
        wrong_last: whether mismatched pairs pass the conditional head after generated images (AttnGAN, MirrorGAN), not
            before them (StackGAN).
    """
    real_features, fake_features = both_features(net, real, fake)

    def mismatched() -> Tensor:
        images, captions = _all_but_last(real_features, groups), _by_group(condition, groups)[:, 1:].flatten(0, 1)
        with samples_per_group(net, len(images) // groups):
            return net.conditional(images, captions)

    own = net.conditional(real_features, condition)
    if wrong_last:
        generated, other = net.conditional(fake_features, condition), mismatched()
    else:
        other, generated = mismatched(), net.conditional(fake_features, condition)
    losses = pair_losses(own, generated, _all_but_last(own, groups), other, _all(other), groups, kind)
    if not joint:
        return losses
    return with_unconditional(losses, net.unconditional(real_features), net.unconditional(fake_features), kind)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(N, ...) -> (groups, B, ...)."""
    return x.reshape(groups, x.shape[0] // groups, *x.shape[1:])


def _all_but_last(x: Tensor, groups: int) -> Tensor:
    """(groups * B, ...) -> (groups * (B - 1), ...), without the last of each group."""
    return _by_group(x, groups)[:, :-1].flatten(0, 1)


def _all(logits: Tensor) -> Tensor:
    return torch.ones_like(logits, dtype=torch.bool)


@dataclass(frozen=True)
class WrongImageLosses(JointLosses):
    """`JointLosses`, and that of the unconditional head for the images of mismatched pairs, which are real."""

    wrong_alone: Tensor


def wrong_image_losses(
    net: JointDiscriminator,
    real: Tensor,
    fake: Tensor,
    condition: Tensor,
    wrong: Tensor,
    groups: int,
    *,
    joint: bool,
    kind: LogitLoss = BCE,
) -> PairLosses:
    """Compute the losses of StackGAN-v2.

    A mismatched pair is the image of another sample, with a pass of its own, and the condition.

    Args:
        real: (N, 3, S, S), as `fake`.
        condition: (N, D).
        wrong: (N,) int64, the image in `real` of each mismatched pair (`matching.wrong_images`).
        joint: whether to return `WrongImageLosses`, with those of the unconditional head (UNCOND_LOSS 1).
    """
    features = [net.features(images) for images in (real, real[wrong], fake)]
    own, other, generated = (net.conditional(each, condition) for each in features)
    losses = pair_losses(own, generated, own, other, _all(other), groups, kind)
    if not joint:
        return losses
    real_alone, wrong_alone, fake_alone = (net.unconditional(each) for each in features)
    as_real, _ = kind.compared(wrong_alone, fake_alone)
    both = with_unconditional(losses, real_alone, fake_alone, kind)
    return WrongImageLosses(**vars(both), wrong_alone=loss_real(as_real, kind))


def stackgan_v2_released_loss(losses: WrongImageLosses) -> Tensor:
    """Joint loss of StackGAN-v2's released code."""
    conditional = losses.real + losses.wrong + losses.fake
    return conditional + losses.real_alone + losses.wrong_alone + losses.fake_alone
