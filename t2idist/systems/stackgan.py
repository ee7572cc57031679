"""StackGAN (v1): stage I sketches an image from text, stage II refines it (Zhang et al. 2017)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

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
    LogitsOf,
    attngan_discriminator_loss,
    conditional_logits,
    joint_logits,
    joint_losses,
    matching_aware_loss,
    matching_aware_losses,
)
from t2idist.losses.image import kl_divergence
from t2idist.losses.matching import wrong_pairs
from t2idist.losses.released import neighbour_losses
from t2idist.nn import tree
from t2idist.nn.discriminators import SIZES, StageDiscriminator
from t2idist.nn.init import normal_
from t2idist.nn.text_encoders import sentence_encoder
from t2idist.nn.tree import GeneratorOutput
from t2idist.nn.two_stage import StageOneGenerator, StageTwoGenerator, stage_one_generator
from t2idist.systems import _sentences
from t2idist.systems._options import GanOptions


@dataclass(frozen=True)
class Config(GanOptions):
    """Defaults: the paper's settings for CUB (sections 3.2 to 3.4), widths as in the released code."""

    stage: int = 1
    """1: text to image. 2: refine the images of a trained stage 1 (slot "stage1", frozen)."""
    image_size: int = 64
    """256 in stage 2."""
    generator_width: int = 128
    """GF_DIM; 192 for COCO."""
    discriminator_width: int = 64
    """DF_DIM; 96 for COCO."""
    residuals: int = 4
    """R_NUM, of stage 2; 2 for COCO."""
    z_dim: int = 100
    """In stage 2 that of its stage 1."""
    condition_dim: int = 128
    kl_weight: float = 1.0
    """lambda, section 3.3; 2 in the released settings."""
    generator_lr: float = 2e-4
    discriminator_lr: float = 2e-4
    lr_halved_every_epochs: float = 100.0
    """Section 3.4; 20 in the released settings for COCO."""
    ema_half_life_images: float = 0.0
    """Half-life of the generator's EMA; 0: no EMA, as published."""
    unit_text: bool = False
    """Scale sentence vectors by `unit_scale`, for a DAMSM's, whose length is arbitrary; in stage 2 as its stage 1."""
    condition_on_text: bool = False
    """Give the discriminator the sentence vector; as published, it gets the mean of the conditioning Gaussian, which
    the KL divergence pulls to 0."""
    skip_excitation: bool = False
    """Let the generator's map before the upsampling, averaged to 4x4, scale its last one (FastGAN)."""
    compat: Literal["", "authors"] = ""
    """"authors": train as the released code, in what docs/released_code.md lists."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(
            self,
            at_least_1="stage generator_width discriminator_width z_dim condition_dim image_size",
            at_least_0="residuals kl_weight ema_half_life_images",
            above_0="generator_lr discriminator_lr lr_halved_every_epochs",
        )


class StackGan:
    """Either stage. Exports: "generator", in stage 2 "stage1", and "text" with an encoder of captions."""

    def __init__(self, config: Config, info: BuildInfo) -> None:
        self.config = config
        self.sizes = (config.image_size,)
        self.frozen: dict[str, Frozen] = {}
        stage1 = info.sources["stage1"] if config.stage == 2 else None
        encoder, text_dim = sentence_encoder(
            info.sources if stage1 is None else stage1["plan"]["sources"],
            info.vocabulary_size,
            info.data.vector_dim,
        )
        if stage1 is None:
            generator: StageOneGenerator | StageTwoGenerator = stage_one_generator(asdict(config), text_dim)
            self.low_condition_dim = 0
        else:
            generator = StageTwoGenerator(
                width=config.generator_width,
                low_size=stage1["config"]["image_size"],
                image_size=config.image_size,
                residuals=config.residuals,
                text_dim=text_dim,
                condition_dim=config.condition_dim,
                compat=config.compat,
                skip_excitation=config.skip_excitation,
            )
            self.low_condition_dim = stage1["config"]["condition_dim"]
            self.frozen["stage1"] = Frozen(
                stage_one_generator(stage1["config"], text_dim),
                "stage1",
                "generator",
                train_mode=config.compat == "authors",
            )
        if encoder is not None:
            self.frozen["text"] = Frozen(encoder, "text" if stage1 is None else "stage1", "text")
        discriminator = StageDiscriminator(
            config.discriminator_width,
            config.image_size,
            text_dim if config.condition_on_text else config.condition_dim,
            unconditional=config.stage == 2,
        )
        normal_(generator)
        config.finish_discriminator(discriminator, normal_)
        halving = Schedule(
            "exponential", factor=0.5, every_images=config.lr_halved_every_epochs * info.data.epoch_images
        )
        self.roles = {
            "generator": Role(
                generator,
                config.adam(config.generator_lr, halving),
                config.ema_half_life_images or None,
                ema_rampup=config.ema_rampup,
            ),
            "discriminator": Role(discriminator, config.adam(config.discriminator_lr, halving)),
        }
        self.exports = ("generator", *self.frozen)
        self.memory = config.memory_of(self.roles)

    def step(self, batch: Batch, train: Train) -> None:
        sentence = _sentences.for_step(batch.captions, train, self.frozen, self.config.unit_text)
        inputs = train.noise(self.config.z_dim)  # of the generator: noise, or the images of stage 1
        if self.config.stage == 2:
            with torch.no_grad(), train.frozen("stage1") as net:
                inputs = tree.generate(net, inputs, train.noise(self.low_condition_dim), sentence).images[0]
        output = train.forward("generator", tree.generate, inputs, train.noise(self.config.condition_dim), sentence)
        assert output.mean is not None
        condition = (sentence if self.config.condition_on_text else output.mean).detach()
        self._update_discriminator(output, condition, batch, train)
        train.apply("generator", self._generator_loss(output, condition, batch, train))

    def _update_discriminator(self, output: GeneratorOutput, condition: Tensor, batch: Batch, train: Train) -> None:
        """Update the discriminator of images with a condition (N, D).

        As released, that of stage 2 has an unconditional head too.
        """
        joint = self.config.stage == 2
        losses: Callable[..., Any] = joint_losses if joint else matching_aware_losses
        combine: Callable[[Any], Tensor] = attngan_discriminator_loss if joint else matching_aware_loss
        given: tuple[Any, ...] = condition, wrong_pairs(batch.class_ids, batch.groups), batch.groups
        if self.config.compat == "authors":
            losses = functools.partial(neighbour_losses, joint=joint, wrong_last=False)
            given = condition, batch.groups
        images = batch.images[-1], output.images[0]
        self.config.update_discriminator(train, "discriminator", losses, combine, self._logits_of, *images, *given)

    @property
    def _logits_of(self) -> LogitsOf:
        return joint_logits if self.config.stage == 2 else conditional_logits

    def _generator_loss(self, output: GeneratorOutput, condition: Tensor, batch: Batch, train: Train) -> Tensor:
        """Adversarial loss and weighted KL divergence (section 3.3, eq. 4; section 3.4, eq. 6)."""
        assert output.mean is not None and output.log_variance is not None
        adversarial = self.config.adversarial_loss_of(
            train, "discriminator", self._logits_of, output.images[0], batch.images[-1], batch.groups, condition
        )
        kl = kl_divergence(output.mean, output.log_variance)
        train.report("generator/adversarial", adversarial)
        train.report("generator/kl", kl)
        return adversarial + self.config.kl_weight * kl

    def sample(self, nets: Mapping[str, nn.Module], captions: Captions, noise: NoiseFn) -> Sample:
        sentence = _sentences.for_sample(captions, nets, self.config.unit_text)
        inputs = noise(self.config.z_dim)
        if self.config.stage == 2:
            inputs = tree.generate(nets["stage1"], inputs, noise(self.low_condition_dim), sentence).images[0]
        return Sample(tree.generate(nets["generator"], inputs, noise(self.config.condition_dim), sentence).images)


def _check_stage1(config: Config, info: BuildInfo) -> None:
    """Raise ValueError if slot "stage1" does not fit."""
    if "stage1" not in info.sources:
        raise ValueError("uses.stage1 is missing; stage 2 refines the images of a stackgan stage or export of stage 1")
    source: Mapping[str, Any] = info.sources["stage1"]
    if source["system"] != "stackgan":
        raise ValueError(f"uses.stage1: the export is of system '{source['system']}'; it must be of 'stackgan'")
    stage1 = source["config"]
    if stage1["stage"] != 1:
        raise ValueError(f"uses.stage1: the export is of stage {stage1['stage']}; it must be of stage 1")
    if "text" in info.sources:
        raise ValueError("uses.text: stage 2 uses the text encoder of its stage 1; remove it")
    for key, value in (("z_dim", config.z_dim), ("unit_text", config.unit_text)):
        if stage1[key] != value:
            raise ValueError(f"{key} is {value}, but {stage1[key]} in its stage 1; they must be equal")
    if stage1["image_size"] >= config.image_size:
        raise ValueError(f"image_size is {config.image_size}; it must be above stage 1's {stage1['image_size']}")
    vector_dim = source["plan"]["vector_dim"]
    if "text" not in source["plan"]["sources"] and vector_dim != info.data.vector_dim:
        raise ValueError(
            f"uses.stage1: it was trained on sentence vectors of {vector_dim} elements and this data has "
            f"{info.data.vector_dim}; use the data that it was trained on"
        )


def build(config: Config, info: BuildInfo) -> StackGan:
    """Build the system with new weights. Raises ValueError, naming the key, if the config is invalid."""
    if config.stage not in (1, 2):
        raise ValueError(f"stage is {config.stage}; it must be 1 or 2")
    if config.image_size not in SIZES:
        raise ValueError(f"image_size is {config.image_size}; it must be one of {', '.join(map(str, SIZES))}")
    info.require_pairs("stackgan")
    if config.stage == 2:
        _check_stage1(config, info)
    return StackGan(config, info)
