"""StackGAN (v1): a sketch from text in the first stage, its refinement in the second (Zhang et al. 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from t2idist.contract import Adam, Batch, BuildInfo, Captions, Frozen, NoiseFn, Role, Sample, Schedule, Train
from t2idist.losses.adversarial import (
    attngan_discriminator_loss,
    bce_real,
    generator_loss,
    joint_losses,
    matching_aware_loss,
    matching_aware_losses,
)
from t2idist.losses.image import kl_divergence
from t2idist.losses.matching import wrong_pairs
from t2idist.nn import tree
from t2idist.nn.discriminators import SIZES, StageDiscriminator
from t2idist.nn.init import normal_
from t2idist.nn.text_encoders import sentence_encoder
from t2idist.nn.tree import GeneratorOutput
from t2idist.nn.two_stage import StageOneGenerator, StageTwoGenerator, use_batch_statistics, stage_one_generator
from t2idist.systems import _sentences


@dataclass(frozen=True)
class Config:
    """Defaults: the paper's settings for CUB (sections 3.2 to 3.4), widths as in the released code.

    stage: 1 draws pictures of `image_size` from text; 2 refines those of a trained stage 1 (slot "stage1", frozen) to
    `image_size`. As released, the second stage's discriminator has an unconditional head too.
    unit_text: sentence vectors have unit scale where the networks read them; for a DAMSM's, whose length is chance.
    compat: "authors": conditioning statistics through a ReLU, for the released weights; and stage 1, while stage 2 is
    trained, goes by the statistics of each group's pictures (its running ones do not drift, as they did there).
    """

    stage: int = 1
    image_size: int = 64  # 256 in stage 2
    generator_width: int = 128  # GF_DIM; 192 for COCO
    discriminator_width: int = 64  # DF_DIM; 96 for COCO
    residuals: int = 4  # R_NUM, of stage 2; 2 for COCO
    z_dim: int = 100  # in stage 2: that of its stage 1
    condition_dim: int = 128
    kl_weight: float = 1.0  # lambda, section 3.3; 2 in the released settings
    generator_lr: float = 2e-4
    discriminator_lr: float = 2e-4
    lr_halved_every_epochs: float = 100.0  # section 3.4; 20 in the released settings for COCO
    ema_half_life_images: float = 0.0  # 0: no average, as published
    unit_text: bool = False  # in stage 2: that of its stage 1
    compat: str = ""


class StackGan:
    """Either stage. Its export holds "generator", with stage 2 "stage1", and "text" where an encoder reads captions."""

    def __init__(self, config: Config, plan: BuildInfo) -> None:
        self.config = config
        self.sizes = (config.image_size,)
        self.frozen: dict[str, Frozen] = {}
        stage1 = plan.sources["stage1"] if config.stage == 2 else None
        encoder, text_dim = sentence_encoder(
            plan.sources if stage1 is None else stage1["plan"]["sources"],
            plan.vocabulary_size,
            plan.extent.vector_dim,
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
            )
            self.low_condition_dim = stage1["config"]["condition_dim"]
            self.frozen["stage1"] = Frozen(stage_one_generator(stage1["config"], text_dim), "stage1", "generator")
        if encoder is not None:
            self.frozen["text"] = Frozen(encoder, "text" if stage1 is None else "stage1", "text")
        judge = StageDiscriminator(
            config.discriminator_width, config.image_size, config.condition_dim, unconditional=config.stage == 2
        )
        normal_(generator)
        normal_(judge)
        halving = Schedule(
            "exponential", factor=0.5, every_images=config.lr_halved_every_epochs * plan.extent.epoch_images
        )
        self.roles = {
            "generator": Role(
                generator, Adam(config.generator_lr, schedule=halving), config.ema_half_life_images or None
            ),
            "discriminator": Role(judge, Adam(config.discriminator_lr, schedule=halving)),
        }
        self.exports = ("generator", *self.frozen)

    def step(self, batch: Batch, train: Train) -> None:
        sentence = _sentences.for_step(batch.captions, train, self.frozen, self.config.unit_text)
        first = train.noise(self.config.z_dim)  # what the generator begins from: noise, or stage 1's picture
        if self.config.stage == 2:
            first = self._low(first, train.noise(self.low_condition_dim), sentence, batch.groups, train)
        drawn = train.forward("generator", tree.generate, first, train.noise(self.config.condition_dim), sentence)
        self._judge(drawn, batch, train)
        train.apply("generator", self._generator_loss(drawn, train))

    def _low(self, z: Tensor, normal: Tensor, sentence: Tensor, groups: int, train: Train) -> Tensor:
        """Stage 1's pictures."""
        with torch.no_grad(), train.frozen("stage1") as net:
            if self.config.compat != "authors":
                return tree.generate(net, z, normal, sentence).images[0]
            parts = zip(z.chunk(groups), normal.chunk(groups), sentence.chunk(groups), strict=True)
            with use_batch_statistics(net):
                return torch.cat([tree.generate(net, *part).images[0] for part in parts])

    def _judge(self, drawn: GeneratorOutput, batch: Batch, train: Train) -> None:
        """The discriminator's update, conditioned on the mean of the conditioning Gaussian."""
        assert drawn.mean is not None
        pairs = wrong_pairs(batch.class_ids, batch.groups)
        given = (batch.images[-1], drawn.images[0].detach(), drawn.mean.detach(), pairs, batch.groups)
        if self.config.stage == 2:
            joint = train.forward("discriminator", joint_losses, *given)
            parts, loss = vars(joint), attngan_discriminator_loss(joint)
        else:
            pair = train.forward("discriminator", matching_aware_losses, *given)
            parts, loss = vars(pair), matching_aware_loss(pair.real, pair.wrong, pair.fake)
        train.apply("discriminator", loss)
        for part, value in parts.items():
            train.report(f"discriminator/{part}", value)

    def _generator_loss(self, drawn: GeneratorOutput, train: Train) -> Tensor:
        assert drawn.mean is not None and drawn.log_variance is not None
        fake, condition = drawn.images[0], drawn.mean.detach()
        with train.frozen("discriminator") as judge:
            if self.config.stage == 2:
                adversarial = generator_loss(judge, fake, condition)
            else:
                adversarial = bce_real(judge.conditional(judge.features(fake), condition))
        kl = kl_divergence(drawn.mean, drawn.log_variance)
        train.report("generator/adversarial", adversarial)
        train.report("generator/kl", kl)
        return adversarial + self.config.kl_weight * kl

    def sample(self, nets: Mapping[str, nn.Module], captions: Captions, draw: NoiseFn) -> Sample:
        sentence = _sentences.for_sample(captions, nets, self.config.unit_text)
        first = draw(self.config.z_dim)
        if self.config.stage == 2:
            first = tree.generate(nets["stage1"], first, draw(self.low_condition_dim), sentence).images[0]
        return Sample(tree.generate(nets["generator"], first, draw(self.config.condition_dim), sentence).images)


def _check_stage1(config: Config, plan: BuildInfo) -> None:
    """Whether slot "stage1" fits. Raises ValueError."""
    if "stage1" not in plan.sources:
        raise ValueError(
            "uses.stage1 is missing; stage 2 refines the pictures of a stackgan stage or export of stage 1"
        )
    source: Mapping[str, Any] = plan.sources["stage1"]
    if source["system"] != "stackgan":
        raise ValueError(f"uses.stage1: the export is of system '{source['system']}'; it must be of 'stackgan'")
    theirs = source["config"]
    if theirs["stage"] != 1:
        raise ValueError(f"uses.stage1: the export is of stage {theirs['stage']}; it must be of stage 1")
    if "text" in plan.sources:
        raise ValueError("uses.text: stage 2 reads captions with the encoder of its stage 1; leave it out")
    for key, ours in (("z_dim", config.z_dim), ("unit_text", config.unit_text)):
        if theirs[key] != ours:
            raise ValueError(f"{key} is {ours}, and that of its stage 1 is {theirs[key]}; give the same")
    if theirs["image_size"] >= config.image_size:
        raise ValueError(f"image_size is {config.image_size}; it must be above stage 1's {theirs['image_size']}")
    vector_dim = source["plan"]["vector_dim"]
    if "text" not in source["plan"]["sources"] and vector_dim != plan.extent.vector_dim:
        raise ValueError(
            f"uses.stage1: it was trained with sentence vectors of {vector_dim} numbers, and this data's have "
            f"{plan.extent.vector_dim}"
        )


def build(config: Config, plan: BuildInfo) -> StackGan:
    """The system with newly drawn weights. Raises ValueError, naming the key, where the config cannot be had."""
    if config.stage not in (1, 2):
        raise ValueError(f"stage is {config.stage}; it must be 1 or 2")
    if config.compat not in ("", "authors"):
        raise ValueError(f"compat is '{config.compat}'; it must be '' or 'authors'")
    if config.image_size not in SIZES:
        raise ValueError(f"image_size is {config.image_size}; it must be one of {', '.join(map(str, SIZES))}")
    if not config.lr_halved_every_epochs > 0:
        raise ValueError(f"lr_halved_every_epochs is {config.lr_halved_every_epochs}; it must be above 0")
    if plan.group_size < 2:
        raise ValueError(
            f"group_size is {plan.group_size}; stackgan pairs pictures with wrong captions and takes at least 2"
        )
    if config.stage == 2:
        _check_stage1(config, plan)
    return StackGan(config, plan)
