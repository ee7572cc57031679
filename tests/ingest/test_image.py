"""Preparation of single images: repairs, exclusion, sizes and crops."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from t2idist.data.image_file import UnusableImage
from t2idist.data.samples import EncodedImage
from t2idist.data.transforms import decode
from t2idist.ingest.image import ImageOptions, prepare_image, square_crop
from t2idist.ingest.rejects import Reason
from tests.helpers.image_files import encode, make_image


def with_orientation(number: int) -> bytes:
    image = make_image(60, 40)
    exif = Image.Exif()
    exif[0x0112] = number
    return encode(image, exif=exif)


def make_16_bit_image() -> Image.Image:
    return Image.fromarray((np.arange(40 * 60, dtype=np.uint16) * 27).reshape(40, 60))


def make_grey(highest: float, kind: type[Any]) -> Image.Image:
    """Return a gradient of grey from 0 to `highest`."""
    return Image.fromarray((np.linspace(0, 1, 40 * 60).reshape(40, 60) * highest).astype(kind))


GOOD = encode(make_image())
REPAIRED: list[tuple[str, Callable[[], bytes], set[Reason]]] = [
    ("grey", lambda: encode(make_image(mode="L")), {Reason.GREY}),
    ("cmyk", lambda: encode(make_image(mode="CMYK")), {Reason.CMYK}),
    ("16 bit", lambda: encode(make_16_bit_image(), "PNG"), {Reason.SIXTEEN_BIT, Reason.GREY}),
    ("16 bit tiff", lambda: encode(make_16_bit_image(), "TIFF"), {Reason.SIXTEEN_BIT, Reason.GREY}),
    ("palette", lambda: encode(make_image(mode="P"), "PNG"), {Reason.PALETTE}),
    ("gif", lambda: encode(make_image(mode="P"), "GIF"), {Reason.PALETTE}),
    ("alpha", lambda: encode(make_image(mode="RGBA"), "PNG"), {Reason.ALPHA}),
    ("grey alpha", lambda: encode(make_image(mode="LA"), "PNG"), {Reason.GREY, Reason.ALPHA}),
    ("float", lambda: encode(make_grey(1, np.float32), "TIFF"), {Reason.OTHER_COLOURS}),
    ("32 bit", lambda: encode(make_grey(255, np.int32), "TIFF"), {Reason.OTHER_COLOURS, Reason.GREY}),
    ("lab", lambda: encode(make_image().convert("YCbCr"), "TIFF"), {Reason.OTHER_COLOURS}),
    ("rotated", lambda: with_orientation(6), {Reason.EXIF_ROTATION}),
]
EXCLUDED: list[tuple[str, Callable[[], bytes], Reason]] = [
    ("empty", lambda: b"", Reason.ZERO_BYTES),
    ("text", lambda: b"<html>not found</html>", Reason.NOT_AN_IMAGE),
    ("cut jpeg", lambda: GOOD[: len(GOOD) // 2], Reason.TRUNCATED),
    ("cut png", lambda: encode(make_image(), "PNG")[:-60], Reason.TRUNCATED),
    ("rotten png", lambda: encode(make_image(), "PNG")[:60] + bytes(200), Reason.DAMAGED),
    ("float below 0", lambda: encode(make_grey(-1, np.float32), "TIFF"), Reason.DAMAGED),
    ("no numbers", lambda: encode(make_grey(float("nan"), np.float32), "TIFF"), Reason.DAMAGED),
    ("32 bit above 16", lambda: encode(make_grey(2**20, np.int32), "TIFF"), Reason.DAMAGED),
    ("bomb", lambda: encode(Image.new("1", (10_000, 10_000)), "PNG"), Reason.TOO_MANY_PIXELS),
    ("big bomb", lambda: encode(Image.new("1", (20_000, 20_000)), "PNG"), Reason.TOO_MANY_PIXELS),
]


@pytest.mark.parametrize(("make", "reasons"), [row[1:] for row in REPAIRED], ids=[row[0] for row in REPAIRED])
def test_unusual_images_are_repaired_with_a_reason(make: Callable[[], bytes], reasons: set[Reason]):
    for options in (ImageOptions(size=20), ImageOptions(keep_original=True)):
        prepared = prepare_image(make(), options)
        assert {reason for reason, _ in prepared.repairs} == reasons
        image = Image.open(io.BytesIO(prepared.data))
        assert image.mode == "RGB" and image.size == (prepared.width, prepared.height)
        assert image.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize(("make", "reason"), [row[1:] for row in EXCLUDED], ids=[row[0] for row in EXCLUDED])
def test_unusable_images_are_excluded_with_a_reason(make: Callable[[], bytes], reason: Reason):
    with pytest.raises(UnusableImage) as caught:
        prepare_image(make(), ImageOptions())
    assert caught.value.reason is reason


def test_repairs_keep_the_appearance():
    rotated = np.asarray(Image.open(io.BytesIO(prepare_image(with_orientation(6), ImageOptions()).data)).convert("RGB"))
    straight = np.asarray(make_image(60, 40))
    assert rotated.shape == (60, 40, 3)
    assert np.abs(np.rot90(straight, -1).astype(int) - rotated).mean() < 4  # orientation 6: turn clockwise to view
    red = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    seen = Image.open(io.BytesIO(prepare_image(encode(red, "PNG"), ImageOptions()).data))
    assert seen.getpixel((4, 4)) == (255, 255, 255)
    deep = Image.open(
        io.BytesIO(prepare_image(encode(make_16_bit_image(), "PNG"), ImageOptions(keep_original=True)).data)
    )
    expected = np.asarray(make_16_bit_image()) >> 8
    assert np.array_equal(np.asarray(deep)[..., 1], expected)


@pytest.mark.parametrize(
    ("highest", "kind"), [(1, np.float32), (255, np.float32), (65535, np.float32), (255, np.int32), (65535, np.int32)]
)
def test_values_of_32_bits_keep_their_brightness(highest: int, kind: type[Any]):
    prepared = prepare_image(encode(make_grey(highest, kind), "TIFF"), ImageOptions(keep_original=True))
    expected = np.asarray(make_grey(255, np.float32))
    found = np.asarray(Image.open(io.BytesIO(prepared.data)))[..., 0]
    assert np.abs(found - expected).max() <= 1  # rounding of both
    assert f"read as 0 to {highest}" in str(prepared.repairs)


def test_sizes_and_original_bytes():
    def size(data: bytes, **options: object) -> tuple[int, int]:
        prepared = prepare_image(data, ImageOptions(**options))  # type: ignore[arg-type]
        return prepared.width, prepared.height

    large = encode(make_image(700, 467))
    assert size(large, size=304) == (455, 304)
    assert size(encode(make_image(467, 700)), size=304) == (304, 455)
    assert size(large, size=0) == (700, 467)
    assert size(encode(make_image(200, 100)), size=304) == (200, 100)  # never enlarged
    huge = make_image(2400, 1600)
    drafted = Image.open(io.BytesIO(prepare_image(encode(huge, quality=95), ImageOptions(size=304)).data))
    exact = huge.resize((456, 304), Image.Resampling.BILINEAR)
    assert drafted.size == (456, 304)
    assert np.abs(np.asarray(drafted).astype(int) - np.asarray(exact)).mean() < 2
    small = encode(make_image(200, 100))
    assert prepare_image(small, ImageOptions(size=304)).data == small
    assert prepare_image(large, ImageOptions(size=304)).data != large
    for image_format in ("PNG", "WEBP"):
        data = encode(make_image(200, 100), image_format)
        assert prepare_image(data, ImageOptions(size=304)).extension == "jpg"
        assert prepare_image(data, ImageOptions(keep_original=True)).data == data
    assert prepare_image(encode(make_image(200, 100), "BMP"), ImageOptions(keep_original=True)).extension == "png"


def test_the_first_frame_of_an_animation_is_stored():
    frames = [make_image(seed=seed) for seed in (1, 2)]
    data = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], duration=100, lossless=True)
    prepared = prepare_image(data, ImageOptions(keep_original=True))
    assert prepared.data != data and prepared.extension == "jpg"
    seen = np.asarray(Image.open(io.BytesIO(prepared.data))).astype(int)
    assert np.abs(seen - np.asarray(frames[0])).mean() < 4


@pytest.mark.parametrize(
    ("box", "size", "crop"),
    [
        ((60, 27, 325, 304), (500, 335), (0, 0, 465, 335)),
        ((139, 30, 153, 264), (300, 400), (17, 0, 300, 360)),
        ((5, 5, 20, 10), (64, 48), (0, 0, 30, 25)),
    ],
)
def test_crops_equal_those_of_the_papers(
    box: tuple[float, float, float, float], size: tuple[int, int], crop: tuple[int, int, int, int]
):
    assert square_crop(box, *size) == crop
    prepared = prepare_image(encode(make_image(*size)), ImageOptions(size=0), box)
    assert (prepared.width, prepared.height) == (crop[2] - crop[0], crop[3] - crop[1])
    with pytest.raises(UnusableImage, match="bad_box"):
        prepare_image(encode(make_image(*size)), ImageOptions(), (900, 900, 10, 10))


def test_damaged_images_are_excluded_or_decodable():
    rng = np.random.default_rng(0)
    sources = [encode(make_image(), f) for f in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]
    unusable = 0
    for number in range(300):
        data = bytearray(sources[number % len(sources)])
        for position in rng.integers(0, len(data), 1 + number % 9):
            data[position] = rng.integers(256)
        try:
            prepared = prepare_image(bytes(data), ImageOptions(size=20, keep_original=number % 2 == 0))
            decode(EncodedImage(prepared.data, prepared.extension))  # the training reader decodes what is stored
        except UnusableImage:
            unusable += 1
    assert 30 < unusable < 270


def test_the_limit_of_pixels_is_named_and_can_be_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)  # Pillow's own limit does not stand in the way
    large = encode(Image.new("1", (2000, 2000)), "PNG")
    with pytest.raises(UnusableImage) as error:
        prepare_image(large, ImageOptions(size=64, max_megapixels=3))
    assert error.value.detail == "2000 x 2000 pixels; at most 3145728; --max-megapixels 4 allows it"
    prepared = prepare_image(large, ImageOptions(size=64, max_megapixels=4))
    assert (prepared.width, prepared.height) == (64, 64)
    monkeypatch.setattr("t2idist.ingest.image.MAX_PIXELS", 3 << 20)
    with pytest.raises(UnusableImage, match="2000 x 2000 pixels would be stored; at most 3145728"):
        prepare_image(large, ImageOptions(size=2000, max_megapixels=4))
