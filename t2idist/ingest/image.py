"""One picture on its way into a shard: checked by its header, decoded, put right, cropped, resized, encoded."""

from __future__ import annotations

import contextlib
import ctypes
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import ImageOps, UnidentifiedImageError

from t2idist.data.pillow import Image
from t2idist.data.sample_format import MAX_PIXELS
from t2idist.ingest.rejects import Reason

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_ORIENTATION = 0x0112
_BITS_PER_SAMPLE = 258
_BOX_GROWTH = 0.75
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def _keep_memory() -> None:
    """Have the C library (glibc) keep what pictures have used: else each one's pages come anew from the system.

    On a virtual machine that costs a tenth of the time.
    """
    with contextlib.suppress(OSError, AttributeError):
        tune = ctypes.CDLL(None).mallopt
        tune(_M_MMAP_THRESHOLD, 32 << 20)
        tune(_M_TRIM_THRESHOLD, 256 << 20)


_keep_memory()


@dataclass(frozen=True)
class PictureOptions:
    """size: pixels of the shorter side, larger pictures are made that small (0: none is). quality: of JPEG, 1 to 100.

    keep_original: store the bytes of every usable picture as they are, at full size.
    """

    size: int = 304
    quality: int = 95
    keep_original: bool = False


@dataclass(frozen=True)
class Prepared:
    """A picture as it is stored. repairs: what was put right, with details."""

    data: bytes
    extension: str
    width: int
    height: int
    repairs: tuple[tuple[Reason, str], ...]


class Unusable(Exception):
    """A picture that is left out."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def prepare(data: bytes, options: PictureOptions, box: tuple[float, float, float, float] | None = None) -> Prepared:
    """The picture as it is to be stored; raises Unusable.

    box: left, top, width, height of what to crop around, as AttnGAN does for birds.
    """
    if not data:
        raise Unusable(Reason.ZERO_BYTES, "the file is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's on odd files; what counts is checked here
        image = _open(data, _FORMATS)
        draft_size = 2 * options.size
        full_size = image.size
        if box is None and options.size and not options.keep_original and image.format in ("JPEG", "MPO"):
            image.draft(None, (draft_size, draft_size))  # keeps at least that many pixels on both sides
        _load(image)  # before EXIF is asked for: Pillow may load for that, and what is wrong would be lost
        upright = _orientation(image) in (0, 1)
        kept_as_it_is = (
            box is None
            and upright
            and image.mode == "RGB"
            and not image.has_transparency_data
            and not _sixteen_bit(image, data)
            and image.size == full_size
            and _fits(image, options)
        )
        if kept_as_it_is:
            return Prepared(data, _EXTENSIONS[image.format or ""], *image.size, ())
        repairs: list[tuple[Reason, str]] = []
        source_format = image.format
        if not upright:
            repairs.append((Reason.EXIF_ROTATION, f"orientation {_orientation(image)}"))
            image = ImageOps.exif_transpose(image)
        image = _to_rgb(image, data, repairs)
    if box is not None:
        image = crop_to_box(image, box)
        full_size = image.size
    lossless = options.keep_original and source_format not in ("JPEG", "MPO", "WEBP")
    if not options.keep_original:
        image = _resize(image, options.size, full_size)
    return _encode(image, options.quality, lossless, tuple(repairs))


def _open(data: bytes, formats: Sequence[str]) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=list(formats))
    except Image.DecompressionBombError as error:
        raise Unusable(Reason.TOO_MANY_PIXELS, str(error)[:200]) from None
    except Exception as error:  # a damaged header makes Pillow raise nearly anything
        if "truncated" in str(error).lower():
            raise Unusable(Reason.TRUNCATED, f"{type(error).__name__}: {error}"[:200]) from None
        detail = "" if isinstance(error, UnidentifiedImageError) else f": {type(error).__name__}: {error}"
        raise Unusable(Reason.NOT_A_PICTURE, f"not {', '.join(formats)}{detail}"[:200]) from None
    if image.width * image.height > MAX_PIXELS:
        raise Unusable(Reason.TOO_MANY_PIXELS, f"{image.width} x {image.height} pixels; at most {MAX_PIXELS}")
    return image


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        reason = Reason.TRUNCATED if "truncated" in str(error).lower() else Reason.DAMAGED
        raise Unusable(reason, f"{type(error).__name__}: {error}"[:200]) from None


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF says nothing
        return 1
    return value if isinstance(value, int) and 0 <= value <= 8 else 1


def _fits(image: Image.Image, options: PictureOptions) -> bool:
    """Whether the file's own bytes may be stored."""
    if _plays(image):
        return False
    if options.keep_original:
        return image.format in _EXTENSIONS
    return image.format in ("JPEG", "MPO") and (not options.size or min(image.size) <= options.size)


def _plays(image: Image.Image) -> bool:
    """Whether the file is an animation (a phone's second JPEG in the file is none)."""
    return image.format != "MPO" and bool(getattr(image, "is_animated", False))  # only some formats have it


def _sixteen_bit(image: Image.Image, data: bytes) -> bool:
    if image.format == "PNG":
        return data[24] == 16  # the bit depth in IHDR; Pillow does not keep it for colour
    if image.mode.startswith("I"):
        return True
    if image.format == "TIFF":
        bits = image.getexif().get(_BITS_PER_SAMPLE, 8)
        return any(int(count) > 8 for count in (bits if isinstance(bits, tuple) else (bits,)))
    return False


def _to_rgb(image: Image.Image, data: bytes, repairs: list[tuple[Reason, str]]) -> Image.Image:
    """In RGB, on white where it is transparent; what had to be done is added to `repairs`."""
    mode = image.mode
    if _sixteen_bit(image, data):
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
    elif mode not in ("RGB", "RGBA"):
        repairs.append((Reason.OTHER_COLOURS, f"mode {mode}"))
    try:
        if image.has_transparency_data:
            repairs.append((Reason.ALPHA, "laid on white"))
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")
    except ValueError as error:
        raise Unusable(Reason.DAMAGED, f"mode {mode} cannot be made RGB: {error}"[:200]) from None


def square_around(box: tuple[float, float, float, float], width: int, height: int) -> tuple[int, int, int, int]:
    """Left, upper, right, lower of AttnGAN's crop: half-side 0.75 of the box's longer side, cut at the picture."""
    x, y, box_width, box_height = box
    half = int(max(box_width, box_height) * _BOX_GROWTH)
    centre_x, centre_y = int((2 * x + box_width) / 2), int((2 * y + box_height) / 2)
    left, upper = max(0, centre_x - half), max(0, centre_y - half)
    right, lower = min(width, centre_x + half), min(height, centre_y + half)
    return left, upper, right, lower


def crop_to_box(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    left, upper, right, lower = square_around(box, *image.size)
    if right <= left or lower <= upper:
        raise Unusable(Reason.BAD_BOX, f"box {box} leaves nothing of {image.width} x {image.height} pixels")
    return image.crop((left, upper, right, lower))


def _resize(image: Image.Image, size: int, full_size: tuple[int, int]) -> Image.Image:
    """Shorter side `size`, never larger than it was; the longer side rounded down, as the papers' loaders do.

    full_size: of the picture before a draft made it smaller.
    """
    shorter, longer = sorted(full_size)
    if not size or shorter <= size:
        return image
    other = max(size, int(size * longer / shorter))
    wanted = (size, other) if image.width <= image.height else (other, size)
    # torch's antialiased filter is Pillow's in half the time; one value in a thousand differs from it, by 1
    pixels = torch.from_numpy(np.array(image)).unsqueeze(0).permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(pixels, wanted[::-1], mode="bilinear", antialias=True)
    return Image.fromarray(small.permute(0, 2, 3, 1)[0].contiguous().numpy())


def _encode(image: Image.Image, quality: int, lossless: bool, repairs: tuple[tuple[Reason, str], ...]) -> Prepared:
    out = io.BytesIO()
    try:
        if lossless:
            image.save(out, "PNG")
        else:
            image.save(out, "JPEG", quality=quality)
    except (OSError, ValueError) as error:  # such as a side of more than 65,535 pixels
        raise Unusable(Reason.DAMAGED, f"does not encode: {error}"[:200]) from None
    return Prepared(out.getvalue(), "png" if lossless else "jpg", *image.size, repairs)


def decode_rgb(data: bytes, extension: str) -> Image.Image:
    """A stored picture, decoded by the one format that its extension names; raises ValueError with the reason."""
    formats = [name for name, its in _EXTENSIONS.items() if its == extension and name != "MPO"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = _open(data, formats)
            _load(image)
        except Unusable as error:
            raise ValueError(f"does not decode: {error}") from None
        return image.convert("RGB")
