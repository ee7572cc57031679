"""Pictures that look alike: a hash of their coarse structure finds candidates, their colours confirm them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_GRID = 32
_LOW = 8
_NOISE = 1.0
_BITS_APART = 3
_COLOUR_GRID = 8
_COLOURS_APART = 5.0
_BUCKET_MAX = 2000


@dataclass(frozen=True)
class Fingerprint:
    """bits: 64, of the signs of low frequencies. colours: an 8 x 8 RGB picture."""

    bits: int
    colours: bytes


def _cosines() -> NDArray[np.float64]:
    """(8, 32): the lowest rows of a discrete cosine transform."""
    angles = np.outer(np.arange(_LOW), np.arange(_GRID) + 0.5) * (np.pi / _GRID)
    return np.asarray(np.cos(angles))


_COSINES = _cosines()


def fingerprint(image: Image.Image) -> Fingerprint:
    """Of an RGB picture; nearly the same after resizing and new compression."""
    grey = np.asarray(image.convert("L").resize((_GRID, _GRID), Image.Resampling.BOX), dtype=np.float64)
    low = (_COSINES @ grey @ _COSINES.T).ravel()
    above = low > np.median(low[1:]) + _NOISE  # so that rounding decides nothing in flat pictures
    above[0] = False  # brightness says nothing
    bits = int.from_bytes(np.packbits(above).tobytes())
    small = image.resize((_COLOUR_GRID, _COLOUR_GRID), Image.Resampling.BOX)
    return Fingerprint(bits, small.tobytes())


def find_duplicates(fingerprints: Mapping[str, Fingerprint]) -> list[list[str]]:
    """Groups of keys whose pictures look the same, each group and all of them in the order of the keys given."""
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
        if np.abs(colours[i] - colours[j]).mean() <= _COLOURS_APART:
            low, high = sorted((root(i), root(j)))
            parent[high] = low

    for quarter in range(4):  # of bits that differ in at most 3 places, one quarter is equal
        for bucket in _buckets((bits >> np.uint64(16 * quarter)) & np.uint64(0xFFFF)):
            _join_bucket(bucket, bits, colours, join)
    groups: dict[int, list[str]] = defaultdict(list)
    for i, key in enumerate(keys):
        groups[root(i)].append(key)
    return [group for group in groups.values() if len(group) > 1]


def _buckets(values: NDArray[np.uint64]) -> list[NDArray[np.int64]]:
    """Places of equal values, where there is more than one."""
    order = np.argsort(values, kind="stable")
    borders = np.flatnonzero(np.diff(values[order])) + 1
    return [places for places in np.split(order, borders) if len(places) > 1]


def _join_bucket(bucket: NDArray[np.int64], bits: NDArray[np.uint64], colours: NDArray[np.int16], join: object) -> None:
    assert callable(join)
    if len(bucket) > _BUCKET_MAX:  # many flat pictures: compare neighbours by brightness only
        ordered = bucket[np.lexsort((colours[bucket].sum(1), bits[bucket]))]
        for i, j in pairwise(ordered.tolist()):
            if int(bits[i]) ^ int(bits[j]) == 0:
                join(i, j)
        return
    for place, i in enumerate(bucket.tolist()):
        rest = bucket[place + 1 :]
        near = np.bitwise_count(bits[rest] ^ bits[i]) <= _BITS_APART
        for j in rest[near].tolist():
            join(i, j)
