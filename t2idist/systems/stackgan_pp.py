"""StackGAN++ (StackGAN-v2): a tree of generators, each branch with its discriminator (Zhang et al. 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from t2idist.contract import Adam, Batch, BuildInfo, Captions, Frozen, NoiseFn, Role, Sample, Train
from t2idist.losses.adversarial import (
    UnconditionalLosses,
    bce_real,
    joint_losses,
    stackgan_pp_discriminator_loss,
    stackgan_v2_released_loss,
    unconditional_losses,
)
from t2idist.losses.image import colour_consistency, kl_divergence
from t2idist.losses.matching import wrong_pairs
from t2idist.nn import tree
from t2idist.nn.discriminators import StackDiscriminator
from t2idist.nn.init import orthogonal_
from t2idist.nn.text_encoders import sentence_encoder
from t2idist.nn.tree import GeneratorOutput, StackGenerator, pyramid
from t2idist.systems import _sentences


@dataclass(frozen=True)
class Config:
    """Defaults: the paper's settings for CUB, else the released ones.

    conditional: with captions, whose sentence vectors slot "text" gives, or else the data; without, the tree takes
    noise alone. unit_text: sentence vectors have unit scale where they are read (see unit_scale); not for the released
    weights.
    colour_weight: alpha of the colour-consistency; the paper: 50 without condition, 0 with it.
    compat: "authors" weighs the discriminator's terms and the colours as the released code does.
    """

    conditional: bool = True
    generator_width: int = 64
    discriminator_width: int = 64
    residuals: int = 2
    branches: int = 3
    base_size: int = 64
    z_dim: int = 100
    condition_dim: int = 128
    kl_weight: float = 1.0  # the paper; 2 in the released settings
    colour_weight: float = 0.0
    generator_lr: float = 2e-4
    discriminator_lr: float = 2e-4
    ema_half_life_images: float = 16627.0  # released code: 0.999 a step at 24 images
    unit_text: bool = True
    compat: str = ""


class StackGanPP:
    """The system; its export holds "generator" and, with captions, "text"."""

    def __init__(self, config: Config, plan: BuildInfo) -> None:
        self.config = config
        self.sizes = pyramid(config.base_size, config.branches)
        encoder, text_dim = None, None
        if config.conditional:
            encoder, text_dim = sentence_encoder(plan.sources, plan.vocabulary_size, plan.extent.vector_dim)
        generator = StackGenerator(
            width=config.generator_width,
            z_dim=config.z_dim,
            base_size=config.base_size,
            branches=config.branches,
            residuals=config.residuals,
            text_dim=text_dim,
            condition_dim=config.condition_dim,
        )
        orthogonal_(generator)
        self.roles = {"generator": Role(generator, Adam(lr=config.generator_lr), config.ema_half_life_images)}
        for size in self.sizes:
            judge = StackDiscriminator(
                config.discriminator_width, size, config.condition_dim if config.conditional else None
            )
            orthogonal_(judge)
            self.roles[f"discriminator_{size}"] = Role(judge, Adam(lr=config.discriminator_lr))
        self.frozen: dict[str, Frozen] = {}
        if encoder is not None:
            self.frozen["text"] = Frozen(encoder, "text", "text")
        self.exports = ("generator", *self.frozen)

    def step(self, batch: Batch, train: Train) -> None:
        z = train.noise(self.config.z_dim)
        if self.config.conditional:
            sentence = _sentences.for_step(batch.captions, train, self.frozen, self.config.unit_text)
            drawn = train.forward("generator", tree.generate, z, train.noise(self.config.condition_dim), sentence)
            self._judge_pairs(drawn, batch, train)
        else:
            drawn = train.forward("generator", tree.generate, z, None, None)
            self._judge_pictures(drawn, batch, train)
        train.apply("generator", self._generator_loss(drawn, train))

    def _judge_pairs(self, drawn: GeneratorOutput, batch: Batch, train: Train) -> None:
        """The discriminators' updates with captions, conditioned on the mean of the conditioning Gaussian."""
        assert drawn.mean is not None
        condition = drawn.mean.detach()
        pairs = wrong_pairs(batch.class_ids, batch.groups)
        combine = stackgan_v2_released_loss if self.config.compat == "authors" else stackgan_pp_discriminator_loss
        for size, real, fake in zip(self.sizes, batch.images, drawn.images, strict=True):
            name = f"discriminator_{size}"
            verdict = train.forward(name, joint_losses, real, fake.detach(), condition, pairs, batch.groups)
            train.apply(name, combine(verdict))
            for part, value in vars(verdict).items():
                train.report(f"{name}/{part}", value)

    def _judge_pictures(self, drawn: GeneratorOutput, batch: Batch, train: Train) -> None:
        """The discriminators' updates without captions."""
        for size, real, fake in zip(self.sizes, batch.images, drawn.images, strict=True):
            name = f"discriminator_{size}"
            verdict = train.forward(name, _picture_verdict, real, fake.detach())
            train.apply(name, verdict.real + verdict.fake)
            for part, value in vars(verdict).items():
                train.report(f"{name}/{part}_alone", value)

    def _generator_loss(self, drawn: GeneratorOutput, train: Train) -> Tensor:
        loss = drawn.images[0].new_zeros(())
        for size, fake in zip(self.sizes, drawn.images, strict=True):
            with train.frozen(f"discriminator_{size}") as judge:
                features = judge.features(fake)
                adversarial = bce_real(judge.unconditional(features))
                if drawn.mean is not None:
                    adversarial = adversarial + bce_real(judge.conditional(features, drawn.mean))
            train.report(f"generator/adversarial_{size}", adversarial)
            loss = loss + adversarial
        if drawn.mean is not None and drawn.log_variance is not None:
            kl = kl_divergence(drawn.mean, drawn.log_variance)
            train.report("generator/kl", kl)
            loss = loss + self.config.kl_weight * kl
        if self.config.colour_weight:
            for low, high in zip(drawn.images[:-1], drawn.images[1:], strict=True):
                colour = colour_consistency(high, low, self.config.compat)
                train.report(f"generator/colour_{high.shape[2]}", colour)
                loss = loss + self.config.colour_weight * colour
        return loss

    def sample(self, nets: Mapping[str, nn.Module], captions: Captions, draw: NoiseFn) -> Sample:
        z = draw(self.config.z_dim)
        if not self.config.conditional:
            return Sample(tree.generate(nets["generator"], z, None, None).images)
        sentence = _sentences.for_sample(captions, nets, self.config.unit_text)
        return Sample(tree.generate(nets["generator"], z, draw(self.config.condition_dim), sentence).images)


def _picture_verdict(net: StackDiscriminator, real: Tensor, fake: Tensor) -> UnconditionalLosses:
    return unconditional_losses(net.unconditional(net.features(real)), net.unconditional(net.features(fake)))


def build(config: Config, plan: BuildInfo) -> StackGanPP:
    """The system with newly drawn weights. Raises ValueError, naming the key, where the config cannot be had."""
    if config.compat not in ("", "authors"):
        raise ValueError(f"compat is '{config.compat}'; it must be '' or 'authors'")
    if config.conditional and plan.group_size < 2:
        raise ValueError(
            f"group_size is {plan.group_size}; stackgan_pp pairs pictures with wrong captions and takes at least 2"
        )
    return StackGanPP(config, plan)
