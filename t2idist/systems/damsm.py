"""DAMSM: text and image encoder that place words, sentences and pictures in one space (AttnGAN, section 3.2)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import Tensor, nn

from t2idist.contract import Adam, Batch, BuildInfo, Captions, Frozen, Pretrained, Role, Schedule, Train
from t2idist.losses.matching import Gammas, RankingLosses, sentence_losses, word_losses
from t2idist.nn.image_encoders import (TextImageEncoders, InceptionEncoder, check_trunk, damsm_image_encoder, load_trunk)
from t2idist.nn.text_encoders import damsm_text_encoder


@dataclass(frozen=True)
class Config:
    """Defaults: AttnGAN's paper, else its released settings.

    trunk: "inception" (image_size 299, weights from `trunk_weights`, a file with torchvision's names and the given
    sha256) or "small" (trained from scratch, `trunk_width` channels after its first layer).
    """

    embedding_dim: int = 256
    word_dim: int = 300
    dropout: float = 0.5
    trunk: str = "inception"
    trunk_width: int = 32
    trunk_weights: str = ""
    trunk_sha256: str = ""
    image_size: int = 299
    gamma_attention: float = 5.0  # section 4 of the paper; 4 in the released settings
    gamma_words: float = 5.0
    gamma_ranking: float = 10.0
    lr: float = 2e-3
    lr_factor_per_epoch: float = 0.98
    lr_floor: float = 0.1
    clip_norm: float = 0.25


class Damsm:
    """The system; its export holds the networks "text" and "image"."""

    def __init__(self, config: Config, plan: BuildInfo) -> None:
        self.config = config
        fields = asdict(config)
        encoders = TextImageEncoders(damsm_text_encoder(fields, plan.vocabulary_size), damsm_image_encoder(fields))
        schedule = Schedule(
            "exponential",
            factor=config.lr_factor_per_epoch,
            every_images=float(plan.extent.epoch_images),
            floor=config.lr_floor,
        )
        adam = Adam(lr=config.lr, schedule=schedule)
        pretrained = None
        if isinstance(encoders.image, InceptionEncoder):
            fill = functools.partial(load_trunk, encoders.image)
            pretrained = Pretrained(config.trunk_weights, config.trunk_sha256, "trunk_weights", fill)
        self.roles = {
            "damsm": Role(encoders, adam, clip_norm=config.clip_norm, clip_prefix="text.", pretrained=pretrained)
        }
        self.frozen: dict[str, Frozen] = {}
        self.sizes = (config.image_size,)
        self.exports = ("damsm.text", "damsm.image")
        self.gammas = Gammas(config.gamma_attention, config.gamma_words, config.gamma_ranking)

    def step(self, batch: Batch, train: Train) -> None:
        words, sentences = train.forward("damsm", self._losses, batch)
        train.apply("damsm", words.sum() + sentences.sum())
        train.report("damsm/word_caption_of_image", words.caption_of_image)
        train.report("damsm/word_image_of_caption", words.image_of_caption)
        train.report("damsm/sentence_caption_of_image", sentences.caption_of_image)
        train.report("damsm/sentence_image_of_caption", sentences.image_of_caption)

    def _losses(self, net: TextImageEncoders, batch: Batch) -> tuple[RankingLosses, RankingLosses]:
        regions, whole = net.image(batch.images[-1])
        words, sentence = net.text(batch.captions.tokens, batch.captions.lengths)
        classes, groups = batch.class_ids, batch.groups
        return (
            word_losses(regions, words, batch.captions.lengths, classes, groups, self.gammas),
            sentence_losses(whole, sentence, classes, groups, self.gammas),
        )

    def embed_pictures(self, nets: Mapping[str, nn.Module], images: Tensor) -> Tensor:
        codes: Tensor = nets["image"](images)[1]
        return codes

    def embed_captions(self, nets: Mapping[str, nn.Module], captions: Captions) -> Tensor:
        sentences: Tensor = nets["text"](captions.tokens, captions.lengths)[1]
        return sentences


def build(config: Config, plan: BuildInfo) -> Damsm:
    """The system with newly drawn weights; the Inception trunk's come from `trunk_weights` afterwards."""
    check_trunk(config.trunk, config.image_size, config.trunk_weights)
    return Damsm(config, plan)
