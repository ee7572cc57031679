"""The networks of DCGAN, with and without captions; parameter names follow the GAN-CLS port in PyTorch.

From 4x4 on, every generator layer doubles the size and halves the channels, down to `width` channels before the image.
With captions there are two layouts: the plain one, and the residual one released by Reed et al., with bottleneck blocks
at the two lowest sizes of the generator and at 4x4 in the discriminator. Convolutions have no biases: BatchNorm cancels
them, and Reed's code sets them to zero before every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from t2idist.nn.blocks import LEAKY_SLOPE, SkipExcitation, conv3x3, down_block, tile
from t2idist.nn.discriminators import LogitConv2d, PairDiscriminator

MIN_IMAGE_SIZE = 16


def num_doublings(image_size: int) -> int:
    """Return the number of doublings from 4x4 to `image_size`. Raises ValueError if there is none."""
    if image_size < MIN_IMAGE_SIZE or image_size & (image_size - 1):
        raise ValueError(f"image_size is {image_size}; it must be a power of two, at least {MIN_IMAGE_SIZE}")
    return (image_size // 4).bit_length() - 1


class InitConv(nn.ConvTranspose2d):
    """4x4 transposed convolution of a 1x1 map, computed as a faster linear map: (N, C) -> (N, channels_out, 4, 4)."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, kernel_size=4, bias=False)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return (x @ self.weight.flatten(1)).view(-1, self.out_channels, 4, 4)


class BottleneckResidual(nn.Module):
    """x + BN(conv3x3(act(BN(conv3x3(act(BN(conv1x1(x)))))))) with a quarter of the channels inside."""

    def __init__(self, channels: int, activation: nn.Module) -> None:
        super().__init__()
        inner = max(channels // 4, 1)
        self.block = nn.Sequential(
            nn.Conv2d(channels, inner, kernel_size=1, bias=False),
            nn.BatchNorm2d(inner),
            activation,
            conv3x3(inner, inner),
            nn.BatchNorm2d(inner),
            activation,
            conv3x3(inner, channels),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.block(x)
        return out


def text_projection(text_dim: int, condition_dim: int, norm: bool) -> nn.Sequential:
    """Sentence vectors (N, text_dim) -> (N, condition_dim): linear (+ BatchNorm) + LeakyReLU."""
    linear = nn.Linear(text_dim, condition_dim)
    activation = nn.LeakyReLU(LEAKY_SLOPE, inplace=True)
    if not norm:
        return nn.Sequential(linear, activation)
    # BatchNorm cancels the bias: its gradient is rounding noise, which Adam would scale up to full steps.
    linear.bias.requires_grad_(False)
    return nn.Sequential(linear, nn.BatchNorm1d(condition_dim), activation)


class DcganGenerator(nn.Module):
    """z (N, z_dim) and, with text_dim, sentence vectors (N, text_dim) -> images (N, 3, S, S) in [-1, 1].

    The plain layout puts the text before z and normalises it; the residual one puts z first and does not.

    skip_excitation: scale the last map by the first one (`SkipExcitation`).
    """

    def __init__(
        self,
        *,
        width: int,
        image_size: int,
        z_dim: int,
        text_dim: int | None = None,
        condition_dim: int = 0,
        residual: bool = False,
        skip_excitation: bool = False,
    ) -> None:
        super().__init__()
        self.text_first = not residual
        inputs = z_dim
        if text_dim is not None:
            self.projection = text_projection(text_dim, condition_dim, norm=not residual)
            inputs += condition_dim
        channels = [width << i for i in reversed(range(num_doublings(image_size)))]
        layers: list[nn.Module] = [InitConv(inputs, channels[0])]
        for i, (inner, outer) in enumerate(pairwise([*channels, 3])):
            layers.append(nn.BatchNorm2d(inner))
            if residual and i < 2:
                layers.append(BottleneckResidual(inner, nn.ReLU(inplace=True)))
            layers += [nn.ReLU(inplace=True), nn.ConvTranspose2d(inner, outer, 4, stride=2, padding=1, bias=False)]
        self.netG = nn.Sequential(*layers, nn.Tanh())
        self.excite = SkipExcitation(channels[0], channels[-1]) if skip_excitation else None

    def forward(self, z: Tensor, text: Tensor | None = None) -> Tensor:
        seed = z
        if text is not None:
            condition = self.projection(text)
            seed = torch.cat([condition, z] if self.text_first else [z, condition], dim=1)
        if self.excite is None:
            out: Tensor = self.netG(seed)
            return out
        first = self.netG[0](seed)
        last = self.excite(first, self.netG[1:-2](first))
        image: Tensor = self.netG[-2:](last)
        return image


def trunk(
    width: int, image_size: int, *, residual: bool = False, second_last_activation: bool = True
) -> tuple[nn.Sequential, int]:
    """Build the layers from images (N, 3, S, S) to features (N, C, 4, 4); returns them and C.

    second_last_activation: see `DcganDiscriminator`.
    """
    channels = [3, *(width << i for i in range(num_doublings(image_size)))]
    last = len(channels) - 2
    layers: list[nn.Module] = []
    for i, (channels_in, channels_out) in enumerate(pairwise(channels)):
        *layer, activation = down_block(channels_in, channels_out, norm=i > 0)
        layers += layer
        if residual and i == last:
            layers.append(BottleneckResidual(channels_out, nn.LeakyReLU(LEAKY_SLOPE, inplace=True)))
        if second_last_activation or i != last - 1 or i == 0:
            layers.append(activation)
    return nn.Sequential(*layers), channels[-1]


class DcganDiscriminator(PairDiscriminator):
    """Images (N, 3, S, S) and, with text_dim, sentence vectors (N, text_dim) -> logits (N,).

    Args:
        text_norm: BatchNorm after the text's linear map.
        joins: Join image and text by a 1x1 convolution and a LeakyReLU before the logit (Reed et al., section 4.1).
            The port does not: its logit is a term of the image plus a term of the text, so it cannot tell mismatched
            pairs from matching ones.
        second_last_activation: LeakyReLU after the last but one BatchNorm of the trunk; Reed's GAN-INT-CLS script has
            none.
    """

    def __init__(
        self,
        *,
        width: int,
        image_size: int,
        text_dim: int | None = None,
        condition_dim: int = 0,
        residual: bool = False,
        text_norm: bool = True,
        joins: bool = True,
        second_last_activation: bool = True,
    ) -> None:
        super().__init__()
        self.netD_1, channels = trunk(
            width, image_size, residual=residual, second_last_activation=second_last_activation
        )
        if text_dim is None:
            self.netD_2 = nn.Sequential(LogitConv2d(channels, bias=False))
            return
        self.projector = nn.ModuleDict({"projection": text_projection(text_dim, condition_dim, text_norm)})
        joint_channels = channels + condition_dim
        if not joins:
            self.netD_2 = nn.Sequential(LogitConv2d(joint_channels, bias=False))
            return
        self.netD_2 = nn.Sequential(
            nn.Conv2d(joint_channels, channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.LeakyReLU(LEAKY_SLOPE, inplace=True),
            LogitConv2d(channels, bias=False),
        )

    def features(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, C, 4, 4)."""
        out: Tensor = self.netD_1(images)
        return out

    def conditionals(self, features: Tensor, *conditions: Tensor) -> list[Tensor]:
        """Features (N, C, 4, 4) and sentence vectors (N, text_dim) -> logits (N,) for each."""
        tiles = (tile(self.projector["projection"](condition), features) for condition in conditions)
        return [self.netD_2(torch.cat([features, tiled], dim=1)) for tiled in tiles]

    def forward(self, images: Tensor, text: Tensor | None = None) -> Tensor:
        features = self.features(images)
        if text is not None:
            return self.conditional(features, text)
        out: Tensor = self.netD_2(features)
        return out


def conditional_generator(config: Mapping[str, Any], text_dim: int, residual: bool) -> DcganGenerator:
    """Build the conditional generator of a `gan_cls` or `dcgan` stage with this config, with new weights."""
    return DcganGenerator(
        width=config["generator_width"],
        image_size=config["image_size"],
        z_dim=config["z_dim"],
        text_dim=text_dim,
        condition_dim=config["condition_dim"],
        residual=residual,
        skip_excitation=config.get("skip_excitation", False),  # exports of older versions lack it
    )


def generator_from_export(export: Mapping[str, Any], text_dim: int) -> DcganGenerator:
    """Build the conditional generator of an export, given its index (``{"system", "config", "plan", ...}``).

    Raises ValueError if the export's system has none.
    """
    system, config = export["system"], export["config"]
    if system == "gan_cls":
        return conditional_generator(config, text_dim, config["residual"])
    if system == "dcgan" and config["conditional"]:
        return conditional_generator(config, text_dim, residual=False)
    without = " without captions" if system == "dcgan" else ""
    raise ValueError(
        f"uses.generator: the export is of system '{system}'{without}; it must be of 'gan_cls', or of 'dcgan' with "
        "conditional: true"
    )
