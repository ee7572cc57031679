"""GAN-CLS, GAN-INT and GAN-INT-CLS: a DCGAN of captions, with mismatched pairs and interpolated text
(Reed et al. 2016).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from t2idist.contract import (
    Batch,
    BuildInfo,
    Captions,
    Frozen,
    NoiseFn,
    Role,
    Sample,
    Schedule,
    Train,
    check_ranges,
)
from t2idist.losses.adversarial import (
    PairLosses,
    conditional_logits,
    matching_aware_loss,
    matching_aware_losses,
)
from t2idist.losses.matching import wrong_pairs
from t2idist.nn.dcgan import DcganDiscriminator, conditional_generator
from t2idist.nn.init import normal_
from t2idist.nn.text_encoders import sentence_encoder
from t2idist.systems import _sentences
from t2idist.systems._options import GanOptions


@dataclass(frozen=True)
class Config(GanOptions):
    """Defaults: GAN-INT-CLS with the paper's settings for CUB, else the released ones."""

    image_size: int = 64
    """A power of two, at least 16."""
    generator_width: int = 128
    """ngf; 196 for COCO."""
    discriminator_width: int = 64
    """ndf; 196 for COCO."""
    residual: bool = True
    """With the bottleneck blocks of the released Lua code; false: a plain DCGAN, as the PyTorch port (widths 64)."""
    z_dim: int = 100
    condition_dim: int = 128
    """Dimensions that sentence vectors are projected to (section 5)."""
    text_norm: bool = True
    """BatchNorm after that projection in the discriminator; the released CUB script and the port have it, COCO not."""
    matching_aware: bool = True
    """GAN-CLS: the discriminator also learns from real images with wrong captions."""
    interpolate: bool = True
    """GAN-INT: the generator also learns from interpolations of two captions of its group."""
    beta: float = 0.5
    """Share of the own caption in an interpolation (section 4.3)."""
    interpolation_weight: float = 1.0
    generator_lr: float = 2e-4
    discriminator_lr: float = 2e-4
    lr_factor: float = 0.5
    """Released code."""
    lr_every_epochs: float = 100.0
    """Epochs between two decays; 40 for COCO."""
    ema_half_life_images: float | None = None
    """Half-life of the generator's EMA; none: no EMA, as published."""
    unit_text: bool = False
    """Scale sentence vectors by `unit_scale`: an encoder trained on cosines leaves their length arbitrary."""
    skip_excitation: bool = False
    """Let the generator's first map scale its last one (FastGAN)."""
    compat: Literal["", "authors"] = ""
    """"authors": the released GAN-INT-CLS script, which lacks a LeakyReLU in the residual discriminator and averages
    the generator's loss over captions and half as many interpolations; without `residual`: the port's weights, whose
    discriminator never joins image and text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(
            self,
            at_least_1="generator_width discriminator_width z_dim condition_dim image_size",
            at_least_0="interpolation_weight",
            share="beta",
            above_0="generator_lr discriminator_lr lr_factor lr_every_epochs ema_half_life_images",
        )
        if self.relativistic and self.compat == "authors" and not self.residual:
            raise ValueError("relativistic: the text of the port's discriminator cancels out of differences of logits")


class GanCls:
    """The system. Exports: "generator" and, with an encoder of captions, "text"."""

    def __init__(self, config: Config, info: BuildInfo) -> None:
        self.config = config
        self.sizes = (config.image_size,)
        encoder, text_dim = sentence_encoder(info.sources, info.vocabulary_size, info.data.vector_dim)
        self.frozen = {} if encoder is None else {"text": Frozen(encoder, "text", "text")}
        generator = conditional_generator(asdict(config), text_dim, config.residual)
        released = config.compat == "authors"
        discriminator = DcganDiscriminator(
            width=config.discriminator_width,
            image_size=config.image_size,
            text_dim=text_dim,
            condition_dim=config.condition_dim,
            residual=config.residual,
            text_norm=config.text_norm,
            joins=config.residual or not released,
            second_last_activation=not (config.residual and config.interpolate and released),
        )
        normal_(generator)
        config.finish_discriminator(discriminator, normal_)
        every_images = config.lr_every_epochs * info.data.epoch_images
        schedule = Schedule("exponential", factor=config.lr_factor, every_images=every_images)
        self.roles = {
            "generator": Role(
                generator,
                config.adam(config.generator_lr, schedule),
                config.ema_half_life_images,
                ema_rampup=config.ema_rampup,
            ),
            "discriminator": Role(discriminator, config.adam(config.discriminator_lr, schedule)),
        }
        self.exports = ("generator", *self.frozen)
        self.memory = config.memory_of(self.roles)

    def step(self, batch: Batch, train: Train) -> None:
        text = _sentences.for_step(batch.captions, train, self.frozen, self.config.unit_text)
        pairs = wrong_pairs(batch.class_ids, batch.groups)
        texts, noises = [text], [train.noise(self.config.z_dim)]
        if self.config.interpolate:
            texts.append(torch.lerp(text[pairs.caption], text, self.config.beta))
            noises.append(train.noise(self.config.z_dim))
        fakes = train.forward("generator", _generate, noises, texts)
        self.config.update_discriminator(
            train, "discriminator", matching_aware_losses, self._discriminator_loss, conditional_logits,
            batch.images[-1], fakes[0], text, pairs, batch.groups,
        )  # fmt: skip
        adversarial = [
            self.config.adversarial_loss_of(
                train, "discriminator", conditional_logits, images, batch.images[-1], batch.groups, text
            )
            for images, text in zip(fakes, texts, strict=True)
        ]
        for name, loss in zip(("adversarial", "interpolated"), adversarial, strict=False):
            train.report(f"generator/{name}", loss)
        train.apply("generator", self._generator_loss(adversarial))

    def _discriminator_loss(self, losses: PairLosses) -> Tensor:
        return matching_aware_loss(losses) if self.config.matching_aware else losses.real + losses.fake

    def _generator_loss(self, losses: Sequence[Tensor]) -> Tensor:
        """Combine the losses for captions and, with `interpolate`, for interpolated text (section 4.3, eq. 5)."""
        if not self.config.interpolate:
            return losses[0]
        plain, interpolated = losses
        total = plain + self.config.interpolation_weight * interpolated
        if self.config.compat == "authors":  # half as many interpolations as captions, the mean over all of them
            total = (2 * plain + self.config.interpolation_weight * interpolated) / 3
        return total

    def sample(self, nets: Mapping[str, nn.Module], captions: Captions, noise: NoiseFn) -> Sample:
        text = _sentences.for_sample(captions, nets, self.config.unit_text)
        return Sample((nets["generator"](noise(self.config.z_dim), text),))


def _generate(net: nn.Module, noises: Sequence[Tensor], texts: Sequence[Tensor]) -> list[Tensor]:
    return [net(z, text) for z, text in zip(noises, texts, strict=True)]


def build(config: Config, info: BuildInfo) -> GanCls:
    """Build the system with new weights. Raises ValueError, naming the key, if the config is invalid."""
    info.require_pairs("gan_cls")
    return GanCls(config, info)
