"""StackGAN++ (StackGAN-v2): a tree of generators, each branch with its discriminator (Zhang et al. 2018)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from t2idist.contract import Batch, BuildInfo, Captions, Frozen, NoiseFn, Sample, Train, check_ranges
from t2idist.losses.adversarial import (
    LogitLoss,
    LogitsOf,
    UnconditionalLosses,
    conditional_logits,
    joint_logits,
    joint_losses,
    matching_aware_loss,
    matching_aware_losses,
    stackgan_pp_discriminator_loss,
    unconditional_logits,
    unconditional_losses,
)
from t2idist.losses.image import colour_consistency
from t2idist.losses.matching import wrong_images, wrong_pairs
from t2idist.losses.released import stackgan_v2_released_loss, wrong_image_losses
from t2idist.nn import tree
from t2idist.nn.discriminators import StackDiscriminator
from t2idist.nn.text_encoders import sentence_encoder
from t2idist.nn.tree import GeneratorOutput, StackGenerator, pyramid
from t2idist.systems import _sentences
from t2idist.systems._tree_gan import TreeConfig, TreeGan, weighted_kl


@dataclass(frozen=True)
class Config(TreeConfig):
    """Defaults: the paper's settings for CUB, else the released ones."""

    conditional: bool = True
    """Generate from captions, whose sentence vectors slot "text" or the data provides; else from noise alone."""
    generator_width: int = 64
    condition_dim: int = 128
    kl_weight: float = 1.0
    """The paper; 2 in the released settings."""
    unconditional_loss: bool = True
    """Give the discriminators of images with captions an unconditional head (UNCOND_LOSS 1 in the released code)."""
    colour_weight: float = 0.0
    """alpha of the colour consistency: 0 with captions, 50 without (the paper)."""
    ema_half_life_images: float = 16627.0
    """Released code: 0.999 for each step of 24 images."""
    unit_text: bool = True
    """Scale sentence vectors by `unit_scale`; false for the released weights."""
    condition_on_text: bool = False
    """Give the discriminators the sentence vector; as published, they get the mean of the conditioning Gaussian, which
    the KL divergence pulls to 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, at_least_0="colour_weight")
        if self.condition_on_text and not self.conditional:
            raise ValueError("condition_on_text: there is no text with conditional=false")
        if not self.unconditional_loss and not self.conditional:
            raise ValueError("unconditional_loss is false; with conditional=false it is the only loss")


class StackGanPP(TreeGan):
    """The system. Exports: "generator" and, with an encoder of captions, "text"."""

    def __init__(self, config: Config, info: BuildInfo) -> None:
        self.config = config
        sizes = pyramid(config.base_size, config.branches)
        encoder, text_dim = None, None
        if config.conditional:
            encoder, text_dim = sentence_encoder(info.sources, info.vocabulary_size, info.data.vector_dim)
        generator = StackGenerator(
            width=config.generator_width,
            z_dim=config.z_dim,
            base_size=config.base_size,
            branches=config.branches,
            residuals=config.residuals,
            text_dim=text_dim,
            condition_dim=config.condition_dim,
            skip_excitation=config.skip_excitation,
        )
        condition_dim = text_dim if config.condition_on_text else config.condition_dim if config.conditional else None
        width, unconditional = config.discriminator_width, config.unconditional_loss

        def make_discriminator(size: int) -> StackDiscriminator:
            return StackDiscriminator(width, size, condition_dim, unconditional=unconditional)

        super().__init__(config, sizes, generator, make_discriminator)
        self.frozen = {} if encoder is None else {"text": Frozen(encoder, "text", "text")}
        self.exports = ("generator", *self.frozen)

    def step(self, batch: Batch, train: Train) -> None:
        z = train.noise(self.config.z_dim)
        if self.config.conditional:
            sentence = _sentences.for_step(batch.captions, train, self.frozen, self.config.unit_text)
            output = train.forward("generator", tree.generate, z, train.noise(self.config.condition_dim), sentence)
            assert output.mean is not None
            condition = sentence if self.config.condition_on_text else output.mean
            self._update_discriminators(output, condition.detach(), batch, train)
        else:
            condition = None
            output = train.forward("generator", tree.generate, z, None, None)
            self.update_discriminators(
                train, batch.images, output.images, _image_losses, lambda x: x.real + x.fake, unconditional_logits,
                suffix="_alone",
            )  # fmt: skip
        train.apply("generator", self._generator_loss(output, condition, batch, train))

    @property
    def _logits_of(self) -> LogitsOf:
        """Of the discriminators of images with captions."""
        return joint_logits if self.config.unconditional_loss else conditional_logits

    def _update_discriminators(self, output: GeneratorOutput, condition: Tensor, batch: Batch, train: Train) -> None:
        """Update the discriminators of images with a condition (N, D) (section 4.2, eq. 6)."""
        joint = self.config.unconditional_loss
        losses: Callable[..., Any] = joint_losses if joint else matching_aware_losses
        combine: Callable[[Any], Tensor] = stackgan_pp_discriminator_loss if joint else matching_aware_loss
        mismatched: Any = wrong_pairs(batch.class_ids, batch.groups)
        if self.config.compat == "authors":
            losses = functools.partial(wrong_image_losses, joint=joint)
            combine = stackgan_v2_released_loss if joint else matching_aware_loss
            mismatched = wrong_images(batch.class_ids, batch.groups)
        given = condition, mismatched, batch.groups
        self.update_discriminators(train, batch.images, output.images, losses, combine, self._logits_of, *given)

    def _generator_loss(self, output: GeneratorOutput, condition: Tensor | None, batch: Batch, train: Train) -> Tensor:
        """Sum the adversarial losses, the KL divergence and the colour consistency (section 4.3, eq. 7).

        Args:
            condition: (N, D), what the discriminators get with the images; None without captions.
        """
        images = output.images
        loss = images[0].new_zeros(())
        if condition is None:
            loss = self.add_adversarial_losses(loss, train, batch, images, unconditional_logits)
        else:
            loss = self.add_adversarial_losses(loss, train, batch, images, self._logits_of, condition)
            loss = loss + weighted_kl(self.config, output, train)
        if self.config.colour_weight:
            for low, high in pairwise(images):
                colour = colour_consistency(high, low, self.config.compat)
                train.report(f"generator/colour_{high.shape[2]}", colour)
                loss = loss + self.config.colour_weight * colour
        return loss

    def sample(self, nets: Mapping[str, nn.Module], captions: Captions, noise: NoiseFn) -> Sample:
        z = noise(self.config.z_dim)
        if not self.config.conditional:
            return Sample(tree.generate(nets["generator"], z, None, None).images)
        sentence = _sentences.for_sample(captions, nets, self.config.unit_text)
        return Sample(tree.generate(nets["generator"], z, noise(self.config.condition_dim), sentence).images)


def _image_losses(net: StackDiscriminator, real: Tensor, fake: Tensor, kind: LogitLoss) -> UnconditionalLosses:
    return unconditional_losses(net.unconditional(net.features(real)), net.unconditional(net.features(fake)), kind)


def build(config: Config, info: BuildInfo) -> StackGanPP:
    """Build the system with new weights. Raises ValueError, naming the key, if the config is invalid."""
    if config.conditional:
        info.require_pairs("stackgan_pp")
    return StackGanPP(config, info)
