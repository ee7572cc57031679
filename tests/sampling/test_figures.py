"""Grids, attention figures, and reading of images."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from t2idist.ingest.image import ImageOptions, prepare_image
from t2idist.sampling import figures
from tests.sampling.conftest import write_image


def flat_images(*levels: float, size: int = 8) -> Tensor:
    """One image (3, size, size) of each grey level."""
    return torch.stack([torch.full((3, size, size), level) for level in levels])


def test_grid_shows_all_scales_at_the_same_size() -> None:
    low, high = flat_images(-1.0, -0.5, 0.0, 0.5, size=4), flat_images(-1.0, -0.5, 0.0, 0.5, size=8)
    sheet = np.asarray(figures.grid([low, high], ["one", "two"], columns=2, real=flat_images(0.25, 0.75)))
    cell = figures._cell_size(8)
    assert cell >= 96 and cell % 8 == 0
    top, left = 30 + cell // 2, figures.CAPTION_WIDTH + cell // 2
    step, block = cell + figures.GAP, figures.BLOCK_GAP
    x = [left, left + step + block, left + 2 * step + block, left + 3 * step + 2 * block, left + 4 * step + 2 * block]
    levels = [[int(sheet[top + row * step, column, 0]) for column in x] for row in range(2)]
    assert levels == [[159, 0, 64, 0, 64], [223, 128, 191, 128, 191]]
    assert (sheet[:, : figures.CAPTION_WIDTH] < 100).any()  # the text of the captions


def test_grid_rejects_wrong_number_of_images() -> None:
    with pytest.raises(ValueError, match="3 images; 2 captions in 2 columns need 4"):
        figures.grid([flat_images(0, 0, 0)], ["one", "two"], columns=2)


def test_grid_shows_names_and_style_images_above_columns() -> None:
    images, styles = torch.zeros(4, 3, 96, 96), flat_images(-1.0, 1.0, size=96)
    plain = np.asarray(figures.grid([images, images], ["one", "two"], 2))
    sheet = np.asarray(
        figures.grid([images, images], ["one", "two"], 2, column_names=["left", "right"], style_images=styles)
    )
    added = figures.NAMES_HEIGHT + 96 + figures.BLOCK_GAP
    assert sheet.shape == (plain.shape[0] + added, *plain.shape[1:])
    assert np.array_equal(sheet[figures.HEADER_HEIGHT + added :], plain[figures.HEADER_HEIGHT :])
    y = figures.HEADER_HEIGHT + figures.NAMES_HEIGHT + 48
    x = [
        figures.CAPTION_WIDTH + 48 + column * 100 + block * (200 + figures.BLOCK_GAP)
        for block in (0, 1)
        for column in (0, 1)
    ]
    assert [int(sheet[y, column, 0]) for column in x] == [0, 255, 0, 255]
    names = sheet[figures.HEADER_HEIGHT : figures.HEADER_HEIGHT + figures.NAMES_HEIGHT]
    assert all((names[:, column - 48 : column + 40] < 100).any() for column in x)


def test_attention_map_is_bright_at_large_weights() -> None:
    maps = torch.zeros(3, 8, 8)
    maps[0, :4], maps[1, 4:] = 0.9, 0.9
    sheet = np.asarray(figures.attention_figure(flat_images(0.0)[0], ["up", "down"], [maps]), dtype=float)
    cell = figures._cell_size(8)
    y, x = figures.GAP + 28, figures.BLOCK_GAP * 3 + cell
    up, down = sheet[y : y + cell, x : x + cell], sheet[y : y + cell, x + cell + 2 * figures.GAP :][:, :cell]
    half = cell // 2 - 8
    assert up[:half].mean() > up[-half:].mean() + 60
    assert down[-half:].mean() > down[:half].mean() + 60
    with pytest.raises(ValueError, match="3 maps for 4 words"):
        figures.attention_figure(flat_images(0.0)[0], ["a", "b", "c", "d"], [maps])


def test_attention_figure_wraps_many_words() -> None:
    one = figures.attention_figure(flat_images(0.0)[0], ["w"] * 9, [torch.rand(18, 4, 4)])
    two = figures.attention_figure(flat_images(0.0)[0], ["w"] * 18, [torch.rand(18, 4, 4)])
    assert two.width == one.width and two.height > 1.7 * one.height


def test_read_image_crops_the_central_square(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3))
    wide[:, 8:16] = 255
    image = figures.read_image(write_image(tmp_path / "wide.PNG", wide), 8)
    assert image.shape == (3, 8, 8) and torch.equal(image, torch.ones(3, 8, 8))
    assert figures.read_image(write_image(tmp_path / "wide.jpeg", wide), 4).shape == (3, 4, 4)
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes((tmp_path / "wide.PNG").read_bytes()[:40])
    for url, reason in (
        (str(damaged), "does not decode"),
        (str(tmp_path / "no.png"), "No such file"),
        (write_text(tmp_path / "text.png"), "not JPEG, PNG, WEBP"),
        (write_text(tmp_path / "empty.png", ""), "the file is empty"),
    ):
        with pytest.raises(ValueError, match=reason):
            figures.read_image(url, 8)


def write_text(path: Path, text: str = "no image") -> str:
    path.write_text(text)
    return str(path)


def write_unusual_images(folder: Path) -> dict[str, str]:
    """Write a gradient as files that a plain decoder reads wrongly; returns their paths by what is unusual."""
    ramp = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (32, 1))
    grey, rgb = Image.fromarray(ramp), Image.fromarray(np.stack([ramp, ramp.T, ramp], axis=-1))
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = rgb.copy()
    clear.putalpha(Image.fromarray(ramp.T))
    files = {name: folder / name for name in ("turned.jpg", "sixteen.png", "a.gif", "a.bmp", "a.tiff", "clear.webp")}
    rgb.save(files["turned.jpg"], exif=exif, quality=95)
    Image.fromarray(ramp.astype(np.uint16) * 257).save(files["sixteen.png"])
    grey.save(files["a.gif"])
    rgb.save(files["a.bmp"])
    rgb.convert("CMYK").save(files["a.tiff"])
    clear.save(files["clear.webp"], lossless=True)
    rgb.save(folder / "png-in-truth.jpg", format="PNG")
    (folder / "without-extension").write_bytes((folder / "png-in-truth.jpg").read_bytes())
    return {path.name: str(path) for path in folder.iterdir()}


def test_read_image_sees_what_the_sharding_tools_store(tmp_path: Path) -> None:
    """EXIF orientation, 16 bits, transparency, CMYK, and formats by content, not by name."""
    for name, path in write_unusual_images(tmp_path).items():
        read = figures.read_image(path, 32)
        stored = prepare_image(Path(path).read_bytes(), ImageOptions(size=32, quality=100))
        pixels = np.asarray(Image.open(io.BytesIO(stored.data)).convert("RGB")).astype(float)
        seen = (read.permute(1, 2, 0).numpy() + 1) * 127.5
        # what is stored is a JPEG, which changes values of a gradient by a few units; a turn changes them by 255
        assert np.abs(pixels - seen).max() < 12, name
        assert np.ptp(seen) > 200, name
