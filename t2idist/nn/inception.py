"""Inception-v3 (Szegedy et al. 2015) with torchvision's parameter names.

Two variants: torchvision's, and the TensorFlow graph of December 2015 that FID and the Inception score were published
with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class InceptionFeatures(NamedTuple):
    """Features of an image."""

    regions: Tensor
    """Output of Mixed_6e, (N, 768, 17, 17) at 299 pixels."""
    pooled: Tensor
    """Mean of Mixed_7c, (N, 2048)."""


class ConvUnit(nn.Module):
    """Convolution without bias, BatchNorm (eps 1e-3), ReLU."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(channels_out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _avg_pool_with_padding(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1)


def _avg_pool_without_padding(x: Tensor) -> Tensor:
    """As in TensorFlow: the zeros of the padding do not count."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


Pool = Callable[[Tensor], Tensor]
ROW, ROW_PAD = (1, 7), (0, 3)
COLUMN, COLUMN_PAD = (7, 1), (3, 0)


class BlockA(nn.Module):
    """35x35 block: 1x1, 5x5, double 3x3 and pooled branches."""

    def __init__(self, channels: int, pool_channels: int, pool: Pool) -> None:
        super().__init__()
        self._pool = pool
        self.branch1x1 = ConvUnit(channels, 64, 1)
        self.branch5x5_1 = ConvUnit(channels, 48, 1)
        self.branch5x5_2 = ConvUnit(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvUnit(channels, 64, 1)
        self.branch3x3dbl_2 = ConvUnit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvUnit(96, 96, 3, padding=1)
        self.branch_pool = ConvUnit(channels, pool_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        pooled = self.branch_pool(self._pool(x))
        return torch.cat([self.branch1x1(x), five, double, pooled], 1)


class BlockB(nn.Module):
    """35x35 to 17x17."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = ConvUnit(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvUnit(channels, 64, 1)
        self.branch3x3dbl_2 = ConvUnit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvUnit(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class BlockC(nn.Module):
    """17x17 block with factorised 7x7 convolutions."""

    def __init__(self, channels: int, inner: int, pool: Pool) -> None:
        super().__init__()
        self._pool = pool
        self.branch1x1 = ConvUnit(channels, 192, 1)
        self.branch7x7_1 = ConvUnit(channels, inner, 1)
        self.branch7x7_2 = ConvUnit(inner, inner, ROW, padding=ROW_PAD)
        self.branch7x7_3 = ConvUnit(inner, 192, COLUMN, padding=COLUMN_PAD)
        self.branch7x7dbl_1 = ConvUnit(channels, inner, 1)
        self.branch7x7dbl_2 = ConvUnit(inner, inner, COLUMN, padding=COLUMN_PAD)
        self.branch7x7dbl_3 = ConvUnit(inner, inner, ROW, padding=ROW_PAD)
        self.branch7x7dbl_4 = ConvUnit(inner, inner, COLUMN, padding=COLUMN_PAD)
        self.branch7x7dbl_5 = ConvUnit(inner, 192, ROW, padding=ROW_PAD)
        self.branch_pool = ConvUnit(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        pooled = self.branch_pool(self._pool(x))
        return torch.cat([self.branch1x1(x), seven, double, pooled], 1)


class BlockD(nn.Module):
    """17x17 to 8x8."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = ConvUnit(channels, 192, 1)
        self.branch3x3_2 = ConvUnit(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvUnit(channels, 192, 1)
        self.branch7x7x3_2 = ConvUnit(192, 192, ROW, padding=ROW_PAD)
        self.branch7x7x3_3 = ConvUnit(192, 192, COLUMN, padding=COLUMN_PAD)
        self.branch7x7x3_4 = ConvUnit(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_2(self.branch7x7x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(seven))
        return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], 1)


class BlockE(nn.Module):
    """8x8 block whose 3x3 branches split into a 1x3 and a 3x1 convolution."""

    def __init__(self, channels: int, pool: Pool) -> None:
        super().__init__()
        self._pool = pool
        self.branch1x1 = ConvUnit(channels, 320, 1)
        self.branch3x3_1 = ConvUnit(channels, 384, 1)
        self.branch3x3_2a = ConvUnit(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = ConvUnit(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = ConvUnit(channels, 448, 1)
        self.branch3x3dbl_2 = ConvUnit(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = ConvUnit(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = ConvUnit(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = ConvUnit(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = self.branch_pool(self._pool(x))
        parts = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), pooled]
        return torch.cat(parts, 1)


class InceptionTrunk(nn.Module):
    """Inception-v3 from images (N, 3, S, S) in [-1, 1] to pooled features; S is at least 75, trained at 299."""

    def __init__(self, pool: Pool = _avg_pool_with_padding, last_pool: Pool = _avg_pool_with_padding) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvUnit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvUnit(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvUnit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvUnit(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvUnit(80, 192, 3)
        self.Mixed_5b = BlockA(192, 32, pool)
        self.Mixed_5c = BlockA(256, 64, pool)
        self.Mixed_5d = BlockA(288, 64, pool)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, 128, pool)
        self.Mixed_6c = BlockC(768, 160, pool)
        self.Mixed_6d = BlockC(768, 160, pool)
        self.Mixed_6e = BlockC(768, 192, pool)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, pool)
        self.Mixed_7c = BlockE(2048, last_pool)

    def features(self, images: Tensor) -> InceptionFeatures:
        """(N, 3, S, S) in [-1, 1] -> regions and pooled features."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        x = self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2))
        x = F.max_pool2d(self.Conv2d_4a_3x3(x), 3, stride=2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        regions = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(regions)))
        return InceptionFeatures(regions, x.mean(dim=(2, 3)))


class InceptionV3(InceptionTrunk):
    """The trunk with the classifier `fc`: images (N, 3, S, S) in [-1, 1] -> logits (N, classes).

    There is no auxiliary classifier: drop `AuxLogits.*` when loading torchvision's weights.
    """

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.fc = nn.Linear(2048, classes)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.fc(self.features(images).pooled)
        return out


class Inception2015(InceptionTrunk):
    """The graph `classify_image` of December 2015: average pooling ignores padding, the last block uses max pooling.

    Its weights are known as `pt_inception-2015-12-05`. Images (N, 3, 299, 299), scaled (byte - 128) / 128 -> pooled
    features (N, 2048) and logits (N, 1008) without bias, as the Inception score uses them.
    """

    def __init__(self) -> None:
        super().__init__(_avg_pool_without_padding, _max_pool)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.features(images).pooled
        return pooled, pooled @ self.fc.weight.T
