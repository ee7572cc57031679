"""DF-GAN: one stage of deep text-image fusion blocks, and a discriminator that is aware of matching pairs
(Tao et al. 2022).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2idist.contract import Adam, Batch, BuildInfo, Captions, Frozen, NoiseFn, Role, Sample, Train, check_ranges
from t2idist.losses.adversarial import conditional_logits, matching_aware_loss, matching_aware_losses
from t2idist.losses.matching import wrong_pairs
from t2idist.nn.blocks import LEAKY_SLOPE, JointConv2d, JointSequential, UpConv2d, conv3x3
from t2idist.nn.dcgan import num_doublings
from t2idist.nn.discriminators import LogitConv2d, PairDiscriminator
from t2idist.nn.precision import upcast
from t2idist.nn.text_encoders import sentence_encoder
from t2idist.systems import _sentences
from t2idist.systems._options import GanOptions

INIT_SIZE = 4
"""Width and height of the first feature map of the generator and of the last one of the discriminator."""


@dataclass(frozen=True)
class Config(GanOptions):
    """Defaults: the paper's settings, which are the same for CUB and COCO, else the released ones."""

    image_size: int = 256
    """A power of two, at least 16."""
    generator_width: int = 32
    """Channels of the last block, before the image (nf of the released settings)."""
    discriminator_width: int = 32
    """Channels of the first feature map (nf of the released settings)."""
    z_dim: int = 100
    adversarial_loss: Literal["bce", "hinge"] = "hinge"
    """Section 3.2."""
    discriminator_norm: Literal["spectral", "none"] = "none"  # type: ignore[assignment]
    """As published, there is no norm that could be replaced; "spectral": of the weights."""
    ma_gp_weight: float = 2.0
    """k of the matching-aware gradient penalty (section 3.3, eq. 2); its exponent p is 6."""
    generator_lr: float = 1e-4
    """Section 4."""
    discriminator_lr: float = 4e-4
    """Section 4."""
    beta1: float = 0.0
    """Of Adam (section 4)."""
    beta2: float = 0.9
    """Of Adam (section 4)."""
    ema_half_life_images: float | None = None
    """Half-life of the generator's EMA; none: no EMA, as published."""
    unit_text: bool = False
    """Scale sentence vectors by `unit_scale`: an encoder trained on cosines leaves their length arbitrary."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(
            self,
            at_least_1="generator_width discriminator_width z_dim image_size",
            below_1="beta1 beta2",
            above_0="generator_lr discriminator_lr ema_half_life_images",
        )

    def adam_of(self, lr: float) -> Adam:
        """Return the settings of an optimizer with this learning rate."""
        return replace(self.adam(lr), beta1=self.beta1, beta2=self.beta2)


def channels_by_size(width: int, image_size: int) -> list[int]:
    """Return the channels of the feature maps, from `image_size` down to 4x4: doubled each time, at most 8 * width."""
    return [width * min(1 << i, 8) for i in range(num_doublings(image_size) + 1)]


# ------------------------------------------------------------ generator
def _perceptron(condition_dim: int, channels: int, initial: float) -> nn.Sequential:
    """Two linear maps with a ReLU between them; at first the output is `initial` for every condition."""
    last = nn.Linear(channels, channels)
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, initial)
    return nn.Sequential(nn.Linear(condition_dim, channels), nn.ReLU(), last)


class ConditionalAffine(nn.Module):
    """Scale and shift channels by functions of the condition (section 3.4): x (N, C, H, W), condition (N, D)."""

    def __init__(self, condition_dim: int, channels: int) -> None:
        super().__init__()
        self.scale = _perceptron(condition_dim, channels, 1.0)
        self.shift = _perceptron(condition_dim, channels, 0.0)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = (net(condition)[:, :, None, None].to(x.dtype) for net in (self.scale, self.shift))
        out: Tensor = x * scale + shift
        return out


class DeepFusionBlock(nn.Module):
    """DFBlock (section 3.4): two affine transformations, each with a LeakyReLU (as released; the paper: ReLU)."""

    def __init__(self, condition_dim: int, channels: int) -> None:
        super().__init__()
        self.affines = nn.ModuleList(ConditionalAffine(condition_dim, channels) for _ in range(2))
        self.activation = nn.LeakyReLU(LEAKY_SLOPE)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for affine in self.affines:
            x = self.activation(affine(x, condition))
        return x


class FusionUpBlock(nn.Module):
    """UPBlock (section 3.1): (N, channels_in, H, W), condition (N, D) -> (N, channels_out, 2H, 2W).

    Published is nearest upsampling, then fusion, convolution, fusion, convolution, and a shortcut of one 1x1
    convolution. What works on single positions gives the same before the upsampling, at a quarter of the cost.
    """

    def __init__(self, condition_dim: int, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.fusion1 = DeepFusionBlock(condition_dim, channels_in)
        self.conv1 = UpConv2d(channels_in, channels_out, bias=True)
        self.fusion2 = DeepFusionBlock(condition_dim, channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, kernel_size=3, padding=1)
        self.shortcut = _shortcut(channels_in, channels_out)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        residual: Tensor = self.conv1(self.fusion1(x, condition))
        residual = self.conv2(self.fusion2(residual, condition))
        return F.interpolate(self.shortcut(x), scale_factor=2, mode="nearest") + residual


def _shortcut(channels_in: int, channels_out: int) -> nn.Module:
    """1x1 convolution if the number of channels changes."""
    return nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, kernel_size=1)


class FusionGenerator(nn.Module):
    """One-stage generator (section 3.1): z (N, z_dim), sentence (N, text_dim) -> images (N, 3, S, S) in [-1, 1].

    Noise gives the first feature map; noise and sentence together are the condition of every fusion.
    """

    def __init__(self, width: int, image_size: int, z_dim: int, text_dim: int) -> None:
        super().__init__()
        channels = channels_by_size(width, image_size)[::-1]
        self.first = nn.Linear(z_dim, channels[0] * INIT_SIZE**2)
        self.blocks = nn.ModuleList(FusionUpBlock(z_dim + text_dim, a, b) for a, b in pairwise(channels))
        self.image = nn.Sequential(nn.LeakyReLU(LEAKY_SLOPE), nn.Conv2d(width, 3, kernel_size=3, padding=1))

    def forward(self, z: Tensor, sentence: Tensor) -> Tensor:
        condition = torch.cat([z, sentence.to(z.dtype)], dim=1)
        x: Tensor = self.first(z).unflatten(1, (-1, INIT_SIZE, INIT_SIZE))
        for block in self.blocks:
            x = block(x, condition)
        return torch.tanh(upcast(self.image(x)))


# ------------------------------------------------------------ discriminator
class DownBlock(nn.Module):
    """Downsampling residual block (section 3.1): (N, channels_in, H, W) -> (N, channels_out, H/2, W/2).

    As released, the residual is scaled by a learnt factor, 0 at first. The shortcut is averaged before its 1x1
    convolution, which gives the same as after it.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, kernel_size=4, stride=2, padding=1, bias=False),
            nn.LeakyReLU(LEAKY_SLOPE),
            conv3x3(channels_out, channels_out),
            nn.LeakyReLU(LEAKY_SLOPE),
        )
        self.shortcut = _shortcut(channels_in, channels_out)
        self.factor = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.residual(x)
        out: Tensor = self.shortcut(F.avg_pool2d(x, 2)) + self.factor.to(residual.dtype) * residual
        return out


class OneWayDiscriminator(PairDiscriminator):
    """Target-aware discriminator with one-way output (section 3.3): there is no unconditional head."""

    def __init__(self, width: int, image_size: int, text_dim: int) -> None:
        super().__init__()
        channels = channels_by_size(width, image_size)
        self.first = nn.Conv2d(3, width, kernel_size=3, padding=1)
        self.blocks = nn.Sequential(*(DownBlock(a, b) for a, b in pairwise(channels)))
        self.logit = JointSequential(
            JointConv2d(channels[-1], text_dim, 2 * width),
            nn.LeakyReLU(LEAKY_SLOPE),
            LogitConv2d(2 * width, bias=False),
        )

    def features(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, C, 4, 4); C is 8 * width from 32 pixels on."""
        out: Tensor = self.blocks(self.first(images))
        return out

    def conditionals(self, features: Tensor, *conditions: Tensor) -> list[Tensor]:
        out: list[Tensor] = self.logit(features, *conditions)
        return out


# ------------------------------------------------------------ system
class DfGan:
    """The system. Exports: "generator" and, with an encoder of captions, "text"."""

    def __init__(self, config: Config, info: BuildInfo) -> None:
        self.config = config
        self.sizes = (config.image_size,)
        encoder, text_dim = sentence_encoder(info.sources, info.vocabulary_size, info.data.vector_dim)
        self.frozen = {} if encoder is None else {"text": Frozen(encoder, "text", "text")}
        self.exports = ("generator", *self.frozen)
        generator = FusionGenerator(config.generator_width, config.image_size, config.z_dim, text_dim)
        discriminator = OneWayDiscriminator(config.discriminator_width, config.image_size, text_dim)
        config.finish_discriminator(discriminator, None)
        generator_adam, discriminator_adam = map(config.adam_of, (config.generator_lr, config.discriminator_lr))
        half_life = config.ema_half_life_images
        self.roles = {
            "generator": Role(generator, generator_adam, half_life, ema_rampup=config.ema_rampup),
            "discriminator": Role(discriminator, discriminator_adam),
        }
        self.memory = config.memory_of(self.roles)

    def step(self, batch: Batch, train: Train) -> None:
        real, options = batch.images[-1], self.config
        sentence = _sentences.for_step(batch.captions, train, self.frozen, options.unit_text)
        fake = train.forward("generator", _generate, train.noise(options.z_dim), sentence)
        pairs = wrong_pairs(batch.class_ids, batch.groups)
        options.update_discriminator(
            train, "discriminator", matching_aware_losses, matching_aware_loss, conditional_logits, real, fake,
            sentence, pairs, batch.groups,
        )  # fmt: skip
        adversarial = options.adversarial_loss_of(
            train, "discriminator", conditional_logits, fake, real, batch.groups, sentence
        )
        train.report("generator/adversarial", adversarial)
        train.apply("generator", adversarial)

    def sample(self, nets: Mapping[str, nn.Module], captions: Captions, noise: NoiseFn) -> Sample:
        z, sentence = noise(self.config.z_dim), _sentences.for_sample(captions, nets, self.config.unit_text)
        return Sample((_generate(nets["generator"], z, sentence),))


def _generate(net: nn.Module, z: Tensor, sentence: Tensor) -> Tensor:
    images: Tensor = net(z, sentence)
    return images


def build(config: Config, info: BuildInfo) -> DfGan:
    """Build the system with new weights. Raises ValueError, naming the key, if the config is invalid."""
    info.require_pairs("df_gan")
    return DfGan(config, info)
