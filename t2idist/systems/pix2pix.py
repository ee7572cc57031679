"""Pix2pix: translation learnt from pairs of images, by a conditional GAN and L1 (Isola et al. 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from t2idist.contract import Batch, BuildInfo, Frozen, Role, Train, check_ranges
from t2idist.losses.adversarial import half_loss, patch_losses
from t2idist.nn.image_translation import PatchGan, ResnetGenerator, UnetGenerator, patch_logits
from t2idist.nn.init import normal_
from t2idist.systems._options import GanOptions


@dataclass(frozen=True)
class Config(GanOptions):
    """Defaults: the paper's settings for 256 pixels and facades (appendix 6.2)."""

    direction: Literal["a_to_b", "b_to_a"] = "a_to_b"
    """Which image of a pair is made from the other; facades are b_to_a, as released."""
    domains: tuple[str, ...] = ("A", "B")
    """Names of the first and second images of the pairs, for messages and figures."""
    image_size: int = 256
    generator: Literal["unet", "resnet"] = "unet"
    generator_width: int = 64
    """Appendix 6.1.1: C64."""
    generator_norm: Literal["instance", "batch"] = "instance"
    """"instance": each image by its own statistics, as the paper's batches of one image do ("batch size 1", section
    3.4); "batch": a group by its statistics, and by their average after the training."""
    residuals: int = 9
    """Residual blocks of the generator "resnet", as released."""
    dropout: bool = True
    """In the generator (section 3.4), in training; `translate` draws without, so that an image has one result."""
    discriminator_width: int = 64
    discriminator_layers: int = 3
    """Strided convolutions; 3 for patches of 70x70 pixels (section 4.4)."""
    l1_weight: float = 100.0
    """lambda, appendix 6.2 and eq. 4."""
    generator_lr: float = 2e-4
    discriminator_lr: float = 2e-4
    ema_half_life_images: float | None = None
    """Half-life of the generator's EMA; none: no EMA, as published."""
    decay_start_images: float = 40_000.0
    """As released: constant for 100 epochs; facades has 400 pairs."""
    decay_end_images: float = 80_000.0
    """As released: linear to zero over the next 100 epochs; should be the stage's budget."""
    decay_floor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = "image_size generator_width discriminator_width discriminator_layers"
        rates = "generator_lr discriminator_lr ema_half_life_images"
        check_ranges(self, at_least_1=sizes, at_least_0="residuals l1_weight", above_0=rates)
        if len(self.domains) != 2:
            raise ValueError(f"domains: {', '.join(self.domains) or 'none'}; give two names")


class Pix2Pix:
    """The system. Exports: "generator"."""

    paired = True

    def __init__(self, config: Config) -> None:
        self.config = config
        self.domains = config.domains[0], config.domains[1]
        self.targets = (1,) if config.direction == "a_to_b" else (0,)
        self.sizes = (config.image_size,)
        generator = _build_generator(config)
        normal_(generator)
        norm = "instance" if config.discriminator_norm == "instance" else "batch"
        discriminator = PatchGan(6, config.discriminator_width, config.discriminator_layers, norm)
        config.finish_discriminator(discriminator, normal_)
        self.roles = {
            "generator": Role(
                generator,
                config.adam(config.generator_lr),
                config.ema_half_life_images,
                ema_rampup=config.ema_rampup,
            ),
            "discriminator": Role(discriminator, config.adam(config.discriminator_lr)),
        }
        self.frozen: dict[str, Frozen] = {}
        self.exports = ("generator",)
        self.memory = config.memory_of(self.roles)

    def step(self, batch: Batch, train: Train) -> None:
        given, wanted = batch.images[-1], batch.partners[-1]
        if self.targets == (0,):
            given, wanted = wanted, given
        made = train.forward("generator", _generate, given)
        real, fake = torch.cat([given, wanted], dim=1), torch.cat([given, made], dim=1)  # (N, 6, S, S)
        self.config.update_discriminator(train, "discriminator", patch_losses, half_loss, patch_logits, real, fake)
        adversarial = self.config.adversarial_loss_of(train, "discriminator", patch_logits, fake, real, batch.groups)
        l1 = (made - wanted).abs().mean()
        train.report("generator/adversarial", adversarial)
        train.report("generator/l1", l1)
        train.apply("generator", adversarial + self.config.l1_weight * l1)

    def to_domain(self, nets: Mapping[str, nn.Module], images: Tensor, target: int) -> Tensor:
        assert target in self.targets, f"{target} is not among {self.targets}"
        return _generate(nets["generator"], images)


def _generate(net: nn.Module, images: Tensor) -> Tensor:
    out: Tensor = net(images)
    return out


def _build_generator(config: Config) -> nn.Module:
    """Build the generator. Raises ValueError if it does not fit the size of the images."""
    norm = "affine" if config.generator_norm == "instance" else "batch"
    if config.generator == "resnet":
        if config.image_size % 4:
            raise ValueError(f"image_size is {config.image_size}; the generator resnet needs a multiple of 4")
        return ResnetGenerator(config.generator_width, config.residuals, norm, dropout=config.dropout)
    levels = config.image_size.bit_length() - 1
    if config.image_size != 2**levels or levels < 2:
        raise ValueError(f"image_size is {config.image_size}; the generator unet needs a power of 2, at least 4")
    return UnetGenerator(config.generator_width, levels, norm, dropout=config.dropout)


def build(config: Config, info: BuildInfo) -> Pix2Pix:
    """Build the system with new weights. Raises ValueError, naming the key, if the config is invalid."""
    if not info.data.paired and info.data.attributes:
        raise ValueError(
            "pix2pix learns from pairs of images, and the data has none; make it by tools/shard_folder.py --pairs, or "
            "draw the first images from the second ones by data.outlines=true"
        )
    return Pix2Pix(config)
