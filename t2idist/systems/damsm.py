"""DAMSM: a text and an image encoder that embed words, sentences and images in one space (AttnGAN, section 3.2)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import Tensor, nn

from t2idist.contract import Adam, Batch, BuildInfo, Captions, Frozen, Pretrained, Role, Schedule, Train, check_ranges
from t2idist.losses.matching import Gammas, RankingLosses, sentence_losses, word_losses
from t2idist.nn.image_encoders import InceptionEncoder, TextImageEncoders, check_trunk, damsm_image_encoder, load_trunk
from t2idist.nn.text_encoders import damsm_text_encoder


@dataclass(frozen=True)
class Config:
    """Defaults: AttnGAN's paper, else its released settings."""

    embedding_dim: int = 256
    word_dim: int = 300
    """Dimensions of the LSTM's input embeddings."""
    dropout: float = 0.5
    trunk: str = "inception"
    """Image encoder: "inception", or "small", which is trained from scratch."""
    trunk_width: int = 32
    """Channels after the first layer of the small trunk."""
    trunk_weights: str = ""
    """Weights of the Inception trunk: a file with torchvision's names."""
    trunk_sha256: str = ""
    """Hash of that file."""
    image_size: int = 299
    gamma_attention: float = 5.0
    """Section 4; 4 in the released settings."""
    gamma_words: float = 5.0
    gamma_ranking: float = 10.0
    lr: float = 2e-3
    lr_factor_per_epoch: float = 0.98
    lr_floor: float = 0.1
    """Lowest factor on `lr`."""
    clip_norm: float = 0.25
    """Largest gradient norm of the text encoder."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            at_least_1="embedding_dim word_dim trunk_width image_size",
            below_1="dropout",
            above_0="gamma_attention gamma_words gamma_ranking lr lr_factor_per_epoch clip_norm",
            share="lr_floor",
        )


class Damsm:
    """The system. Exports: "text", "image"."""

    def __init__(self, config: Config, info: BuildInfo) -> None:
        self.config = config
        fields = asdict(config)
        encoders = TextImageEncoders(damsm_text_encoder(fields, info.vocabulary_size), damsm_image_encoder(fields))
        schedule = Schedule(
            "exponential",
            factor=config.lr_factor_per_epoch,
            every_images=float(info.data.epoch_images),
            floor=config.lr_floor,
        )
        adam = Adam(lr=config.lr, schedule=schedule)
        pretrained = None
        if isinstance(encoders.image, InceptionEncoder):
            load = functools.partial(load_trunk, encoders.image)
            pretrained = Pretrained(config.trunk_weights, config.trunk_sha256, "trunk_weights", load)
        self.roles = {
            "damsm": Role(encoders, adam, clip_norm=config.clip_norm, clip_prefix="text.", pretrained=pretrained)
        }
        self.frozen: dict[str, Frozen] = {}
        self.sizes = (config.image_size,)
        self.export_best = "r_precision"
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

    def embed_images(self, nets: Mapping[str, nn.Module], images: Tensor) -> Tensor:
        codes: Tensor = nets["image"](images)[1]
        return codes

    def embed_captions(self, nets: Mapping[str, nn.Module], captions: Captions) -> Tensor:
        sentences: Tensor = nets["text"](captions.tokens, captions.lengths)[1]
        return sentences


def build(config: Config, info: BuildInfo) -> Damsm:
    """Build the system with new weights; those of the Inception trunk are loaded later from `trunk_weights`."""
    check_trunk(config.trunk, config.image_size, config.trunk_weights)
    return Damsm(config, info)
