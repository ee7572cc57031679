"""Small shard sets of random images, and loaders over them."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from t2idist.config import DataConfig
from t2idist.contract import Batch
from t2idist.data.loader import Loader, LoaderSpec, open_loader
from t2idist.data.sample_format import SampleRecord
from t2idist.data.shard_writer import write_shards
from t2idist.data.shards import Dataset

WORDS = ["red", "green", "blue", "round", "square", "small", "large", "happy", "sad", "old", "new"]


def png_image(seed: int, size: tuple[int, int] = (20, 24)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def make_sample(number: int, split: str = "train", image: bytes | None = None) -> SampleRecord:
    """Return sample `number` with captions of 3 and 12 words, and one attribute."""
    rng = random.Random(number)
    captions = tuple(" ".join(rng.choices(WORDS, k=length)) for length in (3, 12))
    image = image or png_image(number)
    return SampleRecord(split, f"s{number:04d}", image, "png", captions, 20, 24, (WORDS[number % 3],))


def write_set(url: Path | str, samples: list[SampleRecord], **options: object) -> Dataset:
    """Write a set with shards of 17 samples, and open it."""
    write_shards(str(url), samples, source="test", licence="none", shard_samples=17, **options)  # type: ignore[arg-type]
    return Dataset.open(str(url))


def make_loader(dataset: Dataset, groups: list[int], step0: int = 0, seed: int = 3, **changed: object) -> Loader:
    """Open a loader of some of 4 groups of 6 samples; `changed` are fields of its LoaderSpec."""
    settings: dict = {"config": DataConfig(max_words=5, threads=2), "sizes": (8, 16), "total_groups": 4, **changed}
    return open_loader(dataset, LoaderSpec(groups=groups, group_size=6, step0=step0, **settings), seed)


def take_batches(loader: Loader, count: int) -> list[Batch]:
    """Return the next batches, and close the loader."""
    with loader:
        return [next(loader) for _ in range(count)]


def assert_batches_equal(one: Batch, other: Batch) -> None:
    assert one.ids == other.ids
    tensors = [
        (*b.images, b.captions.tokens, b.captions.lengths, b.captions.vectors, b.class_ids, b.attributes)
        for b in (one, other)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


def assert_same_on_device(host: Batch, for_device: Batch) -> None:
    """Check a batch for a device against one for the host: labels and largest images equal, others up to rounding."""
    assert for_device.pyramid_sizes == tuple(image.shape[-1] for image in host.images)
    one, other = (batch.to(torch.device("cpu"), torch.float32) for batch in (host, for_device))
    assert not other.pyramid_sizes
    for pyramid, made in ((one.images, other.images), (one.partners, other.partners)):
        assert [image.shape for image in pyramid] == [image.shape for image in made]
        assert all(float((a - b).abs().max()) <= 1.001 / 127.5 for a, b in zip(pyramid, made, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(pyramid[-1:], made[-1:], strict=True))
    assert_batches_equal(replace(one, images=()), replace(other, images=()))
