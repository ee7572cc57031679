"""Discriminators of StackGAN and of the trees: a trunk down to 4x4, a conditional and an unconditional head.

The layouts for 64, 128 and 256 pixels are the published ones, with their parameter names; below 64 pixels there are
fewer down blocks and the trunk ends with fewer channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from t2idist.nn.blocks import LEAKY_SLOPE, JointConv2d, JointSequential, down_block, leaky_block

SIZES = (16, 32, 64, 128, 256)


class LogitConv2d(nn.Conv2d):
    """4x4 convolution of a 4x4 map to one logit, computed as a faster linear map: (N, C, 4, 4) -> (N,)."""

    def __init__(self, channels: int, bias: bool = True) -> None:
        super().__init__(channels, 1, kernel_size=4, stride=4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        rows, weight = (part.permute(0, 2, 3, 1).flatten(1) for part in (x, self.weight))  # channels last
        return F.linear(rows, weight, self.bias).squeeze(1)


def remove_logit_biases(net: nn.Module) -> None:
    """Remove the biases of all logits, in place: differences of logits do not depend on them."""
    for module in net.modules():
        if isinstance(module, LogitConv2d):
            module.bias = None


def logit_head(channels: int) -> nn.Sequential:
    """(N, channels, 4, 4) -> (N,) logits."""
    return nn.Sequential(LogitConv2d(channels))


def _joint_layers(channels: int, condition_dim: int, *, condition_first: bool = False) -> list[nn.Module]:
    """JointConv2d + BatchNorm + LeakyReLU that keep size and channels."""
    joint = JointConv2d(channels, condition_dim, channels, condition_first=condition_first)
    return [joint, nn.BatchNorm2d(channels), nn.LeakyReLU(LEAKY_SLOPE, inplace=True)]


def _trunk(width: int, size: int) -> tuple[list[tuple[str, nn.Sequential]], int]:
    """Build the named parts of the trunk for images of `size` pixels; returns them and the channels at 4x4."""
    if size not in SIZES:
        raise ValueError(f"no discriminator for images of {size} pixels; allowed are {', '.join(map(str, SIZES))}")
    downs = (size // 4).bit_length() - 1
    first = min(downs, 4)
    layers: list[nn.Module] = [*down_block(3, width, norm=False)]
    for i in range(1, first):
        layers += down_block(width << (i - 1), width << i)
    parts: list[tuple[str, nn.Sequential]] = [(f"img_code_s{2**first}", nn.Sequential(*layers))]
    top = width << (first - 1)
    if downs >= 5:
        parts.append(("img_code_s32", down_block(top, 2 * top)))
    if downs == 5:
        parts.append(("img_code_s32_1", leaky_block(2 * top, top)))
    if downs == 6:
        parts.append(("img_code_s64", down_block(2 * top, 4 * top)))
        parts.append(("img_code_s64_1", leaky_block(4 * top, 2 * top)))
        parts.append(("img_code_s64_2", leaky_block(2 * top, top)))
    return parts, top


class PairDiscriminator(nn.Module):
    """Base of the discriminators of images with conditions."""

    def conditionals(self, features: Tensor, *conditions: Tensor) -> list[Tensor]:
        """Features (N, C, 4, 4), conditions (N, condition_dim) -> logits (N,) for each: real and of this condition?"""
        raise NotImplementedError

    def conditional(self, features: Tensor, condition: Tensor) -> Tensor:
        """`conditionals` for one condition: logits (N,)."""
        return self.conditionals(features, condition)[0]


class Discriminator(PairDiscriminator):
    """The trunk that the discriminators of all trees share; sub-classes add the heads."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        parts, self.channels = _trunk(width, size)
        self.trunk_names = tuple(name for name, _ in parts)
        for name, part in parts:
            self.add_module(name, part)

    def features(self, images: Tensor) -> Tensor:
        """(N, 3, size, size) -> (N, C, 4, 4); C is 8 * width from 64 pixels on."""
        x = images
        for name in self.trunk_names:
            x = self.get_submodule(name)(x)
        return x


class LogitHead(nn.Module):
    """AttnGAN's unconditional head: features (N, C, 4, 4) -> logits (N,)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.outlogits = logit_head(channels)

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.outlogits(features)
        return out


class ConditionalHead(nn.Module):
    """AttnGAN's conditional head: features (N, C, 4, 4), conditions (N, D) -> logits (N,) for each condition."""

    def __init__(self, channels: int, condition_dim: int) -> None:
        super().__init__()
        self.jointConv = JointSequential(*_joint_layers(channels, condition_dim))
        self.outlogits = logit_head(channels)

    def forward(self, features: Tensor, *conditions: Tensor) -> list[Tensor]:
        return [self.outlogits(joint) for joint in self.jointConv(features, *conditions)]


class JointLogitHead(nn.Module):
    """StackGAN's conditional head, with the same shapes."""

    def __init__(self, channels: int, condition_dim: int) -> None:
        super().__init__()
        self.outlogits = JointSequential(*_joint_layers(channels, condition_dim), *logit_head(channels))

    def forward(self, features: Tensor, *conditions: Tensor) -> list[Tensor]:
        out: list[Tensor] = self.outlogits(features, *conditions)
        return out


class StageDiscriminator(PairDiscriminator):
    """Discriminator of one stage of StackGAN (v1); that of stage II also has the unconditional head."""

    def __init__(self, width: int, size: int, condition_dim: int, *, unconditional: bool) -> None:
        super().__init__()
        parts, channels = _trunk(width, size)
        self.encode_img = nn.Sequential(*(layer for _, part in parts for layer in part))
        self.get_cond_logits = JointLogitHead(channels, condition_dim)
        if unconditional:
            self.get_uncond_logits = LogitHead(channels)

    def features(self, images: Tensor) -> Tensor:
        """(N, 3, size, size) -> (N, C, 4, 4)."""
        out: Tensor = self.encode_img(images)
        return out

    def conditionals(self, features: Tensor, *conditions: Tensor) -> list[Tensor]:
        out: list[Tensor] = self.get_cond_logits(features, *conditions)
        return out

    def unconditional(self, features: Tensor) -> Tensor:
        """(N, C, 4, 4) -> logits (N,): real or generated?"""
        out: Tensor = self.get_uncond_logits(features)
        return out


class AttnDiscriminator(Discriminator):
    """Discriminator of AttnGAN and MirrorGAN; that of AttnDCGAN has no unconditional head."""

    def __init__(self, width: int, size: int, condition_dim: int, *, unconditional: bool = True) -> None:
        super().__init__(width, size)
        if unconditional:
            self.UNCOND_DNET = LogitHead(self.channels)
        self.COND_DNET = ConditionalHead(self.channels, condition_dim)

    def conditionals(self, features: Tensor, *conditions: Tensor) -> list[Tensor]:
        out: list[Tensor] = self.COND_DNET(features, *conditions)
        return out

    def unconditional(self, features: Tensor) -> Tensor:
        """(N, C, 4, 4) -> logits (N,): real or generated?"""
        out: Tensor = self.UNCOND_DNET(features)
        return out


class StackDiscriminator(Discriminator):
    """Discriminator of StackGAN-v2; without `condition_dim` it has only the unconditional head.

    As published, that single head is named `logits`, like the conditional head otherwise.

    unconditional: whether it has an unconditional head beside the conditional one.
    """

    def __init__(self, width: int, size: int, condition_dim: int | None, *, unconditional: bool = True) -> None:
        super().__init__(width, size)
        self.is_conditional = condition_dim is not None
        self.logits = logit_head(self.channels)
        if condition_dim is not None:
            self.jointConv = JointSequential(*_joint_layers(self.channels, condition_dim, condition_first=True))
            if unconditional:
                self.uncond_logits = logit_head(self.channels)

    def conditionals(self, features: Tensor, *conditions: Tensor) -> list[Tensor]:
        return [self.logits(joint) for joint in self.jointConv(features, *conditions)]

    def unconditional(self, features: Tensor) -> Tensor:
        """(N, C, 4, 4) -> logits (N,)."""
        out: Tensor = self.uncond_logits(features) if self.is_conditional else self.logits(features)
        return out
