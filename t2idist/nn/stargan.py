"""StarGAN's generator and discriminator (Choi et al. 2018, appendix, tables 4 and 5); names are the published ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2idist.nn.blocks import conv3x3
from t2idist.nn.precision import full

LEAK = 0.01
"""Slope of LeakyReLU in the discriminator: not the 0.2 of the rest of the family."""


BORDER = 3
"""Pixels of padding that the generator's first convolution reads on each side."""


class PictureNorm(nn.InstanceNorm2d):
    """Instance normalisation by the picture's own statistics, in training and after.

    The published weights carry running averages, so there are buffers for them; nothing moves or reads them: the
    authors draw in training mode, and pictures normalised by the averages are grossly other ones. Channels-last
    pictures go one by one: torch's own layer would lay them out anew, there and back.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=True, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_contiguous(memory_format=torch.channels_last):
            pictures = x.split(1)
            return torch.cat(
                [F.batch_norm(p, None, None, self.weight, self.bias, True, 0.0, self.eps) for p in pictures]
            )
        return F.instance_norm(x, None, None, self.weight, self.bias, use_input_stats=True, eps=self.eps)


class PlainResidual(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))), without an activation at the end."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            conv3x3(channels, channels),
            PictureNorm(channels),
            nn.ReLU(inplace=True),
            conv3x3(channels, channels),
            PictureNorm(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.main(x)
        return out


class TranslationGenerator(nn.Module):
    """A picture and labels to a picture: (N, 3, S, S) in [-1, 1], (N, label_dim) -> (N, 3, S, S); S a multiple of 4.

    The published net takes labels as planes of one value, padded with zeros. What such a plane adds is the same at all
    places but near the border, and the norm takes away what is the same everywhere: labels act by the border alone.
    Here they stand there and only there, which gives the same pictures, without a large constant that half precision
    would round, and without gradients of rounding errors for weights that can do nothing.
    """

    def __init__(self, width: int, label_dim: int, residuals: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3 + label_dim, width, 7, bias=False)]
        layers += [PictureNorm(width), nn.ReLU(inplace=True)]
        for channels in (width, 2 * width):
            layers.append(nn.Conv2d(channels, 2 * channels, 4, 2, 1, bias=False))
            layers += [PictureNorm(2 * channels), nn.ReLU(inplace=True)]
        layers += [PlainResidual(4 * width) for _ in range(residuals)]
        for channels in (4 * width, 2 * width):
            layers.append(nn.ConvTranspose2d(channels, channels // 2, 4, 2, 1, bias=False))
            layers += [PictureNorm(channels // 2), nn.ReLU(inplace=True)]
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 3, 7, padding=3, bias=False))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        padded = F.pad(images, (BORDER,) * 4)
        border = F.pad(images.new_zeros(images.shape[2:]), (BORDER,) * 4, value=-1.0)
        out: Tensor = self.main(torch.cat([padded, labels.to(images.dtype)[:, :, None, None] * border], dim=1))
        return torch.tanh(full(out))


class PatchDiscriminator(nn.Module):
    """Pictures (N, 3, size, size) -> scores of patches (N, P, P), P = size / 2**layers, and class logits (N, classes).

    No normalisation, as a gradient penalty of each picture needs it.
    """

    def __init__(self, width: int, size: int, classes: int, layers: int) -> None:
        super().__init__()
        places = size >> layers
        assert places << layers == size, f"{size} pixels are not a multiple of {2**layers}"
        body: list[nn.Module] = []
        channels = 3
        for layer in range(layers):
            body += [nn.Conv2d(channels, width << layer, 4, 2, 1), nn.LeakyReLU(LEAK, inplace=True)]
            channels = width << layer
        self.main = nn.Sequential(*body)
        self.conv1 = nn.Conv2d(channels, 1, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, classes, places, bias=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.main(images)
        return self.conv1(features).squeeze(1), self.conv2(features).flatten(1)

    def scores(self, images: Tensor) -> Tensor:
        """The patches' scores (N, P, P) alone."""
        out: Tensor = self.conv1(self.main(images)).squeeze(1)
        return out
