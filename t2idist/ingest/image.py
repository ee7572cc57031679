"""Prepare one image for a shard: check its header, decode, repair, crop, resize, encode."""

from __future__ import annotations

import contextlib
import ctypes
import io
import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import ImageOps

from t2idist.data.image_file import (
    FORMATS,
    UnusableImage,
    is_16_bit,
    load_image,
    no_limit_of_pillow,
    open_image,
    orientation,
    to_rgb,
)
from t2idist.data.pillow import Image
from t2idist.data.sample_format import MAX_PIXELS
from t2idist.ingest.rejects import Reason

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
MAX_MEGAPIXELS = MAX_PIXELS >> 20
_LOSSY = ("JPEG", "MPO", "WEBP")
_BOX_GROWTH = 0.75
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def _keep_freed_memory() -> None:
    """Make glibc reuse the memory of earlier images. New pages from the system cost 10 % of the time on a VM."""
    with contextlib.suppress(OSError, AttributeError):
        tune = ctypes.CDLL(None).mallopt
        tune(_M_MMAP_THRESHOLD, 32 << 20)
        tune(_M_TRIM_THRESHOLD, 256 << 20)


_keep_freed_memory()


@dataclass(frozen=True)
class ImageOptions:
    """How images are stored."""

    size: int = 304
    """Pixels of the shorter side; larger images are resized to it. 0: no resizing."""
    quality: int = 95
    """JPEG quality, 1 to 100."""
    keep_original: bool = False
    """Store the original bytes, at full size."""
    max_megapixels: int = MAX_MEGAPIXELS
    """Images with more pixels, in units of 2^20, are left out."""
    pairs: bool = False
    """Each image is two of equal size; the stored one has them side by side."""


@dataclass(frozen=True)
class PreparedImage:
    """An image as it is stored."""

    data: bytes
    extension: str
    width: int
    height: int
    repairs: tuple[tuple[Reason, str], ...]
    """Reason and detail of each repair."""


def prepare_image(
    data: bytes, options: ImageOptions, box: tuple[float, float, float, float] | None = None
) -> PreparedImage:
    """Convert the bytes of an image file to those that are stored.

    Args:
        box: left, top, width and height of the box to crop around, as AttnGAN does for birds.

    Raises:
        UnusableImage: the image cannot be stored.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about unusual files; this module does its own checks
        image = _open(data, options)
        draft_size = 2 * options.size
        full_size = image.size
        if box is None and options.size and not options.keep_original and image.format in ("JPEG", "MPO"):
            image.draft(None, (draft_size, draft_size))  # at least this many pixels on both sides
        load_image(image)  # before EXIF is read: Pillow may load the image then, and hide the error
        upright = orientation(image) in (0, 1)
        unchanged = (
            box is None
            and upright
            and image.mode == "RGB"
            and not image.has_transparency_data
            and not is_16_bit(image, data)
            and image.size == full_size
            and _can_keep_bytes(image, options)
        )
        if unchanged:
            _check_stored_size(image)
            return PreparedImage(data, _EXTENSIONS[image.format or ""], *image.size, ())
        repairs: list[tuple[Reason, str]] = []
        source_format = image.format
        image = _repair(image, data, repairs)
    if box is not None:
        with no_limit_of_pillow():
            image = crop_to_box(image, box)
        full_size = image.size
    lossless = options.keep_original and source_format not in _LOSSY
    if not options.keep_original:
        image = _resize(image, options.size, full_size)
    _check_stored_size(image)
    return _encode(image, options.quality, lossless, tuple(repairs))


def prepare_pair(first: bytes, second: bytes | None, options: ImageOptions) -> PreparedImage:
    """Convert two image files of equal size, or one with two images side by side, to the bytes that are stored.

    Each image is resized by itself, so that none has pixels of the other.

    Raises:
        UnusableImage: an image cannot be stored, or the sizes differ.
    """
    repairs: list[tuple[Reason, str]] = []
    read = [_read_repaired(data, options, repairs) for data in (first, second) if data is not None]
    images = [image for image, _ in read]
    if second is None:
        width, height = images[0].size
        if width % 2:
            detail = f"it is {width} pixels wide, which is no two images of equal size side by side"
            raise UnusableImage(Reason.SIZES_DIFFER, detail)
        images = [images[0].crop((left, 0, left + width // 2, height)) for left in (0, width // 2)]
        is_small = not options.size or min(width // 2, height) <= options.size
        if not repairs and (is_small or options.keep_original):
            return prepare_image(first, replace(options, size=0))  # the original bytes if possible
    if images[0].size != images[1].size:
        sizes = " and ".join(f"{image.width} x {image.height}" for image in images)
        raise UnusableImage(Reason.SIZES_DIFFER, f"the images of the pair have {sizes} pixels; they must be equal")
    if not options.keep_original:
        images = [_resize(image, options.size, image.size) for image in images]
    width, height = images[0].size
    joined = Image.new("RGB", (2 * width, height))
    for place, image in enumerate(images):
        joined.paste(image, (place * width, 0))
    _check_stored_size(joined)
    lossless = options.keep_original and not any(name in _LOSSY for _, name in read)
    return _encode(joined, options.quality, lossless, tuple(repairs), full_colour=True)  # no colour crosses the middle


def _open(data: bytes, options: ImageOptions) -> Image.Image:
    """Read the header of an image file."""
    if not data:
        raise UnusableImage(Reason.ZERO_BYTES, "the file is empty")
    with no_limit_of_pillow():
        return open_image(data, FORMATS, options.max_megapixels << 20, "--max-megapixels")


def _repair(image: Image.Image, data: bytes, repairs: list[tuple[Reason, str]]) -> Image.Image:
    """Turn a loaded image upright and convert it to RGB; adds what was repaired."""
    if orientation(image) not in (0, 1):
        repairs.append((Reason.EXIF_ROTATION, f"orientation {orientation(image)}"))
        image = ImageOps.exif_transpose(image)
    return to_rgb(image, data, repairs)


def _read_repaired(
    data: bytes, options: ImageOptions, repairs: list[tuple[Reason, str]]
) -> tuple[Image.Image, str | None]:
    """Decode an image file at its full size, upright and in RGB; returns the format of the file, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _open(data, options)
        load_image(image)
        return _repair(image, data, repairs), image.format


def _check_stored_size(image: Image.Image) -> None:
    """Raise UnusableImage if training would refuse the image for its size."""
    if image.width * image.height > MAX_PIXELS:
        detail = f"{image.width} x {image.height} pixels would be stored; at most {MAX_PIXELS}, by a smaller --size"
        raise UnusableImage(Reason.TOO_MANY_PIXELS, detail)


def _can_keep_bytes(image: Image.Image, options: ImageOptions) -> bool:
    """Check whether the original bytes may be stored."""
    if _is_animated(image):
        return False
    if options.keep_original:
        return image.format in _EXTENSIONS
    return image.format in ("JPEG", "MPO") and (not options.size or min(image.size) <= options.size)


def _is_animated(image: Image.Image) -> bool:
    """Check whether the file is an animation. An MPO file, a JPEG with a second image in it, is not."""
    return image.format != "MPO" and bool(getattr(image, "is_animated", False))  # not all formats have it


def square_crop(box: tuple[float, float, float, float], width: int, height: int) -> tuple[int, int, int, int]:
    """Return (left, upper, right, lower) of AttnGAN's crop: half-side 0.75 * the longer side of the box, clipped."""
    x, y, box_width, box_height = box
    half = int(max(box_width, box_height) * _BOX_GROWTH)
    centre_x, centre_y = int((2 * x + box_width) / 2), int((2 * y + box_height) / 2)
    left, upper = max(0, centre_x - half), max(0, centre_y - half)
    right, lower = min(width, centre_x + half), min(height, centre_y + half)
    return left, upper, right, lower


def crop_to_box(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    left, upper, right, lower = square_crop(box, *image.size)
    if right <= left or lower <= upper:
        raise UnusableImage(
            Reason.BAD_BOX, f"box {box} is outside the {image.width} x {image.height} pixels of the image"
        )
    return image.crop((left, upper, right, lower))


def _resize(image: Image.Image, size: int, full_size: tuple[int, int]) -> Image.Image:
    """Resize the shorter side to `size`, never up; the longer side is rounded down, as the papers' loaders do.

    Args:
        full_size: size before JPEG draft mode reduced it.
    """
    shorter, longer = sorted(full_size)
    if not size or shorter <= size:
        return image
    other = max(size, int(size * longer / shorter))
    wanted = (size, other) if image.width <= image.height else (other, size)
    # the antialiased filter of torch equals Pillow's in half the time; one value in a thousand differs by 1
    pixels = torch.from_numpy(np.array(image)).unsqueeze(0).permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(pixels, wanted[::-1], mode="bilinear", antialias=True)
    return Image.fromarray(small.permute(0, 2, 3, 1)[0].contiguous().numpy())


def _encode(
    image: Image.Image,
    quality: int,
    lossless: bool,
    repairs: tuple[tuple[Reason, str], ...],
    *,
    full_colour: bool = False,
) -> PreparedImage:
    """Encode an image. `full_colour`: a JPEG keeps the colour of each pixel, not the mean of four."""
    out = io.BytesIO()
    try:
        if lossless:
            image.save(out, "PNG")
        else:
            image.save(out, "JPEG", quality=quality, **({"subsampling": "4:4:4"} if full_colour else {}))
    except (OSError, ValueError) as error:  # for example a side longer than 65,535 pixels
        raise UnusableImage(Reason.DAMAGED, f"does not encode: {error}"[:200]) from None
    return PreparedImage(out.getvalue(), "png" if lossless else "jpg", *image.size, repairs)


def decode_rgb(data: bytes, extension: str) -> Image.Image:
    """Decode a stored image in the format of its extension, no other. Raises ValueError with the reason."""
    formats = [name for name, its in _EXTENSIONS.items() if its == extension and name != "MPO"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = open_image(data, formats)
            load_image(image)
        except UnusableImage as error:
            raise ValueError(f"does not decode: {error}") from None
        return image.convert("RGB")
