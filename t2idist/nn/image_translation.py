"""Generators and discriminator of CycleGAN and pix2pix; parameter names are those of the released networks.

Zhu et al. 2017 (appendix, section 7.2) and Isola et al. 2017 (appendix, section 6.1), in the layouts that were released
for PyTorch.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from t2idist.nn.blocks import LEAKY_SLOPE
from t2idist.nn.precision import upcast
from t2idist.nn.stargan import ConditionalInstanceNorm2d

DROPOUT = 0.5
"""Of pix2pix's generator (appendix 6.1.1) and of residual blocks with dropout."""
MAX_WIDTHS = 8
"""Largest number of channels, as a multiple of the width of the first layer."""


def norm_layer(kind: str, channels: int) -> nn.Module:
    """Return a normalisation of (N, channels, H, W).

    Args:
        kind: "instance": by each image's own statistics, without weights (CycleGAN). "affine": likewise, with the
            weights and the unused running averages of a BatchNorm: what a BatchNorm is in groups of one image, if it
            draws with the statistics of the test batch, as pix2pix does. "batch": BatchNorm.
    """
    if kind == "instance":
        return nn.InstanceNorm2d(channels)
    return ConditionalInstanceNorm2d(channels) if kind == "affine" else nn.BatchNorm2d(channels)


def _has_bias(norm: str) -> bool:
    """Return whether convolutions before a norm have a bias, as released: only before the one without weights."""
    return norm == "instance"


def _freeze_unused_biases(net: nn.Module) -> None:
    """Freeze the biases that an instance norm removes: their gradient is rounding noise, which Adam would amplify."""
    for layers in net.modules():
        if isinstance(layers, nn.Sequential):
            for before, after in itertools.pairwise(layers):
                is_convolution = isinstance(before, nn.Conv2d | nn.ConvTranspose2d) and before.bias is not None
                if is_convolution and isinstance(after, nn.InstanceNorm2d):
                    before.bias.requires_grad_(False)


class ResnetBlock(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))), with reflection padding and without a final activation."""

    def __init__(self, channels: int, norm: str, dropout: bool = False) -> None:
        super().__init__()
        half = [
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3, bias=_has_bias(norm)),
            norm_layer(norm, channels),
        ]
        drop = [nn.Dropout(DROPOUT)] if dropout else []
        other = [
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3, bias=_has_bias(norm)),
            norm_layer(norm, channels),
        ]
        self.conv_block = nn.Sequential(*half, nn.ReLU(inplace=True), *drop, *other)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv_block(x)
        return out


class ResnetGenerator(nn.Module):
    """Images (N, 3, S, S) -> images (N, 3, S, S) in [-1, 1]; S is a multiple of 4.

    c7s1-64, d128, d256, R256 for each residual block, u128, u64, c7s1-3 in the paper's notation, if `width` is 64.
    """

    def __init__(self, width: int, residuals: int, norm: str = "instance", *, dropout: bool = False) -> None:
        super().__init__()
        bias = _has_bias(norm)
        layers: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7, bias=bias)]
        layers += [norm_layer(norm, width), nn.ReLU(inplace=True)]
        for channels in (width, 2 * width):
            layers.append(nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=bias))
            layers += [norm_layer(norm, 2 * channels), nn.ReLU(inplace=True)]
        layers += [ResnetBlock(4 * width, norm, dropout) for _ in range(residuals)]
        for channels in (4 * width, 2 * width):
            layers.append(nn.ConvTranspose2d(channels, channels // 2, 3, 2, 1, output_padding=1, bias=bias))
            layers += [norm_layer(norm, channels // 2), nn.ReLU(inplace=True)]
        self.model = nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7))
        _freeze_unused_biases(self)

    def forward(self, images: Tensor) -> Tensor:
        return torch.tanh(upcast(self.model(images))).contiguous()


class _UnetLevel(nn.Module):
    """A level of the U-Net: down, the levels below it, and up; the input is joined to the output but at the top.

    Args:
        outside: Channels of the input and, above the top level, of the output.
        inside: Channels at half the size.
        below: The levels below; None: this is the lowest one.
        top: This is the highest level: without norms and without the join.
    """

    def __init__(
        self, outside: int, inside: int, below: nn.Module | None, norm: str, *, top: bool = False, dropout: bool = False
    ) -> None:
        super().__init__()
        self.top = top
        bias = _has_bias(norm)
        down = nn.Conv2d(outside, inside, 4, 2, 1, bias=bias)
        coming_up = inside if below is None else 2 * inside
        up = nn.ConvTranspose2d(coming_up, outside, 4, 2, 1, bias=bias or top)
        leaky, relu = nn.LeakyReLU(LEAKY_SLOPE), nn.ReLU(inplace=True)
        layers: list[nn.Module]
        if top:
            assert below is not None, "a U-Net has at least two levels"
            layers = [down, below, relu, up]
        elif below is None:
            layers = [leaky, down, relu, up, norm_layer(norm, outside)]
        else:
            layers = [leaky, down, norm_layer(norm, inside), below, relu, up, norm_layer(norm, outside)]
        self.model = nn.Sequential(*layers, *([nn.Dropout(DROPOUT)] if dropout else []))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x)
        return out if self.top else torch.cat([x, out], dim=1)


class UnetGenerator(nn.Module):
    """Images (N, 3, S, S) -> images (N, 3, S, S) in [-1, 1]; S is a multiple of 2**levels.

    Args:
        width: Channels of the first level; they double with each level, up to `MAX_WIDTHS` times as many.
        levels: How often the size is halved: 8 for 256 pixels, down to 1x1.
        dropout: In the levels of the widest inputs but the lowest, three of eight.
    """

    def __init__(self, width: int, levels: int, norm: str = "affine", *, dropout: bool = True) -> None:
        super().__init__()
        channels = [width * min(2**level, MAX_WIDTHS) for level in range(levels)]
        net: nn.Module | None = None
        for level in reversed(range(1, levels)):
            widest = channels[level - 1] == width * MAX_WIDTHS and net is not None
            net = _UnetLevel(channels[level - 1], channels[level], net, norm, dropout=dropout and widest)
        self.model = _UnetLevel(3, channels[0], net, norm, top=True)
        _freeze_unused_biases(self)

    def forward(self, images: Tensor) -> Tensor:
        return torch.tanh(upcast(self.model(images))).contiguous()


class PatchGan(nn.Module):
    """Images (N, channels, S, S) -> logits (N, 1, P, P), one for each overlapping patch.

    Args:
        channels: 3, or 6 for an image joined to the one that it was made from.
        layers: Strided convolutions; 3 for patches of 70x70 pixels.
    """

    def __init__(self, channels: int, width: int, layers: int, norm: str) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(LEAKY_SLOPE, inplace=True)]
        before = width
        for layer in range(1, layers + 1):
            after, stride = width * min(2**layer, MAX_WIDTHS), 2 if layer < layers else 1
            parts.append(nn.Conv2d(before, after, 4, stride, 1, bias=_has_bias(norm)))
            parts += [norm_layer(norm, after), nn.LeakyReLU(LEAKY_SLOPE, inplace=True)]
            before = after
        self.model = nn.Sequential(*parts, nn.Conv2d(before, 1, 4, 1, 1))
        _freeze_unused_biases(self)

    def forward(self, images: Tensor) -> Tensor:
        return upcast(self.model(images))


def patch_logits(net: PatchGan, images: Tensor) -> list[Tensor]:
    """Logits (N * P * P,) of all patches of images (N, C, S, S), in the order of the images."""
    return [net(images).flatten()]
