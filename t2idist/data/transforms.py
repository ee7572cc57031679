"""Image transforms: decode, resize, crop, flip, and the pyramid of sizes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from t2idist.data.pillow import Image
from t2idist.data.reader import EncodedImage
from t2idist.data.sample_format import MAX_PIXELS

_FORMATS = {"webp": "WEBP", "png": "PNG", "jpg": "JPEG"}

CROP_X, CROP_Y, FLIP, CAPTION, WORD_SUBSET = range(5)
"""Columns of `order.random_bits` and the choices that they decide."""

_DRAFT_FACTOR = 2


@dataclass(frozen=True)
class DecodedImage:
    """A decoded RGB image."""

    image: Image.Image
    size: tuple[int, int]
    """(width, height) of the stored image; a large JPEG may be decoded at a fraction of it."""


def decode(encoded: EncodedImage, shorter: int | None = None) -> DecodedImage:
    """Decode an image; transparent parts become white.

    Args:
        encoded: The image; only the decoder of its extension is tried.
        shorter: Pixels of the shorter side that are needed (None: all). A JPEG with at least four times as many is
            decoded at the smallest fraction that still has twice as many.

    Raises:
        ValueError: If the image is damaged, of another format or too large; the message is the reason.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(encoded.data), formats=[_FORMATS[encoded.extension]])
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
        size = image.size
        if shorter is not None and image.format == "JPEG":
            image.draft(None, (_DRAFT_FACTOR * shorter,) * 2)
        image.load()
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return DecodedImage(image if image.mode == "RGB" else image.convert("RGB"), size)
    except Exception as error:  # a damaged file makes Pillow raise almost any exception
        raise ValueError(f"does not decode: {type(error).__name__}: {error}"[:200]) from None


def shorter_side(size: int, crop: float) -> int:
    """Return the shorter side in pixels of the resized image from which a (size, size) crop is taken."""
    return max(size, round(crop * size))


def crop_and_flip(
    decoded: DecodedImage, size: int, crop: float, flip: bool, bits: NDArray[np.uint64] | None
) -> Image.Image:
    """Resize the shorter side to round(crop * size), then crop to (size, size) and flip.

    Args:
        decoded: The image.
        size: Pixels of each side of the result.
        crop: Shorter side of the resized image, as a multiple of `size`.
        flip: Whether to mirror half of the images.
        bits: (8,) random bits for the position of the crop and the flip; None: centre crop, no flip.
    """
    image = decoded.image
    width, height = decoded.size
    scale = shorter_side(size, crop) / min(width, height)
    scaled_width, scaled_height = max(size, round(width * scale)), max(size, round(height * scale))
    if bits is None:
        x, y = (scaled_width - size) // 2, (scaled_height - size) // 2
    else:
        x, y = int(bits[CROP_X]) % (scaled_width - size + 1), int(bits[CROP_Y]) % (scaled_height - size + 1)
    if (scaled_width, scaled_height) == (width, height):
        image = image.crop((x, y, x + size, y + size))
    else:  # resize only what the crop keeps; equal to a resize followed by a crop, up to rounding
        fraction = round(width / image.width)  # exact only here: the last row and column may cover fewer pixels
        left, right = x * width / scaled_width, (x + size) * width / scaled_width
        top, bottom = y * height / scaled_height, (y + size) * height / scaled_height
        box = (left / fraction, top / fraction, right / fraction, bottom / fraction)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    if flip and bits is not None and int(bits[FLIP]) & 1:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def fill_pyramid(images: NDArray[np.uint8], outputs: Sequence[NDArray[np.uint8]]) -> None:
    """Resize images (N, S, S, 3) to every size of the pyramid, bilinear and antialiased.

    The values are those of Pillow's resize, in a quarter of its time.

    Args:
        images: The images at the largest size.
        outputs: Arrays (N, 3, s, s) to write to, one for each size.
    """
    source = torch.from_numpy(images).permute(0, 3, 1, 2)
    for output in outputs:
        size = output.shape[-1]
        scaled = source
        if size != source.shape[-1]:
            scaled = torch.nn.functional.interpolate(source, (size, size), mode="bilinear", antialias=True)
        torch.from_numpy(output).copy_(scaled)
