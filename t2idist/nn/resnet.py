"""ResNet-152 (He et al. 2016) from image to pooled features, with torchvision's layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from t2idist.nn.image_encoders import copy_trunk_weights

BLOCKS = (3, 8, 36, 3)
"""Blocks in the four layers of ResNet-152."""
NAMES = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
"""Index of torchvision's parts in the sequence."""
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)
"""Of the colours of ImageNet's images in [0, 1], as used for the published weights."""


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions around a shortcut: (N, C, H, W) -> (N, 4 * width, ...)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride != 1 or channels != 4 * width:
            shortcut = nn.Conv2d(channels, 4 * width, kernel_size=1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        h = torch.relu(self.bn1(self.conv1(x)))
        h = torch.relu(self.bn2(self.conv2(h)))
        return torch.relu(shortcut + self.bn3(self.conv3(h)))


def _layer(channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = Bottleneck(channels, width, stride)
    return nn.Sequential(first, *(Bottleneck(4 * width, width, 1) for _ in range(blocks - 1)))


class ResNetTrunk(nn.Sequential):
    """Images (N, 3, S, S), S at least 32, trained at 224 -> (N, 2048, 1, 1) (as in the released captioner)."""

    channels = 2048

    def __init__(self, blocks: tuple[int, int, int, int] = BLOCKS) -> None:
        first, second, third, fourth = blocks
        super().__init__(
            nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
            _layer(64, 64, first, stride=1),
            _layer(256, 128, second, stride=2),
            _layer(512, 256, third, stride=2),
            _layer(1024, 512, fourth, stride=2),
            nn.AdaptiveAvgPool2d(1),
        )


def imagenet_scale(images: Tensor) -> Tensor:
    """Normalise images (N, 3, H, W) in [-1, 1] by ImageNet's mean and standard deviation."""
    scaled = [
        (images[:, i : i + 1] * 0.5 + (0.5 - mean)) / deviation
        for i, (mean, deviation) in enumerate(zip(MEAN, DEVIATION, strict=True))
    ]
    return torch.cat(scaled, dim=1)


def load_resnet(trunk: ResNetTrunk, weights: Mapping[str, Tensor]) -> None:
    """Load torchvision's ResNet-152 weights into a trunk, in place; the classifier (`fc.*`) is ignored.

    Raises ValueError, naming torchvision's key, if they do not fit.
    """
    theirs = {index: name for name, index in NAMES.items()}
    own = {}
    for key, value in trunk.state_dict().items():
        index, _, rest = key.partition(".")
        own[f"{theirs[index]}.{rest}"] = value
    given = {k.removeprefix("module."): v for k, v in weights.items()}
    copy_trunk_weights(own, {k: v for k, v in given.items() if not k.startswith("fc.")}, "ResNet-152")
