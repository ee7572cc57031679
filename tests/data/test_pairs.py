"""Pairs of images, outlines, and batches of two domains without pairs."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from t2idist.config import DataConfig
from t2idist.contract import Batch
from t2idist.data.loader import LoaderSpec, load_split
from t2idist.data.mixing import UnpairedLoader, open_mixed_loader
from t2idist.data.pairs import halves, outlines
from t2idist.data.sample_format import SampleRecord
from t2idist.data.samples import DecodedImage
from t2idist.data.shards import Dataset
from t2idist.data.sources import open_dataset
from tests.helpers.shard_sets import assert_same_on_device, make_loader, make_sample, png_image, take_batches, write_set

CONFIG = DataConfig(max_words=5, threads=2)


def pair_sample(number: int, split: str = "train") -> SampleRecord:
    """A pair, side by side: 20 x 24 pixels each, the right one is the inverse of the left one."""
    left = Image.open(io.BytesIO(png_image(number)))
    joined = Image.new("RGB", (40, 24))
    joined.paste(left, (0, 0))
    joined.paste(ImageOps.invert(left), (20, 0))
    out = io.BytesIO()
    joined.save(out, "PNG")
    return SampleRecord(split, f"p{number:04d}", out.getvalue(), "png", (), 40, 24)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    samples = [pair_sample(n, "train" if n < 50 else "test") for n in range(60)]
    return write_set(tmp_path_factory.mktemp("pairs") / "set", samples, options={"pairs": True})


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """60 training and 9 test samples with the attributes red, green and blue in turn."""
    samples = [make_sample(n, "train" if n < 60 else "test") for n in range(69)]
    return write_set(tmp_path_factory.mktemp("single") / "set", samples)


def test_both_images_of_a_pair_have_the_same_crop_and_flip(pairs: Dataset) -> None:
    assert pairs.paired and pairs.info.paired
    batches = take_batches(make_loader(pairs, [0, 1, 2, 3]), 4)
    crops = set()
    for batch in batches:
        for image, partner in zip(batch.images, batch.partners, strict=True):
            assert image.shape == partner.shape
            difference = (image.int() + partner.int() - 255).abs()
            assert int(difference.max()) <= 2, "the partner is the inverse, up to rounding"
        crops |= {image.numpy().tobytes() for image in batch.images[-1]}
    assert len(crops) > 50, "crops and flips differ between epochs"


def test_pairs_of_a_split_are_loaded_for_evaluation(pairs: Dataset) -> None:
    batch = load_split(pairs, "test", sizes=(16,), max_words=1, crop=1.0).batch
    assert len(batch.ids) == 10 and int((batch.images[0].int() + batch.partners[0].int() - 255).abs().max()) <= 2


def test_a_bad_pair_is_replaced_whole(tmp_path: Path) -> None:
    odd = SampleRecord("train", "odd", png_image(1, (41, 24)), "png", (), 41, 24)
    dataset = write_set(tmp_path / "set", [*(pair_sample(n) for n in range(23)), odd], options={"pairs": True})
    loader = make_loader(dataset, [0, 1, 2, 3])
    batches = take_batches(loader, 2)
    assert loader.quarantine == {"odd": "is no pair of images of equal size: it is 41 pixels wide"}
    for batch in batches:
        assert int((batch.images[-1].int() + batch.partners[-1].int() - 255).abs().max()) <= 2


def test_outlines_are_where_neighbours_differ() -> None:
    pixels = np.full((5, 6), 0x00FFFFFF, np.uint32)
    pixels[1:4, 2:5] = 0x000000FF  # a red square on white
    drawn = outlines(pixels)
    expected = np.zeros((5, 6), bool)
    expected[1:4, [1, 4]] = True  # left of it, and its right column
    expected[[0, 3], 2:5] = True  # above it, and its lowest row
    assert np.array_equal(drawn == 0, expected) and set(np.unique(drawn)) == {0, 0xFFFFFF}
    pixels[...] = 0x00808080
    pixels[:, 3:] = 0x00808097  # 23 more red: less than an outline
    assert (outlines(pixels) == 0xFFFFFF).all()


def test_outlines_make_pairs_of_any_set(single: Dataset) -> None:
    plain = take_batches(make_loader(single, [0, 1, 2, 3]), 2)
    drawn = take_batches(make_loader(replace(single, outlines=True), [0, 1, 2, 3]), 2)
    for one, other in zip(plain, drawn, strict=True):
        assert one.ids == other.ids and not one.partners
        assert all(torch.equal(a, b) for a, b in zip(one.images, other.partners, strict=True))
        colours = other.images[-1]
        assert set(colours.unique().tolist()) <= {0, 255} and torch.equal(colours[:, 0], colours[:, 2])


def test_pairs_for_a_device_are_the_same(pairs: Dataset, single: Dataset) -> None:
    for dataset in (pairs, replace(single, outlines=True)):
        loaders = [make_loader(dataset, [0, 1, 2, 3], for_device=each) for each in (False, True)]
        assert_same_on_device(*(take_batches(loader, 1)[0] for loader in loaders))
    domains = single.having("red"), single.having("blue")
    assert_same_on_device(*(take(open_unpaired(domains, [0], for_device=each), 1)[0] for each in (False, True)))


def test_outlines_of_pairs_are_refused(pairs: Dataset) -> None:
    with pytest.raises(ValueError, match="data.outlines: true, but .* has pairs already; give false"):
        open_dataset(DataConfig(source=pairs.url, outlines=True))


def test_halves_share_no_pixel() -> None:
    image = DecodedImage(np.arange(24, dtype=np.uint32).reshape(4, 6), (6, 4))
    left, right = halves(image)
    assert left.size == right.size == (3, 4)
    assert not set(left.pixels.flatten()) & set(right.pixels.flatten())


# ------------------------------------------------------------------------------------------------- unpaired domains
def test_a_view_has_the_samples_with_an_attribute(single: Dataset) -> None:
    red = single.having("red")
    train = red.split("train")
    assert len(train) == 20 and sum(train.shard_sizes) == 20
    assert [*train.keys] == [key for i, key in enumerate(single.split("train").keys) if i % 3 == 0]
    assert all("red" in train.attributes(i) for i in range(20)) and len(red.split("test")) == 3
    assert red.fingerprint not in (single.fingerprint, single.having("blue").fingerprint)
    whole = load_split(single, "train", sizes=(16,), max_words=3).batch
    part = load_split(red, "train", sizes=(16,), max_words=3).batch
    rows = [whole.ids.index(key) for key in part.ids]
    assert torch.equal(whole.images[0][rows], part.images[0])
    with pytest.raises(ValueError, match="no image of split train has the attribute purple"):
        single.having("purple")


def open_unpaired(datasets: tuple[Dataset, ...], groups: list[int], step0: int = 0, **changed: Any) -> Any:
    spec = LoaderSpec(CONFIG, sizes=(8, 16), groups=groups, total_groups=4, group_size=6, step0=step0, **changed)
    return open_mixed_loader(datasets, spec, (3, 11), unpaired=True)


def take(loader: UnpairedLoader, count: int) -> list[Batch]:
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def test_a_step_has_an_image_of_each_domain(single: Dataset) -> None:
    domains = single.having("red"), single.having("blue")
    keys = [set(domain.split("train").keys) for domain in domains]
    batches = take(open_unpaired(domains, [0, 1, 2, 3]), 5)
    seen: list[list[str]] = [[], []]
    for batch in batches:
        for name in batch.ids:
            for of_domain, known, key in zip(seen, keys, name.split("+"), strict=True):
                assert key in known
                of_domain.append(key)
        assert [each.shape for each in batch.images] == [each.shape for each in batch.partners]
    for of_domain, known in zip(seen, keys, strict=True):
        assert set(of_domain[:20]) == known and sorted(of_domain[:100]) == sorted([*known] * 5), "once per epoch"
    pairs = {tuple(name.split("+")) for batch in batches for name in batch.ids}
    assert len(pairs) > 60, "each epoch combines other images"


@pytest.mark.parametrize("shares", [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 1, 2], [3]]])
def test_the_order_does_not_depend_on_the_workers(single: Dataset, shares: list[list[int]]) -> None:
    domains = single.having("red"), single.having("blue")
    whole = take(open_unpaired(domains, [0, 1, 2, 3]), 4)
    for share in shares:
        for batch, of_all in zip(take(open_unpaired(domains, share, step0=2), 2), whole[2:], strict=True):
            rows = [row for group in share for row in range(6 * group, 6 * group + 6)]
            assert batch.ids == tuple(of_all.ids[row] for row in rows)
            assert torch.equal(batch.partners[-1], of_all.partners[-1][rows])
            assert torch.equal(batch.images[-1], of_all.images[-1][rows])


def test_an_unpaired_system_separates_pairs(pairs: Dataset) -> None:
    (batch,) = take(open_unpaired((pairs, pairs), [0, 1, 2, 3]), 1)
    first, second = zip(*(name.split("+") for name in batch.ids), strict=True)
    assert first != second
    paired = take_batches(make_loader(pairs, [0, 1, 2, 3], seed=11), 1)[0]
    assert torch.equal(batch.partners[-1], paired.partners[-1]), "the second images, in an order of their own"
