"""Read an image file of any kind: format by content, EXIF orientation, 16 bits, palettes, transparency on white.

The sharding tools and the commands that take images read them with this module, so that both see the same image.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import ImageOps, UnidentifiedImageError

from t2idist.data.pillow import Image
from t2idist.data.reasons import Reason
from t2idist.data.sample_format import MAX_PIXELS

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")

_ORIENTATION = 0x0112
_BITS_PER_SAMPLE = 258
_TIFF = (b"II*\0", b"MM\0*")


class UnusableImage(Exception):
    """Raised for an image that cannot be read, or not be stored."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def open_image(
    data: bytes, formats: Sequence[str] = FORMATS, max_pixels: int = MAX_PIXELS, option: str = ""
) -> Image.Image:
    """Read the header of an image file; only these formats are tried, whatever the file is called.

    Args:
        option: option of the command that allows more pixels, in units of 2^20.

    Raises:
        UnusableImage: it is none of these formats, or has too many pixels.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=list(formats))
    except Image.DecompressionBombError as error:
        raise UnusableImage(Reason.TOO_MANY_PIXELS, str(error)[:200]) from None
    except Exception as error:  # a damaged header makes Pillow raise nearly anything
        if "truncated" in str(error).lower():
            raise UnusableImage(Reason.TRUNCATED, f"{type(error).__name__}: {error}"[:200]) from None
        detail = "" if isinstance(error, UnidentifiedImageError) else f": {type(error).__name__}: {error}"
        raise UnusableImage(Reason.NOT_AN_IMAGE, f"not {', '.join(formats)}{detail}"[:200]) from None
    pixels = image.width * image.height
    if pixels > max_pixels:
        hint = f"; {option} {-(-pixels >> 20)} allows it" if option else ""
        detail = f"{image.width} x {image.height} pixels; at most {max_pixels}{hint}"
        raise UnusableImage(Reason.TOO_MANY_PIXELS, detail)
    return image


def load_image(image: Image.Image) -> None:
    """Decode an opened image. Raises UnusableImage if it is damaged."""
    try:
        image.load()
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        reason = Reason.TRUNCATED if "truncated" in str(error).lower() else Reason.DAMAGED
        raise UnusableImage(reason, f"{type(error).__name__}: {error}"[:200]) from None


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of a loaded image; 1 if it has none."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF is ignored
        return 1
    return value if isinstance(value, int) and 0 <= value <= 8 else 1


def is_16_bit(image: Image.Image, data: bytes) -> bool:
    """Check whether an image has 16 bits per value; `data` is its file."""
    if image.format == "PNG":
        return data[24] == 16  # the bit depth in IHDR, which Pillow does not expose for colour images
    if image.mode.startswith("I"):
        return True
    if image.format == "TIFF":
        bits = image.getexif().get(_BITS_PER_SAMPLE, 8)
        return any(int(count) > 8 for count in (bits if isinstance(bits, tuple) else (bits,)))
    return False


def _scale(image: Image.Image) -> tuple[Image.Image, int]:
    """Convert values of 32 bits, whose range no file states, to 8 bits. Returns the highest value of the range too.

    Raises UnusableImage if they are in none of the usual ranges.
    """
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    ranges = (1, 255, 65535) if image.mode == "F" else (255, 65535)
    highest = next((each for each in ranges if low >= 0 and high <= each), None)  # none if a value is not a number
    if highest is None:
        allowed = ", ".join(f"0 to {each}" for each in ranges)
        raise UnusableImage(
            Reason.DAMAGED, f"mode {image.mode} with values from {low:g} to {high:g}; read are {allowed}"
        )
    return Image.fromarray((values * (255 / highest)).round().astype(np.uint8)), highest


def to_rgb(image: Image.Image, data: bytes, repairs: list[tuple[Reason, str]]) -> Image.Image:
    """Convert to RGB, transparent images on white. Appends what was done to `repairs`."""
    mode = image.mode
    if mode == "F" or (mode == "I" and data.startswith(_TIFF)):
        image, highest = _scale(image)
        repairs.append((Reason.OTHER_COLOURS, f"mode {mode}, read as 0 to {highest}"))
    elif is_16_bit(image, data):
        repairs.append((Reason.SIXTEEN_BIT, f"mode {mode}"))
        if mode.startswith("I"):
            values = np.asarray(image).astype(np.int64)
            image = Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8))
    if mode in ("1", "L", "LA", "La") or mode.startswith("I"):
        repairs.append((Reason.GREY, f"mode {mode}"))
    elif mode in ("P", "PA"):
        repairs.append((Reason.PALETTE, f"mode {mode}"))
    elif mode == "CMYK":
        repairs.append((Reason.CMYK, f"mode {mode}"))
    elif mode not in ("RGB", "RGBA", "F"):
        repairs.append((Reason.OTHER_COLOURS, f"mode {mode}"))
    try:
        if image.has_transparency_data:
            repairs.append((Reason.ALPHA, "composited on white"))
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")
    except ValueError as error:
        raise UnusableImage(Reason.DAMAGED, f"mode {mode} does not convert to RGB: {error}"[:200]) from None


@contextlib.contextmanager
def no_limit_of_pillow() -> Iterator[None]:
    """Lift Pillow's own limit of pixels, which is lower than --max-megapixels may be."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def read_rgb(data: bytes, shorter: int) -> tuple[Image.Image, tuple[int, int]]:
    """Decode an image file of any of `FORMATS` to upright RGB, transparent parts white.

    Args:
        data: The file.
        shorter: Pixels of the shorter side that are needed. A large JPEG is decoded at the smallest fraction that still
            has twice as many.

    Returns:
        The image, and the width and height of the image at full size.

    Raises:
        UnusableImage: the image cannot be read.
    """
    if not data:
        raise UnusableImage(Reason.ZERO_BYTES, "the file is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = open_image(data)
        width, height = image.size
        if image.format in ("JPEG", "MPO"):
            image.draft(None, (2 * shorter, 2 * shorter))
        load_image(image)
        if orientation(image) not in (0, 1):
            turned = orientation(image) >= 5
            image = ImageOps.exif_transpose(image)
            width, height = (height, width) if turned else (width, height)
        return to_rgb(image, data, []), (width, height)
