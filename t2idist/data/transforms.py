"""One picture: decode, resize, crop, flip, and its pyramid of sizes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from t2idist.data.pillow import Image
from t2idist.data.reader import Encoded
from t2idist.data.sample_format import MAX_PIXELS

_FORMATS = {"webp": "WEBP", "png": "PNG", "jpg": "JPEG"}

CROP_X, CROP_Y, FLIP, CAPTION, WORDS = range(5)
"""Which of a position's random words (`order.draws`) decides what."""

_DRAFT_FACTOR = 2


@dataclass(frozen=True)
class DecodedImage:
    """A decoded RGB picture. size: (width, height) as it is stored; a large JPEG may be decoded at a fraction of it."""

    image: Image.Image
    size: tuple[int, int]


def decode(encoded: Encoded, shorter: int | None = None) -> DecodedImage:
    """The picture, on white where it is transparent.

    shorter: pixels of the shorter side that are needed (None: all there are); a JPEG of at least four times as many is
    decoded at the smallest fraction that still has twice as many. Raises ValueError with the reason where it cannot be
    had.
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
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise ValueError(f"does not decode: {type(error).__name__}: {error}"[:200]) from None


def shorter_side(size: int, crop: float) -> int:
    """Pixels of the shorter side of the picture that a (size, size) crop is taken from."""
    return max(size, round(crop * size))


def crop_and_flip(
    picture: DecodedImage, size: int, crop: float, flip: bool, draw: NDArray[np.uint64] | None
) -> Image.Image:
    """The (size, size) picture: shorter side resized to round(crop * size), then cropped.

    draw: random words for the crop's place and, if `flip`, for a mirrored picture; None: the centre, never mirrored.
    """
    image = picture.image
    width, height = picture.size
    scale = shorter_side(size, crop) / min(width, height)
    wide, high = max(size, round(width * scale)), max(size, round(height * scale))
    if draw is None:
        x, y = (wide - size) // 2, (high - size) // 2
    else:
        x, y = int(draw[CROP_X]) % (wide - size + 1), int(draw[CROP_Y]) % (high - size + 1)
    if (wide, high) == (width, height):
        image = image.crop((x, y, x + size, y + size))
    else:  # resizes only what the crop keeps; resizing all and then cropping gives the same to rounding
        fraction = round(width / image.width)  # its last row and column may stand for less than a whole one
        across, down = (x * width / wide, (x + size) * width / wide), (y * height / high, (y + size) * height / high)
        box = (across[0] / fraction, down[0] / fraction, across[1] / fraction, down[1] / fraction)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    if flip and draw is not None and int(draw[FLIP]) & 1:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def fill_pyramid(pictures: NDArray[np.uint8], outputs: Sequence[NDArray[np.uint8]]) -> None:
    """Write pictures (N, S, S, 3) as planes at each size into outputs (N, 3, s, s), bilinear and antialiased.

    The values are those of Pillow's resize of each, in a quarter of its time.
    """
    source = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    for output in outputs:
        size = output.shape[-1]
        scaled = source
        if size != source.shape[-1]:
            scaled = torch.nn.functional.interpolate(source, (size, size), mode="bilinear", antialias=True)
        torch.from_numpy(output).copy_(scaled)
