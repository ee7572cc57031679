"""The generators of StackGAN (v1): stage I from noise and text, stage II refines to a larger image.

Widths are those of the paper, whose images have 64 and 256 pixels; other sizes have fewer or more upsampling blocks.
Parameter names are the published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from t2idist.nn.blocks import JointConv2d, JointSequential, SkipExcitation, UpConv2d, conv3x3
from t2idist.nn.conditioning import LinearConditioning
from t2idist.nn.precision import upcast
from t2idist.nn.tree import INIT_SIZE, GeneratorOutput


def _norm_relu(conv: nn.Conv2d) -> list[nn.Module]:
    return [conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU(inplace=True)]


def _downsample(channels_in: int, channels_out: int) -> list[nn.Module]:
    """4x4 stride-2 convolution + BatchNorm + ReLU: (N, C, H, W) -> (N, channels_out, H/2, W/2)."""
    return _norm_relu(nn.Conv2d(channels_in, channels_out, kernel_size=4, stride=2, padding=1, bias=False))


def _upsample(channels_in: int, channels_out: int) -> nn.Sequential:
    """Nearest x2 + conv3x3 + BatchNorm + ReLU: (N, C, H, W) -> (N, channels_out, 2H, 2W)."""
    return nn.Sequential(nn.Identity(), *_norm_relu(UpConv2d(channels_in, channels_out)))


def num_doublings(size: int, image_size: int) -> int:
    """Return the number of doublings from `size` to `image_size`."""
    return (image_size // size).bit_length() - 1


class Upsampler(nn.Module):
    """Common end of both generators: `ups` upsampling blocks, each halving the channels, and the image layer.

    skip_excitation: scale the last map by the one before the upsampling, averaged to 4x4 (`SkipExcitation`).
    """

    def __init__(self, channels: int, ups: int, skip_excitation: bool) -> None:
        super().__init__()
        self.ups = ups
        for i in range(ups):
            setattr(self, f"upsample{i + 1}", _upsample(channels >> i, channels >> (i + 1)))
        self.img = nn.Sequential(conv3x3(channels >> ups, 3))
        self.excite = SkipExcitation(channels, channels >> ups) if skip_excitation else None

    def image(self, features: Tensor) -> Tensor:
        """(N, channels, S, S) -> (N, 3, S << ups, S << ups) in [-1, 1], in float32 at least."""
        first = features
        for i in range(self.ups):
            features = self.get_submodule(f"upsample{i + 1}")(features)
        if self.excite is not None:
            blocks = first.unflatten(3, (INIT_SIZE, -1)).unflatten(2, (INIT_SIZE, -1))
            features = self.excite(blocks.mean((3, 5)), features)
        return torch.tanh(upcast(self.img(features)))


class StageOneGenerator(Upsampler):
    """Stage-I generator (StackGAN, section 3.3): z (N, z_dim), normal (N, condition_dim), text (N, text_dim).

    The last features have width / 2 channels. compat: see `LinearConditioning`.
    """

    def __init__(
        self,
        *,
        width: int,
        image_size: int,
        z_dim: int,
        text_dim: int,
        condition_dim: int,
        compat: str,
        skip_excitation: bool = False,
    ) -> None:
        ups = num_doublings(INIT_SIZE, image_size)
        channels = (width // 2) << ups
        super().__init__(channels, ups, skip_excitation)
        units = channels * INIT_SIZE * INIT_SIZE
        self.ca_net = LinearConditioning(text_dim, condition_dim, compat)
        self.fc = nn.Sequential(
            nn.Linear(z_dim + condition_dim, units, bias=False), nn.BatchNorm1d(units), nn.ReLU(inplace=True)
        )

    def forward(self, z: Tensor, normal: Tensor, text: Tensor) -> GeneratorOutput:
        condition, mean, log_variance = self.ca_net(text, normal)
        seed = self.fc(torch.cat([z, condition], dim=1))
        return GeneratorOutput((self.image(seed.view(seed.shape[0], -1, INIT_SIZE, INIT_SIZE)),), mean, log_variance)


def stage_one_generator(config: Mapping[str, Any], text_dim: int) -> StageOneGenerator:
    """Build the generator of a `stackgan` stage 1 with this config, with new weights."""
    return StageOneGenerator(
        width=config["generator_width"],
        image_size=config["image_size"],
        z_dim=config["z_dim"],
        text_dim=text_dim,
        condition_dim=config["condition_dim"],
        compat=config["compat"],
        skip_excitation=config.get("skip_excitation", False),  # exports of older versions lack it
    )


class ReLUResidual(nn.Module):
    """relu(x + BN(conv(relu(BN(conv(x))))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            *_norm_relu(conv3x3(channels, channels)), conv3x3(channels, channels), nn.BatchNorm2d(channels)
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(x + self.block(x))
        return out


class StageTwoGenerator(Upsampler):
    """Stage-II generator (StackGAN, section 3.4): a small image and the condition to a large image.

    forward(low (N, 3, low_size, low_size), normal (N, condition_dim), text (N, text_dim)). The small image is
    downsampled to a quarter of its size and 4 * width channels, joined with the condition, and refined by residual
    blocks.
    """

    def __init__(
        self,
        *,
        width: int,
        low_size: int,
        image_size: int,
        residuals: int,
        text_dim: int,
        condition_dim: int,
        compat: str,
        skip_excitation: bool = False,
    ) -> None:
        channels = 4 * width
        super().__init__(channels, num_doublings(low_size // 4, image_size), skip_excitation)
        self.ca_net = LinearConditioning(text_dim, condition_dim, compat)
        self.encoder = nn.Sequential(
            conv3x3(3, width), nn.ReLU(inplace=True), *_downsample(width, 2 * width), *_downsample(2 * width, channels)
        )
        self.hr_joint = JointSequential(*_norm_relu(JointConv2d(channels, condition_dim, channels)))
        self.residual = nn.Sequential(*(ReLUResidual(channels) for _ in range(residuals)))

    def forward(self, low: Tensor, normal: Tensor, text: Tensor) -> GeneratorOutput:
        condition, mean, log_variance = self.ca_net(text, normal)
        features = self.encoder(low)
        (joint,) = self.hr_joint(features, condition)
        return GeneratorOutput((self.image(self.residual(joint)),), mean, log_variance)
