"""Find near-duplicate images: a hash of the coarse structure finds candidates, the colours confirm them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_GRID = 32
_LOW_FREQUENCIES = 8
_NOISE = 1.0
_MAX_BITS_APART = 3
_COLOUR_GRID = 8
_MAX_COLOUR_DIFFERENCE = 5.0
_BUCKET_MAX = 2000


@dataclass(frozen=True)
class Fingerprint:
    """Perceptual fingerprint of an image."""

    bits: int
    """64 bits, each 1 if a low frequency is above the median."""
    colours: bytes
    """The image as 8 x 8 RGB."""


def _cosines() -> NDArray[np.float64]:
    """Return the lowest rows of a discrete cosine transform, (8, 32)."""
    angles = np.outer(np.arange(_LOW_FREQUENCIES), np.arange(_GRID) + 0.5) * (np.pi / _GRID)
    return np.asarray(np.cos(angles))


_COSINES = _cosines()


def fingerprint(image: Image.Image) -> Fingerprint:
    """Compute the fingerprint of an RGB image. It is nearly invariant under resizing and compression."""
    grey = np.asarray(image.convert("L").resize((_GRID, _GRID), Image.Resampling.BOX), dtype=np.float64)
    low = (_COSINES @ grey @ _COSINES.T).ravel()
    above = low > np.median(low[1:]) + _NOISE  # flat images must not depend on rounding
    above[0] = False  # ignore the mean brightness
    bits = int.from_bytes(np.packbits(above).tobytes())
    small = image.resize((_COLOUR_GRID, _COLOUR_GRID), Image.Resampling.BOX)
    return Fingerprint(bits, small.tobytes())


def find_duplicates(fingerprints: Mapping[str, Fingerprint]) -> list[list[str]]:
    """Return groups of keys with near-identical images; keys and groups keep the order of `fingerprints`."""
    keys = list(fingerprints)
    bits = np.array([fingerprints[key].bits for key in keys], dtype=np.uint64)
    colours = np.array([np.frombuffer(fingerprints[key].colours, np.uint8) for key in keys], dtype=np.int16)
    parent = list(range(len(keys)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def join(i: int, j: int) -> None:
        if np.abs(colours[i] - colours[j]).mean() <= _MAX_COLOUR_DIFFERENCE:
            low, high = sorted((root(i), root(j)))
            parent[high] = low

    for quarter in range(4):  # if at most 3 bits differ, one quarter of the bits is equal
        for bucket in _buckets((bits >> np.uint64(16 * quarter)) & np.uint64(0xFFFF)):
            _join_bucket(bucket, bits, colours, join)
    groups: dict[int, list[str]] = defaultdict(list)
    for i, key in enumerate(keys):
        groups[root(i)].append(key)
    return [group for group in groups.values() if len(group) > 1]


def _buckets(values: NDArray[np.uint64]) -> list[NDArray[np.int64]]:
    """Return the indices of each value that occurs more than once."""
    order = np.argsort(values, kind="stable")
    borders = np.flatnonzero(np.diff(values[order])) + 1
    return [indices for indices in np.split(order, borders) if len(indices) > 1]


def _join_bucket(
    bucket: NDArray[np.int64],
    bits: NDArray[np.uint64],
    colours: NDArray[np.int16],
    join: Callable[[int, int], None],
) -> None:
    if len(bucket) > _BUCKET_MAX:  # many flat images: compare only neighbours by brightness
        ordered = bucket[np.lexsort((colours[bucket].sum(1), bits[bucket]))]
        for i, j in pairwise(ordered.tolist()):
            if int(bits[i]) ^ int(bits[j]) == 0:
                join(i, j)
        return
    for position, i in enumerate(bucket.tolist()):
        rest = bucket[position + 1 :]
        near = np.bitwise_count(bits[rest] ^ bits[i]) <= _MAX_BITS_APART
        for j in rest[near].tolist():
            join(i, j)
