"""One picture: decode, resize, crop, flip, and its pyramid of sizes."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from t2idist.data.reader import Encoded

MAX_PIXELS = 64 << 20
_FORMATS = {"webp": "WEBP", "png": "PNG", "jpg": "JPEG"}

CROP_X, CROP_Y, FLIP, CAPTION, WORDS = range(5)
"""Which of a position's random words (`order.draws`) decides what."""


def decode(encoded: Encoded) -> Image.Image:
    """The RGB picture, on white where it is transparent; raises ValueError with the reason where it cannot be had."""
    try:
        image = Image.open(io.BytesIO(encoded.data), formats=[_FORMATS[encoded.extension]])
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
        image.load()
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise ValueError(f"does not decode: {type(error).__name__}: {error}"[:200]) from None


def crop_and_flip(
    image: Image.Image, size: int, crop: float, flip: bool, draw: NDArray[np.uint64] | None
) -> Image.Image:
    """The (size, size) picture: shorter side resized to round(crop * size), then cropped.

    draw: random words for the crop's place and, if `flip`, for a mirrored picture; None: the centre, never mirrored.
    """
    shorter = max(size, round(crop * size))
    width, height = image.size
    scale = shorter / min(width, height)
    wide, high = max(size, round(width * scale)), max(size, round(height * scale))
    if draw is None:
        x, y = (wide - size) // 2, (high - size) // 2
    else:
        x, y = int(draw[CROP_X]) % (wide - size + 1), int(draw[CROP_Y]) % (high - size + 1)
    if (wide, high) == (width, height):
        image = image.crop((x, y, x + size, y + size))
    else:  # resizes only what the crop keeps; resizing all and then cropping gives the same to rounding
        box = (x * width / wide, y * height / high, (x + size) * width / wide, (y + size) * height / high)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    if flip and draw is not None and int(draw[FLIP]) & 1:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def fill_pyramid(image: Image.Image, outputs: Sequence[NDArray[np.uint8]]) -> None:
    """Write the picture at each output's size; outputs: (3, S, S) each, all made from the largest, antialiased."""
    for output in outputs:
        size = output.shape[-1]
        scaled = image if image.width == size else image.resize((size, size), Image.Resampling.BILINEAR)
        output[...] = np.asarray(scaled).transpose(2, 0, 1)
