"""MirrorGAN: AttnGAN's tree with attention to the sentence, whose pictures a captioner describes (Qiao et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from t2idist.contract import Adam, Batch, BuildInfo, Captions, Frozen, NoiseFn, Role, Sample, Train
from t2idist.losses.adversarial import attngan_discriminator_loss, generator_loss, joint_losses
from t2idist.losses.captions import word_cross_entropy
from t2idist.losses.image import kl_divergence
from t2idist.losses.matching import Gammas, damsm_loss, wrong_pairs
from t2idist.nn import tree
from t2idist.nn.captioning import captioner_from_export
from t2idist.nn.discriminators import AttnDiscriminator
from t2idist.nn.image_encoders import damsm_image_encoder
from t2idist.nn.init import orthogonal_
from t2idist.nn.text_encoders import padding_mask, text_encoder_from_export, unit_scale
from t2idist.nn.tree import AttentionGenerator, GeneratorOutput, pyramid


@dataclass(frozen=True)
class Config:
    """Defaults: the paper's settings for CUB, else the released ones.

    stream_weight: of the cross-entropy of the caption on the largest picture, mean over words as released (the paper
    writes a sum). damsm_weight: of AttnGAN's matching loss, which neither paper nor released code has; with it slot
    "damsm" gives its image encoder too, and the gammas matter.
    unit_text: sentence and words have unit scale where the generator and the discriminators read them (see attngan).
    compat: "authors" for the released weights, whose attention had its mask laid out wrongly (see WordAttention).
    """

    generator_width: int = 32  # GF_DIM
    discriminator_width: int = 64  # DF_DIM
    residuals: int = 2  # R_NUM
    branches: int = 3
    base_size: int = 64
    z_dim: int = 100
    condition_dim: int = 100
    kl_weight: float = 1.0  # released code; the paper gives none
    stream_weight: float = 20.0  # lambda, section 4; 10 in the released settings
    damsm_weight: float = 0.0
    gamma_attention: float = 5.0  # AttnGAN, section 4
    gamma_words: float = 5.0
    gamma_ranking: float = 10.0
    generator_lr: float = 2e-4
    discriminator_lr: float = 2e-4
    ema_half_life_images: float = 8314.0  # released code: 0.999 a step at 12 images
    unit_text: bool = False
    compat: str = ""


class MirrorGan:
    """The system; slot "damsm" gives its text encoder, slot "captioner" what describes its pictures.

    Its export holds "generator" and "text".
    """

    def __init__(self, config: Config, plan: BuildInfo) -> None:
        self.config = config
        damsm = plan.sources["damsm"]
        embedding_dim: int = damsm["config"]["embedding_dim"]
        self.sizes = pyramid(config.base_size, config.branches)
        cnn, rnn = captioner_from_export(plan.sources["captioner"], plan.vocabulary_size)
        self.frozen = {
            "text": Frozen(text_encoder_from_export(damsm, plan.vocabulary_size), "damsm", "text"),
            "cnn": Frozen(cnn, "captioner", "cnn"),
            "rnn": Frozen(rnn, "captioner", "rnn"),
        }
        if config.damsm_weight:
            self.frozen["image"] = Frozen(damsm_image_encoder(damsm["config"]), "damsm", "image")
        generator = AttentionGenerator(
            width=config.generator_width,
            z_dim=config.z_dim,
            base_size=config.base_size,
            branches=config.branches,
            residuals=config.residuals,
            text_dim=embedding_dim,
            condition_dim=config.condition_dim,
            compat=config.compat,
            global_attention=True,
        )
        orthogonal_(generator)
        self.roles = {"generator": Role(generator, Adam(lr=config.generator_lr), config.ema_half_life_images)}
        for size in self.sizes:
            judge = AttnDiscriminator(config.discriminator_width, size, embedding_dim)
            orthogonal_(judge)
            self.roles[f"discriminator_{size}"] = Role(judge, Adam(lr=config.discriminator_lr))
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
            verdict = train.forward(name, joint_losses, real, fake.detach(), condition, pairs, batch.groups)
            train.apply(name, attngan_discriminator_loss(verdict))
            for part, value in vars(verdict).items():
                train.report(f"{name}/{part}", value)
        loss = self._adversarial(drawn, condition, train) + self._described(drawn.images[-1], batch, train)
        if self.config.damsm_weight:
            loss = loss + self._matched(drawn.images[-1], words, sentence, batch, train)
        train.apply("generator", loss)

    def _read(self, words: Tensor, sentence: Tensor) -> tuple[Tensor, Tensor]:
        """Words and sentence as generator and discriminators get them."""
        return (unit_scale(words), unit_scale(sentence)) if self.config.unit_text else (words, sentence)

    def _adversarial(self, drawn: GeneratorOutput, condition: Tensor, train: Train) -> Tensor:
        assert drawn.mean is not None and drawn.log_variance is not None
        kl = kl_divergence(drawn.mean, drawn.log_variance)
        train.report("generator/kl", kl)
        loss = self.config.kl_weight * kl
        for size, fake in zip(self.sizes, drawn.images, strict=True):
            with train.frozen(f"discriminator_{size}") as judge:
                adversarial = generator_loss(judge, fake, condition)
            train.report(f"generator/adversarial_{size}", adversarial)
            loss = loss + adversarial
        return loss

    def _described(self, images: Tensor, batch: Batch, train: Train) -> Tensor:
        """L_stream (section 3.3, eq. 9): would the captioner give these pictures the captions they were drawn from?"""
        captions = batch.captions
        with train.frozen("cnn", "rnn") as (cnn, rnn):
            logits = rnn(cnn(images), captions.tokens)
        stream = word_cross_entropy(logits, captions.tokens, captions.lengths, batch.groups)
        train.report("generator/stream", stream)
        return self.config.stream_weight * stream

    def _matched(self, images: Tensor, words: Tensor, sentence: Tensor, batch: Batch, train: Train) -> Tensor:
        """AttnGAN's L_DAMSM."""
        with train.frozen("image") as encoder:
            regions, whole = encoder(images)
        lengths, classes = batch.captions.lengths, batch.class_ids
        matching = damsm_loss(regions, whole, words, sentence, lengths, classes, batch.groups, self.gammas)
        train.report("generator/damsm", matching)
        return self.config.damsm_weight * matching

    def sample(self, nets: Mapping[str, nn.Module], captions: Captions, draw: NoiseFn) -> Sample:
        words, sentence = self._read(*nets["text"](captions.tokens, captions.lengths))
        padding = padding_mask(captions.lengths, words)
        z, normal = draw(self.config.z_dim), draw(self.config.condition_dim)
        drawn = tree.generate(nets["generator"], z, normal, sentence, words, padding)
        return Sample(drawn.images, drawn.attention)


def build(config: Config, plan: BuildInfo) -> MirrorGan:
    """The system with newly drawn weights. Raises ValueError, naming the key, where the config cannot be had."""
    if config.compat not in ("", "authors"):
        raise ValueError(f"compat is '{config.compat}'; it must be '' or 'authors'")
    if "damsm" not in plan.sources:
        raise ValueError("uses.damsm is missing; mirrorgan takes its text encoder from a damsm stage or export")
    if "captioner" not in plan.sources:
        raise ValueError("uses.captioner is missing; mirrorgan's pictures are described by a captioner stage or export")
    if plan.group_size < 2:
        raise ValueError(
            f"group_size is {plan.group_size}; mirrorgan pairs pictures with wrong captions and takes at least 2"
        )
    return MirrorGan(config, plan)
