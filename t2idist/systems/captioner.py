"""Captioner of a convolutional image encoder and an LSTM (Vinyals et al. 2015): MirrorGAN's STREAM (section 3.3)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from torch import Tensor, nn

from t2idist.contract import Adam, Batch, BuildInfo, Frozen, Pretrained, Role, Train, check_ranges
from t2idist.losses.captions import word_cross_entropy
from t2idist.nn.captioning import CaptionRNN, ResNetCaptionCNN, SmallCaptionCNN, caption_cnn, caption_rnn
from t2idist.nn.resnet import load_resnet


@dataclass(frozen=True)
class Config:
    """Defaults: MirrorGAN's released captioner, trained like the code that it derives from (yunjey's tutorial)."""

    trunk: str = "resnet152"
    """"resnet152", of which only the projection is trained, or "small", which is trained from scratch."""
    trunk_width: int = 32
    """Channels after the first layer of the small trunk."""
    trunk_weights: str = ""
    """Weights of ResNet-152: a file with torchvision's names."""
    trunk_sha256: str = ""
    """Hash of that file."""
    image_size: int = 224
    """The size that ResNet-152 was trained at."""
    word_dim: int = 256
    hidden_dim: int = 512
    lr: float = 1e-3
    beta1: float = 0.9
    compat: Literal["", "authors"] = ""
    """"authors", for the released weights: ResNet gets images that are resized without antialiasing, and without
    ImageNet's mean and standard deviation."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            at_least_1="trunk_width image_size word_dim hidden_dim",
            above_0="lr",
            below_1="beta1",
        )


class Captioner(nn.Module):
    """Image encoder and decoder as one role, trained by one Adam."""

    def __init__(self, cnn: ResNetCaptionCNN | SmallCaptionCNN, rnn: CaptionRNN) -> None:
        super().__init__()
        self.cnn = cnn
        self.rnn = rnn

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        out: Tensor = self.rnn(self.cnn(images), tokens)
        return out


class Captioning:
    """The system. Exports: "cnn", "rnn"."""

    def __init__(self, config: Config, info: BuildInfo) -> None:
        fields = asdict(config)
        net = Captioner(caption_cnn(fields), caption_rnn(fields, info.vocabulary_size))
        pretrained = None
        if isinstance(net.cnn, ResNetCaptionCNN):
            load = functools.partial(load_resnet, net.cnn.resnet)
            pretrained = Pretrained(config.trunk_weights, config.trunk_sha256, "trunk_weights", load)
        self.roles = {"captioner": Role(net, Adam(lr=config.lr, beta1=config.beta1), pretrained=pretrained)}
        self.frozen: dict[str, Frozen] = {}
        self.sizes = (config.image_size,)
        self.exports = ("captioner.cnn", "captioner.rnn")

    def step(self, batch: Batch, train: Train) -> None:
        loss = train.update("captioner", _loss, batch)
        train.report("captioner/cross_entropy", loss)

    def describe(self, nets: Mapping[str, nn.Module], images: Tensor, length: int) -> Tensor:
        """Caption images by greedy decoding.

        Captions have no end token, so the caller chooses the length.

        Args:
            images: (N, 3, S, S) in [-1, 1], of any size.

        Returns:
            Tokens (N, length).
        """
        rnn = nets["rnn"]
        assert isinstance(rnn, CaptionRNN)
        return rnn.greedy_decode(nets["cnn"](images), length)


def _loss(net: Captioner, batch: Batch) -> Tensor:
    captions = batch.captions
    logits = net(batch.images[-1], captions.tokens)
    return word_cross_entropy(logits, captions.tokens, captions.lengths, batch.groups)


def build(config: Config, info: BuildInfo) -> Captioning:
    """Build the system with new weights; those of ResNet-152 are loaded later from `trunk_weights`."""
    if config.trunk == "resnet152" and config.image_size < 32:
        raise ValueError(
            f"image_size is {config.image_size}; the trunk 'resnet152' needs at least 32 and was trained at 224"
        )
    if config.trunk != "resnet152" and config.trunk_weights:
        raise ValueError(f"trunk_weights is given, but trunk is '{config.trunk}'; only 'resnet152' takes weights")
    if info.group_size < 2:
        raise ValueError(f"group_size is {info.group_size}; the captioner's BatchNorm needs at least 2 images")
    return Captioning(config, info)
