"""AttnGAN: a tree of generators that attends to words, and a matching loss against a trained DAMSM (Xu et al. 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from t2idist.contract import Adam, Batch, BuildInfo, Captions, Frozen, NoiseFn, Role, Sample, Train
from t2idist.losses.adversarial import (
    attngan_discriminator_loss,
    bce_real,
    generator_loss,
    joint_losses,
    matching_aware_loss,
    matching_aware_losses,
)
from t2idist.losses.image import kl_divergence
from t2idist.losses.matching import Gammas, damsm_loss, wrong_pairs
from t2idist.nn import tree
from t2idist.nn.discriminators import AttnDiscriminator
from t2idist.nn.image_encoders import damsm_image_encoder
from t2idist.nn.init import orthogonal_
from t2idist.nn.text_encoders import padding_mask, text_encoder_from_export, unit_scale
from t2idist.nn.tree import AttentionGenerator, GeneratorOutput, pyramid


@dataclass(frozen=True)
class Config:
    """Defaults: the paper's settings for CUB, else the released ones.

    unit_text: sentence and words have unit scale where the generator and the discriminators read them. Not in the
    paper: the DAMSM's cosines leave their length to chance, and where it is small the condition is heard late.
    single_output: AttnDCGAN, the paper's baseline of section 4.2: one picture, at the end of the tree, and one
    discriminator, of pairs alone; residuals 0 and damsm_weight 1 as released.
    compat: "authors" for the released weights, whose attention had its mask laid out wrongly (see WordAttention).
    """

    generator_width: int = 32  # GF_DIM; 48 for COCO
    discriminator_width: int = 64  # DF_DIM; 96 for COCO
    residuals: int = 2  # R_NUM; 3 for COCO
    branches: int = 3
    base_size: int = 64
    z_dim: int = 100
    condition_dim: int = 100
    kl_weight: float = 1.0  # released code; the paper gives none
    damsm_weight: float = 5.0  # lambda, section 4: 5 for CUB, 50 for COCO
    gamma_attention: float = 5.0  # section 4; 4 in the released settings
    gamma_words: float = 5.0
    gamma_ranking: float = 10.0
    generator_lr: float = 2e-4
    discriminator_lr: float = 2e-4
    ema_half_life_images: float = 13856.0  # released code: 0.999 a step at 20 images; 9699 for COCO's 14
    unit_text: bool = False
    single_output: bool = False
    compat: str = ""


class AttnGan:
    """The system; slot "damsm" gives its text and image encoder. Its export holds "generator" and "text"."""

    def __init__(self, config: Config, plan: BuildInfo) -> None:
        self.config = config
        source = plan.sources["damsm"]
        embedding_dim: int = source["config"]["embedding_dim"]
        self.sizes = pyramid(config.base_size, config.branches)[-1 if config.single_output else 0 :]
        generator = AttentionGenerator(
            width=config.generator_width,
            z_dim=config.z_dim,
            base_size=config.base_size,
            branches=config.branches,
            residuals=config.residuals,
            text_dim=embedding_dim,
            condition_dim=config.condition_dim,
            compat=config.compat,
            single_output=config.single_output,
        )
        orthogonal_(generator)
        self.roles = {"generator": Role(generator, Adam(lr=config.generator_lr), config.ema_half_life_images)}
        for size in self.sizes:
            judge = AttnDiscriminator(
                config.discriminator_width, size, embedding_dim, unconditional=not config.single_output
            )
            orthogonal_(judge)
            self.roles[f"discriminator_{size}"] = Role(judge, Adam(lr=config.discriminator_lr))
        self.frozen = {
            "text": Frozen(text_encoder_from_export(source, plan.vocabulary_size), "damsm", "text"),
            "image": Frozen(damsm_image_encoder(source["config"]), "damsm", "image"),
        }
        self.exports = ("generator", "text")
        self.gammas = Gammas(config.gamma_attention, config.gamma_words, config.gamma_ranking)

    def step(self, batch: Batch, train: Train) -> None:
        with torch.no_grad(), train.frozen("text") as text:
            words, sentence = text(batch.captions.tokens, batch.captions.lengths)
        read, condition = self._read(words, sentence)
        z, normal = train.noise(self.config.z_dim), train.noise(self.config.condition_dim)
        padding = padding_mask(batch.captions.lengths, words)
        drawn = train.forward("generator", tree.generate, z, normal, condition, read, padding, batch.groups)
        pairs = wrong_pairs(batch.class_ids, batch.groups)
        for size, real, fake in zip(self.sizes, batch.images, drawn.images, strict=True):
            name = f"discriminator_{size}"
            shown = fake.detach()
            if self.config.single_output:
                pair = train.forward(name, matching_aware_losses, real, shown, condition, pairs, batch.groups)
                parts, judged = vars(pair), matching_aware_loss(pair.real, pair.wrong, pair.fake)
            else:
                verdict = train.forward(name, joint_losses, real, shown, condition, pairs, batch.groups)
                parts, judged = vars(verdict), attngan_discriminator_loss(verdict)
            train.apply(name, judged)
            for part, value in parts.items():
                train.report(f"{name}/{part}", value)
        loss = self._generator_loss(drawn, condition, train)
        if self.config.damsm_weight:
            matching = self._matching(drawn.images[-1], words, sentence, batch, train)
            train.report("generator/damsm", matching)
            loss = loss + self.config.damsm_weight * matching
        train.apply("generator", loss)

    def _read(self, words: Tensor, sentence: Tensor) -> tuple[Tensor, Tensor]:
        """Words and sentence as generator and discriminators get them."""
        return (unit_scale(words), unit_scale(sentence)) if self.config.unit_text else (words, sentence)

    def _generator_loss(self, drawn: GeneratorOutput, condition: Tensor, train: Train) -> Tensor:
        assert drawn.mean is not None and drawn.log_variance is not None
        kl = kl_divergence(drawn.mean, drawn.log_variance)
        train.report("generator/kl", kl)
        loss = self.config.kl_weight * kl
        for size, fake in zip(self.sizes, drawn.images, strict=True):
            with train.frozen(f"discriminator_{size}") as judge:
                if self.config.single_output:
                    adversarial = bce_real(judge.conditional(judge.features(fake), condition))
                else:
                    adversarial = generator_loss(judge, fake, condition)
            train.report(f"generator/adversarial_{size}", adversarial)
            loss = loss + adversarial
        return loss

    def _matching(self, images: Tensor, words: Tensor, sentence: Tensor, batch: Batch, train: Train) -> Tensor:
        """L_DAMSM of the largest pictures."""
        with train.frozen("image") as encoder:
            regions, whole = encoder(images)
        lengths, classes = batch.captions.lengths, batch.class_ids
        return damsm_loss(regions, whole, words, sentence, lengths, classes, batch.groups, self.gammas)

    def sample(self, nets: Mapping[str, nn.Module], captions: Captions, draw: NoiseFn) -> Sample:
        words, sentence = self._read(*nets["text"](captions.tokens, captions.lengths))
        padding = padding_mask(captions.lengths, words)
        z, normal = draw(self.config.z_dim), draw(self.config.condition_dim)
        drawn = tree.generate(nets["generator"], z, normal, sentence, words, padding)
        return Sample(drawn.images, drawn.attention)


def build(config: Config, plan: BuildInfo) -> AttnGan:
    """The system with newly drawn weights. Raises ValueError, naming the key, where the config cannot be had."""
    if config.compat not in ("", "authors"):
        raise ValueError(f"compat is '{config.compat}'; it must be '' or 'authors'")
    if "damsm" not in plan.sources:
        raise ValueError("uses.damsm is missing; attngan takes its text and image encoder from a damsm stage or export")
    if plan.group_size < 2:
        raise ValueError(
            f"group_size is {plan.group_size}; attngan pairs pictures with wrong captions and takes at least 2"
        )
    return AttnGan(config, plan)
