"""DCGAN (Radford et al. 2016), and a conditional GAN on the same layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import Tensor, nn

from t2idist.contract import Adam, Batch, BuildInfo, Captions, Frozen, NoiseFn, Role, Sample, Train, check_ranges
from t2idist.losses.adversarial import UnconditionalLosses, loss_generated, unconditional_losses
from t2idist.nn.dcgan import DcganDiscriminator, DcganGenerator, conditional_generator
from t2idist.nn.init import normal_
from t2idist.nn.text_encoders import sentence_encoder
from t2idist.systems import _sentences


@dataclass(frozen=True)
class Config:
    """Defaults: the paper's; but z is normal, as in all later systems, not uniform."""

    image_size: int = 64
    """A power of two, at least 16."""
    generator_width: int = 128
    """Figure 1: 1024 channels at 4x4."""
    discriminator_width: int = 64
    z_dim: int = 100
    conditional: bool = False
    """Both networks see captions, by sentence vectors of slot "text" or the data; without mismatched pairs."""
    condition_dim: int = 128
    """Dimensions that sentence vectors are projected to (GAN-CLS, section 5)."""
    generator_lr: float = 2e-4
    discriminator_lr: float = 2e-4
    ema_half_life_images: float | None = None
    """Half-life of the generator's EMA; none: no EMA, as published."""
    unit_text: bool = False
    """Scale sentence vectors by `unit_scale`: an encoder trained on cosines leaves their length arbitrary."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            at_least_1="generator_width discriminator_width z_dim condition_dim image_size",
            above_0="generator_lr discriminator_lr ema_half_life_images",
        )


class Dcgan:
    """The system. Exports: "generator" and, with an encoder of captions, "text"."""

    def __init__(self, config: Config, info: BuildInfo) -> None:
        self.config = config
        self.sizes = (config.image_size,)
        self.frozen: dict[str, Frozen] = {}
        text_dim = None
        if config.conditional:
            encoder, text_dim = sentence_encoder(info.sources, info.vocabulary_size, info.data.vector_dim)
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
        fake = train.forward("generator", _generate, train.noise(self.config.z_dim), text)
        losses = train.forward("discriminator", _losses, batch.images[-1], fake.detach(), text)
        train.apply("discriminator", losses.real + losses.fake)
        for part, value in losses.scalars().items():
            train.report(f"discriminator/{part}", value)
        with train.frozen("discriminator") as discriminator:
            loss = loss_generated(discriminator(fake, text))
        train.report("generator/adversarial", loss)
        train.apply("generator", loss)

    def sample(self, nets: Mapping[str, nn.Module], captions: Captions, noise: NoiseFn) -> Sample:
        text = _sentences.for_sample(captions, nets, self.config.unit_text) if self.config.conditional else None
        return Sample((nets["generator"](noise(self.config.z_dim), text),))


def _generate(net: nn.Module, z: Tensor, text: Tensor | None) -> Tensor:
    images: Tensor = net(z, text)
    return images


def _losses(net: nn.Module, real: Tensor, fake: Tensor, text: Tensor | None) -> UnconditionalLosses:
    return unconditional_losses(net(real, text), net(fake, text))


def build(config: Config, info: BuildInfo) -> Dcgan:
    """Build the system with new weights. Raises ValueError, naming the key, if the config is invalid."""
    if config.conditional and info.group_size < 2:
        raise ValueError(
            f"group_size is {info.group_size}; dcgan with captions normalises them over a group and needs at least 2"
        )
    return Dcgan(config, info)
