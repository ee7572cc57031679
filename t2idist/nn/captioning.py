"""The captioner of MirrorGAN's STREAM (section 3.3): an image encoder and a word-by-word decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2idist.nn.image_encoders import SmallTrunk, resize
from t2idist.nn.precision import no_autocast, upcast
from t2idist.nn.resnet import ResNetTrunk, imagenet_scale

TRUNKS = ("resnet152", "small")


class ResNetCaptionCNN(nn.Module):
    """Frozen ResNet-152 and a trained projection: images (N, 3, S, S) in [-1, 1] -> (N, word_dim).

    The trunk has no gradient to its weights and stays in eval mode. compat "authors": as in the released captioner,
    images are resized without antialiasing, and stay in [-1, 1], without ImageNet's mean and standard deviation.
    """

    def __init__(self, word_dim: int, image_size: int, compat: str) -> None:
        super().__init__()
        self.image_size = image_size
        self.compat = compat
        self.resnet = ResNetTrunk().requires_grad_(False)
        self.linear = nn.Linear(self.resnet.channels, word_dim)
        self.bn = nn.BatchNorm1d(word_dim, momentum=0.01)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.resnet.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        released = self.compat == "authors"
        x = resize(images, self.image_size, antialias=not released)
        features = self.resnet(x if released else imagenet_scale(x))
        return _project(features.flatten(1), self.linear, self.bn)


class SmallCaptionCNN(SmallTrunk):
    """Small trunk and projection, trained together: images (N, 3, S, S) in [-1, 1] -> (N, word_dim)."""

    def __init__(self, word_dim: int, image_size: int, width: int) -> None:
        super().__init__(image_size, width)
        self.linear = nn.Linear(8 * width, word_dim)
        self.bn = nn.BatchNorm1d(word_dim, momentum=0.01)

    def forward(self, images: Tensor) -> Tensor:
        return _project(self.features(images)[1], self.linear, self.bn)


def _project(features: Tensor, linear: nn.Linear, norm: nn.BatchNorm1d) -> Tensor:
    # BatchNorm cancels the bias: its gradient is rounding noise, which Adam would scale up to full steps.
    projected = F.linear(features, linear.weight, linear.bias.detach()) + 0.0 * linear.bias
    out: Tensor = norm(projected)
    return out


class CaptionRNN(nn.Module):
    """The decoder: an LSTM that reads the image vector, then one word after the other.

    image (N, word_dim), tokens (N, T) int64 -> logits (N, T, vocabulary) of each word, given the image and the words
    before it.
    """

    def __init__(self, vocabulary_size: int, word_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary_size, word_dim)
        self.lstm = nn.LSTM(word_dim, hidden_dim, batch_first=True)
        self.linear = nn.Linear(hidden_dim, vocabulary_size)

    def train(self, mode: bool = True) -> Self:
        """Keep the LSTM, which has no dropout, in train mode: in eval mode cuDNN has no gradient to its input."""
        super().train(mode)
        self.lstm.train()
        return self

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        before = torch.cat([upcast(image).unsqueeze(1), self.embed(tokens[:, :-1])], dim=1)
        with no_autocast(before):
            states, _ = self.lstm(before)
        rows: Tensor = self.linear(states.flatten(0, 1))  # on 3-D input torch would repeat the weight for each image
        return rows.view(*tokens.shape, -1)

    def greedy_decode(self, image: Tensor, length: int) -> Tensor:
        """Choose the most likely word at every step: (N, word_dim) -> tokens (N, length)."""
        tokens: list[Tensor] = []
        inputs, state = upcast(image).unsqueeze(1), None
        for _ in range(length):
            out, state = self.lstm(inputs, state)
            tokens.append(self.linear(out[:, 0]).argmax(dim=1))
            inputs = self.embed(tokens[-1]).unsqueeze(1)
        return torch.stack(tokens, dim=1)


def caption_cnn(config: Mapping[str, Any]) -> ResNetCaptionCNN | SmallCaptionCNN:
    """Build the image encoder of a `captioner` stage with this config, with new weights."""
    if config["trunk"] == "resnet152":
        return ResNetCaptionCNN(config["word_dim"], config["image_size"], config["compat"])
    if config["trunk"] == "small":
        return SmallCaptionCNN(config["word_dim"], config["image_size"], config["trunk_width"])
    raise ValueError(f"trunk is '{config['trunk']}'; it must be one of {', '.join(TRUNKS)}")


def caption_rnn(config: Mapping[str, Any], vocabulary_size: int) -> CaptionRNN:
    """Build the decoder of a `captioner` stage with this config, with new weights."""
    return CaptionRNN(vocabulary_size, config["word_dim"], config["hidden_dim"])


def captioner_from_export(
    export: Mapping[str, Any], vocabulary_size: int
) -> tuple[ResNetCaptionCNN | SmallCaptionCNN, CaptionRNN]:
    """Build both parts of a `captioner` stage's export, given its index (``{"system", "config", "plan", ...}``).

    Raises ValueError if the export is of another system or its vocabulary has another size than the data's.
    """
    if export["system"] != "captioner":
        raise ValueError(f"uses.captioner: the export is of system '{export['system']}'; it must be of 'captioner'")
    theirs = export["plan"]["vocabulary_size"]
    if theirs != vocabulary_size:
        raise ValueError(
            f"uses.captioner: its vocabulary has {theirs} words and this data's has {vocabulary_size}; "
            "train the captioner on this data"
        )
    return caption_cnn(export["config"]), caption_rnn(export["config"], vocabulary_size)
