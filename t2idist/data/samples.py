"""A sample's image on its way from a shard to a batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class StoredSample:
    """The tar members of a sample, which are parsed when it is due: a run that resumes reads many before the first."""

    key: str
    data: bytes


@dataclass(frozen=True)
class EncodedImage:
    """An image as stored."""

    data: bytes
    extension: str
    """webp, png or jpg."""
    vectors: bytes = b""
    """The .npy file of its captions' sentence vectors (empty: none)."""


@dataclass(frozen=True)
class DecodedImage:
    """A decoded RGB image."""

    pixels: NDArray[np.uint32]
    """(H, W), the bytes of each element: red, green, blue, and one that means nothing."""
    size: tuple[int, int]
    """(width, height) of the stored image; a large JPEG may be decoded at a fraction of it."""
    vectors: bytes = b""
    """As in `EncodedImage`."""


@dataclass(frozen=True)
class BadSample:
    """Stands for a sample that is unusable."""

    reason: str


Sample = StoredSample | DecodedImage | BadSample
