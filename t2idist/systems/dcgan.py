"""DCGAN (Radford et al. 2016), the base of the family, and the plain conditional GAN on the same layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import Tensor, nn

from t2idist.contract import Adam, Batch, BuildInfo, Captions, Frozen, NoiseFn, Role, Sample, Train
from t2idist.losses.adversarial import UnconditionalLosses, bce_real, unconditional_losses
from t2idist.nn.dcgan import DcganDiscriminator, DcganGenerator, conditional_generator
from t2idist.nn.init import normal_
from t2idist.nn.text_encoders import sentence_encoder
from t2idist.systems import _sentences


@dataclass(frozen=True)
class Config:
    """Defaults: the paper's, which draws z from a uniform distribution; here it is normal, as in all that followed.

    image_size: a power of two from 16 on. conditional: both networks see a caption, whose sentence vector slot "text"
    or the data gives, and the discriminator sees matching captions only. condition_dim: what a sentence vector is
    projected to. unit_text: sentence vectors are scaled to a root mean square of 1, which an encoder trained on cosines
    leaves to chance. ema_half_life_images: none: no average, as published.
    """

    image_size: int = 64
    generator_width: int = 128  # figure 1: 1024 channels at 4x4
    discriminator_width: int = 64
    z_dim: int = 100
    conditional: bool = False
    condition_dim: int = 128  # GAN-CLS, section 5
    generator_lr: float = 2e-4
    discriminator_lr: float = 2e-4
    ema_half_life_images: float | None = None
    unit_text: bool = False


class Dcgan:
    """The system; its export holds "generator" and, where an encoder reads the captions, "text"."""

    def __init__(self, config: Config, plan: BuildInfo) -> None:
        self.config = config
        self.sizes = (config.image_size,)
        self.frozen: dict[str, Frozen] = {}
        text_dim = None
        if config.conditional:
            encoder, text_dim = sentence_encoder(plan.sources, plan.vocabulary_size, plan.extent.vector_dim)
            if encoder is not None:
                self.frozen["text"] = Frozen(encoder, "text", "text")
        generator = (
            DcganGenerator(width=config.generator_width, image_size=config.image_size, z_dim=config.z_dim)
            if text_dim is None
            else conditional_generator(asdict(config), text_dim, residual=False)
        )
        discriminator = DcganDiscriminator(
            width=config.discriminator_width,
            image_size=config.image_size,
            text_dim=text_dim,
            condition_dim=config.condition_dim,
        )
        normal_(generator)
        normal_(discriminator)
        self.roles = {
            "generator": Role(generator, Adam(lr=config.generator_lr), config.ema_half_life_images),
            "discriminator": Role(discriminator, Adam(lr=config.discriminator_lr)),
        }
        self.exports = ("generator", *self.frozen)

    def step(self, batch: Batch, train: Train) -> None:
        text = None
        if self.config.conditional:
            text = _sentences.for_step(batch.captions, train, self.frozen, self.config.unit_text)
        fake = train.forward("generator", _call, train.noise(self.config.z_dim), text)
        verdict = train.forward("discriminator", _verdict, batch.images[-1], fake.detach(), text)
        train.apply("discriminator", verdict.real + verdict.fake)
        for part, value in vars(verdict).items():
            train.report(f"discriminator/{part}", value)
        with train.frozen("discriminator") as judge:
            loss = bce_real(judge(fake, text))
        train.report("generator/adversarial", loss)
        train.apply("generator", loss)

    def sample(self, nets: Mapping[str, nn.Module], captions: Captions, draw: NoiseFn) -> Sample:
        text = _sentences.for_sample(captions, nets, self.config.unit_text) if self.config.conditional else None
        return Sample((nets["generator"](draw(self.config.z_dim), text),))


def _call(net: nn.Module, z: Tensor, text: Tensor | None) -> Tensor:
    images: Tensor = net(z, text)
    return images


def _verdict(net: nn.Module, real: Tensor, fake: Tensor, text: Tensor | None) -> UnconditionalLosses:
    return unconditional_losses(net(real, text), net(fake, text))


def build(config: Config, plan: BuildInfo) -> Dcgan:
    """The system with newly drawn weights. Raises ValueError, naming the key, where the config cannot be had."""
    if config.conditional and plan.group_size < 2:
        raise ValueError(
            f"group_size is {plan.group_size}; dcgan with captions normalises them over a group and takes at least 2"
        )
    return Dcgan(config, plan)
