"""Image tensors: from 8 bits to floats and back, and the pyramid of sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def move_images(
    images: Sequence[Tensor], device: torch.device, dtype: torch.dtype, pyramid_sizes: Sequence[int] = ()
) -> tuple[Tensor, ...]:
    """Move uint8 images to a device, as floats in [-1, 1]; with `pyramid_sizes`, make the pyramid of each there."""
    there = [image.to(device, non_blocking=True) for image in images]
    if pyramid_sizes:
        return tuple(level for image in there for level in make_pyramid(image, pyramid_sizes, dtype))
    return tuple(to_float(image, dtype) for image in there)


def to_float(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Convert uint8 images to floats in [-1, 1]; floats keep their values."""
    return images.to(dtype).div_(127.5).sub_(1.0) if images.dtype == torch.uint8 else images.to(dtype)


def make_pyramid(pixels: Tensor, sizes: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Resize images to every size, bilinear and antialiased, rounded to 8 bits as the loader does on the host.

    Args:
        pixels: (N, S, S, 4) uint8; the fourth channel is ignored.
        sizes: Pixels of each side, lowest first; the last one is S.

    Returns:
        (N, 3, s, s) in [-1, 1] for each size, channels last in memory.
    """
    full = pixels[..., :3].permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last)
    levels = [
        full if size == full.shape[-1]
        else F.interpolate(full, (size, size), mode="bilinear", antialias=True).round_().clamp_(0, 255)
        for size in sizes
    ]  # fmt: skip
    return tuple(level.to(dtype).div(127.5).sub_(1.0) for level in levels)


def to_uint8(images: Tensor) -> Tensor:
    """Convert images in [-1, 1] to uint8; values outside are clamped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
