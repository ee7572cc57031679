"""Image transforms."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageFile

from t2idist.data import transforms
from t2idist.data.order import random_bits
from t2idist.data.samples import DecodedImage, EncodedImage
from t2idist.data.transforms import crop_and_flip, decode, fill_pyramid, pixels_of, shorter_side
from tests.helpers.shard_sets import png_image


def undrafted(image: Image.Image) -> DecodedImage:
    return DecodedImage(pixels_of(image), image.size)


def rgb(pixels: np.ndarray) -> np.ndarray:
    """Return pixels (H, W) as (H, W, 3)."""
    return np.ascontiguousarray(pixels)[..., None].view(np.uint8)[..., :3]


def gray_noise(width: int, height: int, sigma: float = 60) -> Image.Image:
    """Return noise that is the same at every call; that of `Image.effect_noise` is not."""
    values = np.random.default_rng(width).normal(128, sigma, (height, width))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def photo(width: int, height: int) -> Image.Image:
    """Return an image with structure at several scales, the finest weak, as in photographs."""
    scales = [gray_noise(width // by, height // by, 90).resize((width, height), 3) for by in (64, 16)]
    return Image.merge("RGB", [Image.blend(*scales, share) for share in (0.1, 0.3, 0.5)])


@pytest.mark.parametrize(("size", "factor"), [((900, 601), 1), ((1216, 1219), 2), ((3001, 2500), 4)])
def test_large_jpegs_decode_at_a_fraction_with_the_same_crop(size: tuple[int, int], factor: int):
    out = io.BytesIO()
    photo(*size).save(out, "JPEG", quality=95)
    whole = decode(EncodedImage(out.getvalue(), "jpg"))
    drafted = decode(EncodedImage(out.getvalue(), "jpg"), shorter_side(256, 304 / 256))
    assert drafted.size == whole.size == size
    assert drafted.pixels.shape[::-1] == tuple(-(-side // factor) for side in size)
    for bits in [*random_bits(1, 0, 4), None]:
        one, other = (
            rgb(crop_and_flip(decoded, 256, 304 / 256, True, bits)).astype(int) for decoded in (whole, drafted)
        )
        assert np.abs(one - other).mean() < 0.6


def test_crop_equals_resize_then_crop_and_pyramid_equals_pillow():
    image = gray_noise(150, 90).convert("RGB")
    bits = random_bits(1, 1, 1)[0]
    whole = image.resize((round(150 * 76 / 90), 76), Image.Resampling.BILINEAR)
    x, y = int(bits[0]) % (whole.width - 64 + 1), int(bits[1]) % (76 - 64 + 1)
    expected = np.asarray(whole.crop((x, y, x + 64, y + 64))).astype(int)
    cropped = crop_and_flip(undrafted(image), 64, 76 / 64, False, bits)
    assert np.abs(rgb(cropped).astype(int) - expected).max() <= 2
    pixels = np.stack([cropped, np.rot90(cropped)])
    images = [Image.fromarray(rgb(each)) for each in pixels]
    high, *lower = [np.empty((2, 3, size, size), np.uint8) for size in (64, 16, 32)]
    fill_pyramid(pixels, [*lower, high])
    assert np.array_equal(high, np.stack([rgb(each) for each in pixels]).transpose(0, 3, 1, 2))
    for low in lower:
        size = low.shape[-1]
        for ours, each in zip(low, images, strict=True):
            theirs = np.asarray(each.resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
            assert np.abs(ours.astype(int) - theirs).max() <= 1  # equal on x86; other processors round differently


def test_flips_are_random_in_training_only():
    image = gray_noise(64, 64).convert("RGB")
    results = [rgb(crop_and_flip(undrafted(image), 64, 1.0, True, bits)) for bits in random_bits(1, 0, 40)]
    mirrored = sum(np.array_equal(m, np.asarray(image)[:, ::-1]) for m in results)
    straight = sum(np.array_equal(m, np.asarray(image)) for m in results)
    assert mirrored + straight == 40 and 8 <= mirrored <= 32
    assert np.array_equal(rgb(crop_and_flip(undrafted(image), 64, 1.0, True, None)), np.asarray(image))


def test_the_centre_is_cropped_where_no_crop_is_drawn():
    image = gray_noise(64, 80).convert("RGB")
    centre = np.asarray(image)[8:72]
    crops = [rgb(crop_and_flip(undrafted(image), 64, 1.0, False, bits, False)) for bits in random_bits(1, 0, 8)]
    assert all(np.array_equal(crop, centre) for crop in crops)
    assert not all(
        np.array_equal(rgb(crop_and_flip(undrafted(image), 64, 1.0, False, bits)), centre)
        for bits in random_bits(1, 0, 8)
    )


def test_decode_lays_transparency_on_white_and_reports_damage():
    out = io.BytesIO()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(out, "PNG")
    assert (rgb(decode(EncodedImage(out.getvalue(), "png")).pixels) == 255).all()
    with pytest.raises(ValueError, match="does not decode"):
        decode(EncodedImage(png_image(1)[:-400], "png"))
    with pytest.raises(ValueError, match="does not decode"):
        decode(EncodedImage(png_image(1), "jpg"))  # only the decoder of the extension is tried
    out = io.BytesIO()
    Image.new("1", (9000, 9000)).save(out, "PNG")
    with pytest.raises(ValueError, match="9000 x 9000 pixels"):
        decode(EncodedImage(out.getvalue(), "png"))


def jpeg(number: int) -> bytes:
    """Return one of the many forms of a JPEG: its size, structure, quality, chroma and order of the scans vary."""
    rng = np.random.default_rng(number)
    width, height = (int(side) for side in rng.integers(1, 300, 2))
    image = photo(max(width, 64), max(height, 64)).crop((0, 0, width, height)) if number % 3 else noise(width, height)
    out = io.BytesIO()
    if number % 5 == 0:
        image = image.convert("L")
    chroma: dict[str, int | bool] = {"subsampling": number % 4 % 3} if image.mode == "RGB" else {}
    if number % 11 == 0 and image.mode == "RGB":
        chroma = {"keep_rgb": True}
    image.save(
        out, "JPEG", quality=int(rng.integers(2, 100)), progressive=number % 2 == 0, optimize=number % 7 == 0,
        restart_marker_rows=number % 3, **chroma,
    )  # fmt: skip
    return out.getvalue()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("shorter", [None, 8, 30])
def test_jpegs_decode_to_the_same_pixels_as_by_pillow(shorter: int | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ImageFile, "MAXBLOCK", 1 << 20)  # Pillow's own is too small to write some of these
    for number in range(120):
        encoded = EncodedImage(jpeg(number), "jpg", b"v")
        ours, theirs = decode(encoded, shorter), transforms._decode_with_pillow(encoded, shorter)
        assert ours.size == theirs.size and ours.vectors == theirs.vectors
        assert np.array_equal(rgb(ours.pixels), rgb(theirs.pixels)), (number, ours.size)


def test_other_jpegs_are_left_to_pillow():
    out = io.BytesIO()
    noise(90, 90).convert("CMYK").save(out, "JPEG")
    several = io.BytesIO()
    noise(90, 90).save(several, "MPO", save_all=True, append_images=[noise(90, 80)])
    for data in (out.getvalue(), several.getvalue()):
        ours, theirs = (each(EncodedImage(data, "jpg"), 8) for each in (decode, transforms._decode_with_pillow))
        assert np.array_equal(rgb(ours.pixels), rgb(theirs.pixels))
    whole = jpeg(1)
    for cut in (2, 10, 200, len(whole) - 2):
        with pytest.raises(ValueError, match="does not decode"):
            decode(EncodedImage(whole[:cut], "jpg"))
