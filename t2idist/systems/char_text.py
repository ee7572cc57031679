"""Reed's char-CNN-RNN: a text encoder over characters, trained with an image encoder (Reed et al. 2016, CVPR)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import Tensor, nn

from t2idist.contract import Adam, Batch, BuildInfo, Captions, Frozen, Pretrained, Role, Train
from t2idist.losses.matching import RankingLosses, joint_embedding_losses
from t2idist.nn.char_encoder import char_text_encoder
from t2idist.nn.image_encoders import (TextImageEncoders, InceptionEncoder, check_trunk, damsm_image_encoder, load_trunk)


@dataclass(frozen=True)
class Config:
    """Defaults: the text encoder that GAN-CLS was published with (released code for COCO), beside the DAMSM's trunk.

    characters: of a caption that are read, words joined by spaces. widths: channels of the three convolutions.
    recurrent: "gru" or "rnn", over what they leave. trunk, trunk_width, trunk_weights, trunk_sha256, image_size: of the
    image encoder, as in damsm. margin: by which a caption is to beat another class's.
    """

    embedding_dim: int = 1024
    characters: int = 201
    widths: tuple[int, int, int] = (384, 512, 512)
    recurrent: str = "gru"
    trunk: str = "inception"
    trunk_width: int = 32
    trunk_weights: str = ""
    trunk_sha256: str = ""
    image_size: int = 299
    margin: float = 1.0  # the paper's 0-1 loss between classes
    lr: float = 2e-4  # released code for COCO


class CharText:
    """The system; its export holds the networks "text" and "image"."""

    def __init__(self, config: Config, plan: BuildInfo) -> None:
        self.config = config
        fields = asdict(config)
        text = char_text_encoder(fields, plan.extent.words)
        encoders = TextImageEncoders(text, damsm_image_encoder(fields, regions=False))
        pretrained = None
        if isinstance(encoders.image, InceptionEncoder):
            fill = functools.partial(load_trunk, encoders.image)
            pretrained = Pretrained(config.trunk_weights, config.trunk_sha256, "trunk_weights", fill)
        self.roles = {"char_text": Role(encoders, Adam(lr=config.lr), pretrained=pretrained)}
        self.frozen: dict[str, Frozen] = {}
        self.sizes = (config.image_size,)
        self.exports = ("char_text.text", "char_text.image")

    def step(self, batch: Batch, train: Train) -> None:
        losses = train.forward("char_text", self._losses, batch)
        train.apply("char_text", losses.sum())
        train.report("char_text/caption_of_image", losses.caption_of_image)
        train.report("char_text/image_of_caption", losses.image_of_caption)

    def _losses(self, net: TextImageEncoders, batch: Batch) -> RankingLosses:
        codes = net.image(batch.images[-1])[1]
        sentences = net.text(batch.captions.tokens, batch.captions.lengths)[1]
        return joint_embedding_losses(codes, sentences, batch.class_ids, batch.groups, self.config.margin)

    def embed_pictures(self, nets: Mapping[str, nn.Module], images: Tensor) -> Tensor:
        codes: Tensor = nets["image"](images)[1]
        return codes

    def embed_captions(self, nets: Mapping[str, nn.Module], captions: Captions) -> Tensor:
        sentences: Tensor = nets["text"](captions.tokens, captions.lengths)[1]
        return sentences


def build(config: Config, plan: BuildInfo) -> CharText:
    """The system with newly drawn weights; the Inception trunk's come from `trunk_weights` afterwards."""
    if plan.group_size < 2:
        raise ValueError(f"group_size is {plan.group_size}; char_text compares the captions of a group: at least 2")
    check_trunk(config.trunk, config.image_size, config.trunk_weights)
    return CharText(config, plan)
