"""Reed's char-CNN-RNN: a text encoder over characters, trained with an image encoder (Reed et al. 2016, CVPR)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import Tensor, nn

from t2idist.contract import Adam, Batch, BuildInfo, Captions, Frozen, Pretrained, Role, Train, check_ranges
from t2idist.losses.matching import RankingLosses, joint_embedding_losses
from t2idist.nn.char_encoder import char_text_encoder, check_spelling
from t2idist.nn.image_encoders import InceptionEncoder, TextImageEncoders, check_trunk, damsm_image_encoder, load_trunk


@dataclass(frozen=True)
class Config:
    """Defaults: the text encoder of GAN-CLS (released code for COCO), with the DAMSM's image trunk."""

    embedding_dim: int = 1024
    characters: int = 201
    """Characters read of a caption, words joined by single spaces."""
    widths: tuple[int, int, int] = (384, 512, 512)
    """Channels of the three temporal convolutions."""
    recurrent: str = "gru"
    """"gru" or "rnn", over the output of the convolutions."""
    trunk: str = "inception"
    """Image encoder: "inception", or "small", which is trained from scratch."""
    trunk_width: int = 32
    """Channels after the first layer of the small trunk."""
    trunk_weights: str = ""
    """Weights of the Inception trunk: a file with torchvision's names."""
    trunk_sha256: str = ""
    """Hash of that file."""
    image_size: int = 299
    margin: float = 1.0
    """The paper's 0-1 loss between classes."""
    lr: float = 2e-4
    """Released code for COCO."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            at_least_1="embedding_dim characters widths trunk_width image_size",
            at_least_0="margin",
            above_0="lr",
        )


class CharText:
    """The system. Exports: "text", "image"."""

    def __init__(self, config: Config, info: BuildInfo) -> None:
        self.config = config
        fields = asdict(config)
        text = char_text_encoder(fields, info.data.words)
        encoders = TextImageEncoders(text, damsm_image_encoder(fields, regions=False))
        pretrained = None
        if isinstance(encoders.image, InceptionEncoder):
            load = functools.partial(load_trunk, encoders.image)
            pretrained = Pretrained(config.trunk_weights, config.trunk_sha256, "trunk_weights", load)
        self.roles = {"char_text": Role(encoders, Adam(lr=config.lr), pretrained=pretrained)}
        self.frozen: dict[str, Frozen] = {}
        self.sizes = (config.image_size,)
        self.export_best = "r_precision"
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

    def embed_images(self, nets: Mapping[str, nn.Module], images: Tensor) -> Tensor:
        codes: Tensor = nets["image"](images)[1]
        return codes

    def embed_captions(self, nets: Mapping[str, nn.Module], captions: Captions) -> Tensor:
        sentences: Tensor = nets["text"](captions.tokens, captions.lengths)[1]
        return sentences


def build(config: Config, info: BuildInfo) -> CharText:
    """Build the system with new weights; those of the Inception trunk are loaded later from `trunk_weights`."""
    if info.group_size < 2:
        raise ValueError(f"group_size is {info.group_size}; char_text compares the captions of a group: at least 2")
    check_trunk(config.trunk, config.image_size, config.trunk_weights)
    check_spelling(info.data.words)
    return CharText(config, info)
