"""Differentiable augmentation of what a discriminator sees (DiffAugment; Zhao et al. 2020).

Real and generated images are changed alike, and the generator's gradient passes through the change, so generated images
do not take it over. For small data sets: the discriminator cannot learn the images by heart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

KINDS = ("color", "translation", "cutout")
DRAWS = 7
"""Random values for each image."""

_SHIFT, _CUT = 1 / 8, 1 / 2
"""Largest translation and side of the square that is cut out, as fractions of the image's side (as released)."""


def augment(images: Tensor, draws: Tensor, kinds: Sequence[str]) -> Tensor:
    """Change brightness, saturation and contrast, shift, and cut out a square of each image.

    Args:
        images: (N, 3, S, S) in [-1, 1].
        draws: (N, `DRAWS`), standard normal.
        kinds: Which of `KINDS` to apply.
    """
    uniform = 0.5 + 0.5 * torch.erf(draws / math.sqrt(2))  # in [0, 1]
    if "color" in kinds:
        images = _color(images, uniform[:, :3].to(images.dtype))
    if "translation" in kinds:
        images = _translate(images, uniform[:, 3:5])
    if "cutout" in kinds:
        images = images * _uncut(images, uniform[:, 5:7])
    return images


def _color(images: Tensor, uniform: Tensor) -> Tensor:
    brightness, saturation, contrast = uniform.view(-1, 3, 1, 1, 1).unbind(1)
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = torch.lerp(grey, images, 2 * saturation)
    return torch.lerp(images.mean((1, 2, 3), keepdim=True), images, contrast + 0.5)


def _translate(images: Tensor, uniform: Tensor) -> Tensor:
    """Shift by whole pixels, with zeros beyond the border; as matrix products, whose derivatives are plain."""
    size = images.shape[-1]
    largest = round(size * _SHIFT)
    shifts = (uniform * (2 * largest + 1)).floor() - largest
    place = torch.arange(size, device=images.device)
    rows, columns = (
        (place[:, None] - place == shift[:, None, None]).to(images.dtype).unsqueeze(1) for shift in shifts.unbind(1)
    )
    return rows @ images @ columns.transpose(2, 3)


def _uncut(images: Tensor, uniform: Tensor) -> Tensor:
    """(N, 1, S, S), 0 in a square around a point of the image, else 1."""
    size = images.shape[-1]
    place = torch.arange(size, device=images.device)
    half = round(size * _CUT) / 2
    inside = [(place - center[:, None] * size).abs() < half for center in uniform.unbind(1)]
    return (~(inside[0][:, :, None] & inside[1][:, None, :])).to(images.dtype).unsqueeze(1)
