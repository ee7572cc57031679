"""Generator and discriminator of StarGAN (Choi et al. 2018, tables 4 and 5); parameter names are the published ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2idist.nn.blocks import conv3x3
from t2idist.nn.fast import blocks as fast
from t2idist.nn.precision import upcast

LEAKY_SLOPE = 0.01
"""Negative slope of LeakyReLU in the discriminator, not the 0.2 of the other systems."""


BORDER = 3
"""Padding of the generator's first convolution, in pixels on each side."""


def instance_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise each channel of each image (N, C, H, W), then scale and shift it by weight and bias (C,) or (N, C)."""
    normalised = F.instance_norm(x, use_input_stats=True, eps=eps)
    return normalised * weight[..., None, None] + bias[..., None, None]


class ConditionalInstanceNorm2d(nn.InstanceNorm2d):
    """Instance normalisation by the image's own statistics, in training and evaluation.

    The published weights have running averages, so the buffers exist, but they are neither updated nor used: the
    released code samples in training mode, and normalising by the averages gives very different images.

    label_dim: if above 0, labels (N, label_dim) also scale and shift the channels (Dumoulin et al. 2017, eq. 5).
    """

    def __init__(self, channels: int, label_dim: int = 0) -> None:
        super().__init__(channels, affine=True, track_running_stats=True)
        self.by_labels = nn.Linear(label_dim, 2 * channels, bias=False) if label_dim else None

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:  # type: ignore[override]
        weight, bias = self.weight, self.bias
        if self.by_labels is not None:
            scale, shift = self.by_labels(labels).chunk(2, dim=1)
            weight, bias = weight + scale, bias + shift  # (N, C)
        return fast.instance_norm(x, weight, bias, self.eps)


class ConditionalSequential(nn.Sequential):
    """nn.Sequential whose norms and residual blocks also get the labels."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        for layer in self:
            x = layer(x, labels) if isinstance(layer, ConditionalInstanceNorm2d | ResidualBlock) else layer(x)
        return x


class ResidualBlock(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))), without a final activation; label_dim: of the first norm."""

    def __init__(self, channels: int, label_dim: int = 0) -> None:
        super().__init__()
        self.main = ConditionalSequential(
            conv3x3(channels, channels),
            ConditionalInstanceNorm2d(channels, label_dim),
            nn.ReLU(inplace=True),
            conv3x3(channels, channels),
            ConditionalInstanceNorm2d(channels),
        )

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        out: Tensor = x + self.main(x, labels)
        return out


class TranslationGenerator(nn.Module):
    """Images (N, 3, S, S) in [-1, 1] and labels (N, label_dim) -> images (N, 3, S, S); S is a multiple of 4.

    The published network concatenates labels as constant planes, padded with zeros. Such a plane adds a constant at all
    positions but near the border, and instance normalisation removes constants: labels act through the border only.
    Here the planes are non-zero at the border only. The output is the same, without a large constant that half
    precision would round, and without rounding noise as gradient of weights that have no effect.

    Args:
        modulated: Apply labels in the norms from the residual blocks on instead, at all positions. A few blocks then
            suffice; from the border, labels reach 8 pixels further with each block.
        masked: A fourth output channel blends input and output at each position (Pumarola et al. 2018, eq. 1).
    """

    def __init__(
        self, width: int, label_dim: int, residuals: int, *, modulated: bool = False, masked: bool = False
    ) -> None:
        super().__init__()
        self.modulated, self.masked = modulated, masked
        planes, norm_dim = (0, label_dim) if modulated else (label_dim, 0)
        layers: list[nn.Module] = [nn.Conv2d(3 + planes, width, 7, bias=False)]
        layers += [ConditionalInstanceNorm2d(width), nn.ReLU(inplace=True)]
        for channels in (width, 2 * width):
            layers.append(nn.Conv2d(channels, 2 * channels, 4, 2, 1, bias=False))
            layers += [ConditionalInstanceNorm2d(2 * channels), nn.ReLU(inplace=True)]
        layers += [ResidualBlock(4 * width, norm_dim) for _ in range(residuals)]
        for channels in (4 * width, 2 * width):
            layers.append(nn.ConvTranspose2d(channels, channels // 2, 4, 2, 1, bias=False))
            layers += [ConditionalInstanceNorm2d(channels // 2, norm_dim), nn.ReLU(inplace=True)]
        self.main = ConditionalSequential(*layers, nn.Conv2d(width, 4 if masked else 3, 7, padding=3, bias=False))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        padded, labels = F.pad(images, (BORDER,) * 4), labels.to(images.dtype)
        if not self.modulated:
            border = F.pad(images.new_zeros(images.shape[2:]), (BORDER,) * 4, value=-1.0)
            padded = torch.cat([padded, labels[:, :, None, None] * border], dim=1)
        out = upcast(self.main(padded, labels)).contiguous()
        if not self.masked:
            return torch.tanh(out)
        mask = torch.sigmoid(out[:, 3:])
        return mask * upcast(images) + (1 - mask) * torch.tanh(out[:, :3])


class PatchDiscriminator(nn.Module):
    """Images (N, 3, size, size) -> patch scores (N, P, P), P = size / 2**layers, and class logits (N, classes).

    Without BatchNorm, because the gradient penalty is a function of each single image.
    """

    def __init__(self, width: int, size: int, classes: int, layers: int) -> None:
        super().__init__()
        patches = size >> layers
        assert patches << layers == size, f"{size} pixels are not a multiple of {2**layers}"
        body: list[nn.Module] = []
        channels = 3
        for layer in range(layers):
            body += [nn.Conv2d(channels, width << layer, 4, 2, 1), nn.LeakyReLU(LEAKY_SLOPE, inplace=True)]
            channels = width << layer
        self.main = nn.Sequential(*body)
        self.conv1 = nn.Conv2d(channels, 1, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, classes, patches, bias=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.main(images)
        return self.conv1(features).squeeze(1), self.conv2(features).flatten(1)

    def scores(self, images: Tensor) -> Tensor:
        """Return only the patch scores (N, P, P)."""
        out: Tensor = self.conv1(self.main(images)).squeeze(1)
        return out
