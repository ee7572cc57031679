"""MirrorGAN: AttnGAN's tree with attention to the sentence, and a captioner that redescribes its images
(Qiao et al. 2019).

The training step is that of `_tree_gan.AttentionGan`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from t2idist.contract import Batch, BuildInfo, Frozen, Train, check_ranges
from t2idist.losses.captions import word_cross_entropy
from t2idist.nn.captioning import captioner_from_export
from t2idist.nn.image_encoders import damsm_image_encoder
from t2idist.nn.text_encoders import text_encoder_from_export
from t2idist.nn.tree import MirrorStage
from t2idist.systems._tree_gan import AttentionConfig, AttentionGan


@dataclass(frozen=True)
class Config(AttentionConfig):
    """Defaults: the paper's settings for CUB, else the released ones (GF_DIM 32, DF_DIM 64, R_NUM 2)."""

    kl_weight: float = 1.0
    """Released code; the paper gives none."""
    stream_weight: float = 20.0
    """lambda of L_stream, section 4; 10 in the released settings."""
    damsm_weight: float = 0.0
    """AttnGAN's L_DAMSM, in neither paper nor released code; slot "damsm" then provides its image encoder too."""
    ema_half_life_images: float = 8314.0
    """Released code: 0.999 for each step of 12 images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, at_least_0="stream_weight")


class MirrorGan(AttentionGan):
    """The system. Slots: "damsm", its text encoder; "captioner", which describes the generated images.

    Exports: "generator", "text".
    """

    config: Config

    def __init__(self, config: Config, info: BuildInfo) -> None:
        damsm = info.sources["damsm"]
        cnn, rnn = captioner_from_export(info.sources["captioner"], info.vocabulary_size)
        self.frozen = {
            "text": Frozen(text_encoder_from_export(damsm, info.vocabulary_size), "damsm", "text"),
            "cnn": Frozen(cnn, "captioner", "cnn"),
            "rnn": Frozen(rnn, "captioner", "rnn"),
        }
        if config.damsm_weight:
            self.frozen["image"] = Frozen(damsm_image_encoder(damsm["config"]), "damsm", "image")
        super().__init__(config, damsm["config"]["embedding_dim"], stage=MirrorStage)

    def generator_terms(
        self, images: Tensor, words: Tensor, sentence: Tensor, batch: Batch, train: Train
    ) -> Iterator[Tensor]:
        """lambda * L_stream (section 3.3, eq. 9) and, if switched on, L_DAMSM."""
        captions = batch.captions
        with train.frozen("cnn", "rnn") as (cnn, rnn):
            logits = rnn(cnn(images), captions.tokens)
        stream = word_cross_entropy(logits, captions.tokens, captions.lengths, batch.groups)
        train.report("generator/stream", stream)
        yield self.config.stream_weight * stream
        yield from super().generator_terms(images, words, sentence, batch, train)


def build(config: Config, info: BuildInfo) -> MirrorGan:
    """Build the system with new weights. Raises ValueError, naming the key, if the config is invalid."""
    if "damsm" not in info.sources:
        raise ValueError("uses.damsm is missing; mirrorgan takes its text encoder from a damsm stage or export")
    if "captioner" not in info.sources:
        raise ValueError("uses.captioner is missing; mirrorgan takes its captioner from a captioner stage or export")
    info.require_pairs("mirrorgan")
    return MirrorGan(config, info)
