"""A captioner, convolutional image encoder and LSTM (Vinyals et al. 2015), as in MirrorGAN's STREAM (section 3.3)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import Tensor, nn

from t2idist.contract import Adam, Batch, BuildInfo, Frozen, Pretrained, Role, Train
from t2idist.losses.captions import word_cross_entropy
from t2idist.nn.captioning import CaptionRNN, ResNetCaptionCNN, SmallCaptionCNN, caption_cnn, caption_rnn
from t2idist.nn.resnet import load_resnet


@dataclass(frozen=True)
class Config:
    """Defaults: MirrorGAN's released captioner, trained as the code that it was built on (yunjey's tutorial).

    trunk: "resnet152" (weights from `trunk_weights`, a file with torchvision's names and the given sha256; only the
    projection is trained) or "small" (trained from scratch, `trunk_width` channels after its first layer).
    compat: "authors" for the released weights, whose ResNet got pictures without ImageNet's mean and deviation.
    """

    trunk: str = "resnet152"
    trunk_width: int = 32
    trunk_weights: str = ""
    trunk_sha256: str = ""
    image_size: int = 224  # that ResNet-152 was trained at
    word_dim: int = 256
    hidden_dim: int = 512
    lr: float = 1e-3
    beta1: float = 0.9
    compat: str = ""


class Captioner(nn.Module):
    """Both parts as one role: one Adam trains them."""

    def __init__(self, cnn: ResNetCaptionCNN | SmallCaptionCNN, rnn: CaptionRNN) -> None:
        super().__init__()
        self.cnn = cnn
        self.rnn = rnn

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        out: Tensor = self.rnn(self.cnn(images), tokens)
        return out


class Captioning:
    """The system; its export holds the networks "cnn" and "rnn"."""

    def __init__(self, config: Config, plan: BuildInfo) -> None:
        fields = asdict(config)
        net = Captioner(caption_cnn(fields), caption_rnn(fields, plan.vocabulary_size))
        pretrained = None
        if isinstance(net.cnn, ResNetCaptionCNN):
            fill = functools.partial(load_resnet, net.cnn.resnet)
            pretrained = Pretrained(config.trunk_weights, config.trunk_sha256, "trunk_weights", fill)
        self.roles = {"captioner": Role(net, Adam(lr=config.lr, beta1=config.beta1), pretrained=pretrained)}
        self.frozen: dict[str, Frozen] = {}
        self.sizes = (config.image_size,)
        self.exports = ("captioner.cnn", "captioner.rnn")

    def step(self, batch: Batch, train: Train) -> None:
        loss = train.update("captioner", _loss, batch)
        train.report("captioner/cross_entropy", loss)

    def describe(self, nets: Mapping[str, nn.Module], images: Tensor, words: int) -> Tensor:
        """So many words of pictures (N, 3, S, S) in [-1, 1] of any size, the likeliest one by one: tokens (N, words).

        Captions have no mark at their end here, so where to stop is the caller's choice.
        """
        rnn = nets["rnn"]
        assert isinstance(rnn, CaptionRNN)
        return rnn.describe(nets["cnn"](images), words)


def _loss(net: Captioner, batch: Batch) -> Tensor:
    captions = batch.captions
    logits = net(batch.images[-1], captions.tokens)
    return word_cross_entropy(logits, captions.tokens, captions.lengths, batch.groups)


def build(config: Config, plan: BuildInfo) -> Captioning:
    """The system with newly drawn weights; the ResNet trunk's come from `trunk_weights` afterwards."""
    if config.compat not in ("", "authors"):
        raise ValueError(f"compat is '{config.compat}'; it must be '' or 'authors'")
    if config.trunk == "resnet152" and config.image_size < 32:
        raise ValueError(
            f"image_size is {config.image_size}; the trunk 'resnet152' takes 32 and more, and was trained at 224"
        )
    if config.trunk != "resnet152" and config.trunk_weights:
        raise ValueError(f"trunk_weights is given, but trunk is '{config.trunk}'; only 'resnet152' takes weights")
    if plan.group_size < 2:
        raise ValueError(f"group_size is {plan.group_size}; the captioner's BatchNorm takes at least 2 pictures")
    return Captioning(config, plan)
