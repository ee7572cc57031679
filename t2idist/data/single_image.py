"""Single images: of files, and of samples of data sets by their key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from t2idist import storage
from t2idist.config import DataConfig
from t2idist.contract import ReferenceImage
from t2idist.data.image_file import UnusableImage, read_rgb
from t2idist.data.loader import load_split
from t2idist.data.pairs import outlines
from t2idist.data.samples import DecodedImage
from t2idist.data.sources import open_dataset
from t2idist.data.transforms import crop_and_flip, fill_pyramid, pixels_of
from t2idist.nn.images import to_float


def image_of_file(data: bytes, size: int, name: str, *, as_outlines: bool = False) -> Tensor:
    """Return the central square of an image file, as the sharding tools see it: (3, size, size) in [-1, 1].

    Args:
        data: content of the file.
        size: pixels of a side.
        name: name of the file, for messages.
        as_outlines: draw its outlines, as `data.outlines` does.

    Raises:
        ValueError: the file is not an image that can be used.
    """
    try:
        image, full_size = read_rgb(data, size)
    except UnusableImage as error:
        raise ValueError(f"{name}: does not decode: {error.detail}") from None
    square = crop_and_flip(DecodedImage(pixels_of(image), full_size), size, 1.0, False, None)
    planes = np.empty((1, 3, size, size), np.uint8)
    fill_pyramid((outlines(square) if as_outlines else square)[None], [planes])
    return to_float(torch.from_numpy(planes[0]))


def load_images(images: Sequence[ReferenceImage], data: DataConfig, where: str) -> None:
    """Load the images of a role. Raises ValueError as `read_one` does."""
    for image in images:
        image.load(read_one(image, data, where))


def read_one(image: ReferenceImage, data: DataConfig, where: str) -> Tensor:
    """Read an image: (1, 3, size, size) in [-1, 1].

    Args:
        image: the image.
        data: settings with which its data set is opened.
        where: key of the section with the key of the image, for messages.

    Raises:
        ValueError: the image is not given, does not exist or cannot be used; names the key and the file.
    """
    name = f"{where}.{image.key}"
    if not image.url:
        raise ValueError(f"{name}: missing; give the path or URL of an image, or SET#KEY, a sample of a data set")
    source, _, key = image.url.rpartition("#")
    if source:
        try:
            return _sample(replace(data, source=source, beside=()), key, image.size)
        except ValueError as error:
            raise ValueError(f"{name}: {storage.redact(image.url)}: {error}") from None
    path = storage.local_path(image.url)
    if path is not None and not path.is_absolute():
        raise ValueError(f"{name}: {image.url}: workers may run elsewhere; give an absolute path or a URL")
    file = storage.redact(image.url)
    try:
        content = storage.read_bytes(image.url)
    except OSError as error:
        raise ValueError(f"{name}: {file}: {error.strerror or type(error).__name__}") from None
    return image_of_file(content, image.size, f"{name}: {file}")[None]


def _sample(data: DataConfig, key: str, size: int) -> Tensor:
    """Return the image (1, 3, size, size) in [-1, 1] of a sample. Raises ValueError if there is none of this key."""
    dataset = open_dataset(data)
    for name, split in dataset.splits.items():
        if key in split.keys:
            row = list(split.keys).index(key)
            images = load_split(dataset, name, sizes=(size,), max_words=1, rows=[row], crop=1.0).batch.images[-1]
            if len(images):
                return to_float(images)
            raise ValueError("this sample cannot be used")
    raise ValueError(f"there is no sample {key!r} in this data set")
