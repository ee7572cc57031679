"""Image transforms: decode, resize, crop, flip, and the pyramid of sizes."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray

from t2idist.data.pillow import Image
from t2idist.data.sample_format import MAX_PIXELS
from t2idist.data.samples import DecodedImage, EncodedImage

_FORMATS = {"webp": "WEBP", "png": "PNG", "jpg": "JPEG"}

CROP_X, CROP_Y, FLIP, CAPTION, WORD_SUBSET = range(5)
"""Columns of `order.random_bits` and the choices that they decide."""

_DRAFT_FACTOR = 2
"""A JPEG that is decoded at a fraction keeps at least so many times the pixels that are needed."""


def decode(encoded: EncodedImage, shorter: int | None = None) -> DecodedImage:
    """Decode an image; transparent parts become white.

    Args:
        encoded: The image; only the decoder of its extension is tried.
        shorter: Pixels of the shorter side that are needed (None: all). A JPEG with at least four times as many is
            decoded at the smallest fraction that still has twice as many.

    Raises:
        ValueError: If the image is damaged, of another format or too large; the message is the reason.
    """
    decoded = _decode_jpeg(encoded, shorter) if encoded.extension == "jpg" else None
    return decoded or _decode_with_pillow(encoded, shorter)


def _decode_jpeg(encoded: EncodedImage, shorter: int | None) -> DecodedImage | None:
    """Decode an ordinary JPEG to the same pixels as Pillow, in half the time; None if Pillow has to do it."""
    data = encoded.data
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "Gray") or height * width > MAX_PIXELS:
            return None
        fraction = 1 if shorter is None else draft_fraction(min(width, height), shorter)
        if fraction > 1 and b"MPF\0" in data:
            return None  # Pillow decodes a file of several pictures at full size
        sides = -(-height // fraction), -(-width // fraction)
        pixels = simplejpeg.decode_jpeg(data, "RGBX", min_height=sides[0], min_width=sides[1])
    except Exception:  # damaged, or of a kind that the library does not know
        return None
    return DecodedImage(pixels.view(np.uint32)[..., 0], (width, height), encoded.vectors)


def draft_fraction(shorter: int, needed: int) -> int:
    """Return the fraction of its size at which a JPEG is decoded, as Pillow's `draft` chooses it: 1, 2, 4 or 8.

    Args:
        shorter: Pixels of the image's shorter side.
        needed: Pixels of the shorter side that are needed.
    """
    return next((each for each in (8, 4, 2) if each * _DRAFT_FACTOR * needed <= shorter), 1)


def _decode_with_pillow(encoded: EncodedImage, shorter: int | None) -> DecodedImage:
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
        return DecodedImage(pixels_of(image if image.mode == "RGB" else image.convert("RGB")), size, encoded.vectors)
    except Exception as error:  # a damaged file makes Pillow raise almost any exception
        raise ValueError(f"does not decode: {type(error).__name__}: {error}"[:200]) from None


def pixels_of(image: Image.Image) -> NDArray[np.uint32]:
    """Return the pixels of an RGB image, as `DecodedImage.pixels`."""
    return np.frombuffer(image.tobytes("raw", "RGBX"), np.uint32).reshape(image.height, image.width)


def shorter_side(size: int, crop: float) -> int:
    """Return the shorter side in pixels of the resized image from which a (size, size) crop is taken."""
    return max(size, round(crop * size))


def crop_and_flip(
    decoded: DecodedImage,
    size: int,
    crop: float,
    flip: bool,
    bits: NDArray[np.uint64] | None,
    random_crop: bool = True,
    out: NDArray[np.uint32] | None = None,
) -> NDArray[np.uint32]:
    """Resize the shorter side to round(crop * size), then crop to (size, size) and flip.

    Args:
        decoded: The image.
        size: Pixels of each side of the result.
        crop: Shorter side of the resized image, as a multiple of `size`.
        flip: Whether to mirror half of the images.
        bits: (8,) random bits for the position of the crop and the flip; None: centre crop, no flip.
        random_crop: Whether to draw the position of the crop; else the centre.
        out: (size, size), where the result is written; None: a new array.

    Returns:
        (size, size), as `DecodedImage.pixels`; never a view of them.
    """
    pixels = decoded.pixels
    width, height = decoded.size
    scale = shorter_side(size, crop) / min(width, height)
    scaled_width, scaled_height = max(size, round(width * scale)), max(size, round(height * scale))
    if bits is None or not random_crop:
        x, y = (scaled_width - size) // 2, (scaled_height - size) // 2
    else:
        x, y = int(bits[CROP_X]) % (scaled_width - size + 1), int(bits[CROP_Y]) % (scaled_height - size + 1)
    if (scaled_width, scaled_height) == (width, height):
        pixels = pixels[y : y + size, x : x + size]
    else:  # resize only what the crop keeps; equal to a resize followed by a crop, up to rounding
        shape = pixels.shape[1], pixels.shape[0]
        fraction = round(width / shape[0])  # exact only here: the last row and column may cover fewer pixels
        left, right = x * width / scaled_width, (x + size) * width / scaled_width
        top, bottom = y * height / scaled_height, (y + size) * height / scaled_height
        box = (left / fraction, top / fraction, right / fraction, bottom / fraction)
        image = Image.frombuffer("RGB", shape, np.ascontiguousarray(pixels), "raw", "RGBX", 0, 1)
        pixels = pixels_of(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
    if out is None:
        out = np.empty((size, size), np.uint32)
    out[...] = pixels
    if flip and bits is not None and int(bits[FLIP]) & 1:
        out[...] = torch.flip(torch.from_numpy(out.view(np.int32)), (1,)).numpy().view(np.uint32)  # NumPy's is slow
    return out


def fill_pyramid(images: NDArray[np.uint32], outputs: Sequence[NDArray[np.uint8]]) -> None:
    """Resize images to every size of the pyramid, bilinear and antialiased.

    The values are those of Pillow's resize, which takes four times as long.

    Args:
        images: (N, S, S), as `DecodedImage.pixels`, at the largest size; contiguous.
        outputs: Arrays (N, 3, s, s) to write to, one for each size.
    """
    # torch resizes four interleaved channels faster than three, and faster than planes
    source = torch.from_numpy(images.view(np.uint8).reshape(*images.shape, 4)).permute(0, 3, 1, 2)
    for output in outputs:
        size = output.shape[-1]
        scaled = images
        if size != images.shape[-1]:
            resized = torch.nn.functional.interpolate(source, (size, size), mode="bilinear", antialias=True)
            scaled = resized.permute(0, 2, 3, 1).contiguous().numpy().view(np.uint32)[..., 0]
        for planes, image in zip(output, scaled, strict=True):
            for channel, plane in enumerate(planes):
                np.copyto(plane, image >> (8 * channel), casting="unsafe")  # keeps the lowest byte
