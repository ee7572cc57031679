"""GAN-CLS, GAN-INT and GAN-INT-CLS: a DCGAN of captions, with mismatched pairs and mixed text (Reed et al. 2016)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from t2idist.contract import Adam, Batch, BuildInfo, Captions, Frozen, NoiseFn, Role, Sample, Schedule, Train
from t2idist.losses.adversarial import bce_real, matching_aware_loss, matching_aware_losses
from t2idist.losses.matching import wrong_pairs
from t2idist.nn.dcgan import DcganDiscriminator, conditional_generator
from t2idist.nn.init import normal_
from t2idist.nn.text_encoders import sentence_encoder
from t2idist.systems import _sentences


@dataclass(frozen=True)
class Config:
    """Defaults: GAN-INT-CLS with the paper's settings for CUB, else the released ones.

    image_size: a power of two from 16 on. residual: with the bottleneck blocks of the released Lua code; false is a
    plain DCGAN, as the PyTorch port is (widths 64 and 64). condition_dim: what a sentence vector is projected to.
    text_norm: BatchNorm on that in the discriminator; the released CUB script and the port have it, COCO's has not.
    matching_aware: the discriminator learns from real pictures with wrong captions, too (GAN-CLS). interpolate: the
    generator learns from mixtures of two captions, too (GAN-INT): `beta` of one and 1 - `beta` of the next of its
    group, with `interpolation_weight`. unit_text: sentence vectors are scaled to a root mean square of 1, which an
    encoder trained on cosines leaves to chance. ema_half_life_images: none: no average, as published.
    compat: "authors" for the released GAN-INT-CLS script, which lacks one LeakyReLU in the residual discriminator and
    takes the generator's loss over half as many mixtures as captions, the mean of them all; without `residual` for the
    port's weights, whose discriminator never joins picture and text.
    """

    image_size: int = 64
    generator_width: int = 128  # ngf; 196 for COCO
    discriminator_width: int = 64  # ndf; 196 for COCO
    residual: bool = True
    z_dim: int = 100
    condition_dim: int = 128  # section 5
    text_norm: bool = True
    matching_aware: bool = True
    interpolate: bool = True
    beta: float = 0.5  # section 4.3
    interpolation_weight: float = 1.0
    generator_lr: float = 2e-4
    discriminator_lr: float = 2e-4
    lr_factor: float = 0.5  # released code
    lr_every_epochs: float = 100.0  # 40 for COCO
    ema_half_life_images: float | None = None
    unit_text: bool = False
    compat: str = ""


class GanCls:
    """The system; its export holds "generator" and, where an encoder reads the captions, "text"."""

    def __init__(self, config: Config, plan: BuildInfo) -> None:
        self.config = config
        self.sizes = (config.image_size,)
        encoder, text_dim = sentence_encoder(plan.sources, plan.vocabulary_size, plan.extent.vector_dim)
        self.frozen = {} if encoder is None else {"text": Frozen(encoder, "text", "text")}
        generator = conditional_generator(asdict(config), text_dim, config.residual)
        as_released = config.compat == "authors"
        discriminator = DcganDiscriminator(
            width=config.discriminator_width,
            image_size=config.image_size,
            text_dim=text_dim,
            condition_dim=config.condition_dim,
            residual=config.residual,
            text_norm=config.text_norm,
            joins=config.residual or not as_released,
            second_last_leaks=not (config.residual and config.interpolate and as_released),
        )
        normal_(generator)
        normal_(discriminator)
        every_images = config.lr_every_epochs * plan.extent.epoch_images
        schedule = Schedule("exponential", factor=config.lr_factor, every_images=every_images)
        self.roles = {
            "generator": Role(generator, Adam(config.generator_lr, schedule=schedule), config.ema_half_life_images),
            "discriminator": Role(discriminator, Adam(config.discriminator_lr, schedule=schedule)),
        }
        self.exports = ("generator", *self.frozen)

    def step(self, batch: Batch, train: Train) -> None:
        text = _sentences.for_step(batch.captions, train, self.frozen, self.config.unit_text)
        pairs = wrong_pairs(batch.class_ids, batch.groups)
        texts, noises = [text], [train.noise(self.config.z_dim)]
        if self.config.interpolate:
            texts.append(torch.lerp(text[pairs.caption], text, self.config.beta))
            noises.append(train.noise(self.config.z_dim))
        fakes = train.forward("generator", _draw, noises, texts)
        fake = fakes[0].detach()
        verdict = train.forward(
            "discriminator", matching_aware_losses, batch.images[-1], fake, text, pairs, batch.groups
        )
        told_apart = matching_aware_loss(verdict.real, verdict.wrong, verdict.fake)
        train.apply("discriminator", told_apart if self.config.matching_aware else verdict.real + verdict.fake)
        for part, value in vars(verdict).items():
            train.report(f"discriminator/{part}", value)
        with train.frozen("discriminator") as judge:
            losses = [bce_real(judge(images, condition)) for images, condition in zip(fakes, texts, strict=True)]
        for name, loss in zip(("adversarial", "interpolated"), losses, strict=False):
            train.report(f"generator/{name}", loss)
        train.apply("generator", self._generator_loss(losses))

    def _generator_loss(self, losses: Sequence[Tensor]) -> Tensor:
        """Of the captions' pictures and, with interpolation, of the mixtures' (section 4.3, eq. 5)."""
        if not self.config.interpolate:
            return losses[0]
        plain, mixed = losses
        total = plain + self.config.interpolation_weight * mixed
        if self.config.compat == "authors":  # half as many mixtures as captions, the mean over all of them
            total = (2 * plain + self.config.interpolation_weight * mixed) / 3
        return total

    def sample(self, nets: Mapping[str, nn.Module], captions: Captions, draw: NoiseFn) -> Sample:
        text = _sentences.for_sample(captions, nets, self.config.unit_text)
        return Sample((nets["generator"](draw(self.config.z_dim), text),))


def _draw(net: nn.Module, noises: Sequence[Tensor], texts: Sequence[Tensor]) -> list[Tensor]:
    return [net(z, text) for z, text in zip(noises, texts, strict=True)]


def build(config: Config, plan: BuildInfo) -> GanCls:
    """The system with newly drawn weights. Raises ValueError, naming the key, where the config cannot be had."""
    if config.compat not in ("", "authors"):
        raise ValueError(f"compat is '{config.compat}'; it must be '' or 'authors'")
    if not 0.0 <= config.beta <= 1.0:
        raise ValueError(f"beta is {config.beta}; it must be from 0 to 1")
    if plan.group_size < 2:
        raise ValueError(
            f"group_size is {plan.group_size}; gan_cls pairs pictures with wrong captions and takes at least 2"
        )
    return GanCls(config, plan)
