"""The format of a sample in a shard.

Consecutive tar members ``<key>.<webp|png|jpg>``, ``<key>.json``, and in a set with sentence vectors
``<key>.vectors.npy``. This module avoids heavy imports, because every process that makes samples loads it.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

EXTENSIONS = ("webp", "png", "jpg")
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,90}")
"""Keys have no dots (a dot ends a webdataset key) and no slashes, and fit a plain tar header."""

MAX_PIXELS = 64 << 20
MAX_FILE_BYTES = 512 << 20
MAX_CAPTION_CHARACTERS = 10_000

VECTORS = "vectors.npy"
VECTOR_TYPES = {"float16": "<f2", "float32": "<f4"}
MAX_VECTOR_DIM = 1 << 16


@dataclass(frozen=True)
class SampleRecord:
    """A sample as the shard writer takes it."""

    split: str
    key: str
    image: bytes
    """Encoded image, stored unchanged."""
    extension: str
    """webp, png or jpg."""
    captions: tuple[str, ...]
    width: int
    """Of the encoded image, in pixels."""
    height: int
    attributes: tuple[str, ...] = ()
    class_id: int | None = None
    """Samples of one class are not each other's negatives (None: a class of its own)."""
    vectors: NDArray[Any] | None = None
    """Sentence vectors (captions, D), float16 or float32, in the order of the captions (None: the set has none)."""

    def __post_init__(self) -> None:
        if not KEY_PATTERN.fullmatch(self.key):
            raise ValueError(f"sample key {self.key!r}: allowed are 1 to 90 letters, digits, '_' and '-'")
        if not KEY_PATTERN.fullmatch(self.split):
            raise ValueError(f"split {self.split!r} of sample {self.key}: allowed are letters, digits, '_' and '-'")
        if self.extension not in EXTENSIONS:
            raise ValueError(f"sample {self.key}: extension {self.extension!r}; allowed are {', '.join(EXTENSIONS)}")
        if self.vectors is not None:
            _check_vectors(self.key, self.vectors, len(self.captions))


@dataclass(frozen=True)
class PackedSample:
    """A sample as tar members."""

    tar: bytes
    """The members, with headers and padding."""
    row: dict[str, Any]
    """Its manifest row, without shard and offset, and a hash of its image, which is not in the manifest."""


def pack(sample: SampleRecord) -> PackedSample:
    """Encode a sample as tar members; deterministic."""
    labels = {"captions": sample.captions, "attributes": sample.attributes, "class_id": sample.class_id}
    text = json.dumps(labels, ensure_ascii=False, sort_keys=True).encode()
    tar = member(f"{sample.key}.{sample.extension}", sample.image) + member(f"{sample.key}.json", text)
    row = {"split": sample.split, "key": sample.key, "width": sample.width, "height": sample.height}
    if sample.vectors is not None:
        tar += member(f"{sample.key}.{VECTORS}", npy(sample.vectors))
    hashes = {"sha256": hashlib.sha256(tar).hexdigest(), "image": image_hash(sample.image)}
    return PackedSample(tar, {**row, "size": len(tar), **hashes, **labels})


def image_hash(image: bytes) -> str:
    """Return a hash by which equal encoded images are found."""
    return hashlib.sha256(image).hexdigest()[:32]


def _check_vectors(key: str, vectors: NDArray[Any], captions: int) -> None:
    if vectors.dtype.name not in VECTOR_TYPES:
        raise ValueError(f"sample {key}: vectors of {vectors.dtype.name}; allowed are {', '.join(VECTOR_TYPES)}")
    if vectors.ndim != 2 or len(vectors) != captions or not 1 <= vectors.shape[1] <= MAX_VECTOR_DIM:
        shape = " x ".join(str(size) for size in vectors.shape)
        raise ValueError(f"sample {key}: vectors {shape}; one for each of its {captions} captions is needed")
    if not (abs(vectors) < float("inf")).all():
        raise ValueError(f"sample {key}: its sentence vectors have values that are not finite")


def npy(vectors: NDArray[Any]) -> bytes:
    """Encode vectors (n, D) as an .npy file."""
    dtype = vectors.dtype.name
    return npy_header(dtype, *vectors.shape) + vectors.astype(VECTOR_TYPES[dtype], order="C").tobytes()


def npy_header(dtype: str, rows: int, columns: int) -> bytes:
    """Return the header of an .npy file (version 1.0) as NumPy writes it; readers compare it and never parse it."""
    text = f"{{'descr': '{VECTOR_TYPES[dtype]}', 'fortran_order': False, 'shape': ({rows}, {columns}), }}"
    length = -(-(10 + len(text) + 1) // 64) * 64 - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text.ljust(length - 1).encode() + b"\n"


def member(name: str, data: bytes) -> bytes:
    """Encode one regular file of a tar: header, data and padding; no owner, no time."""
    return b"".join([header(name.encode("ascii"), len(data)), data, bytes(-len(data) % tarfile.BLOCKSIZE)])


def header(name: bytes, size: int) -> bytes:
    """Return a USTAR header, equal to that of tarfile and ten times as fast."""
    assert len(name) <= 100 and size < 8**11
    before = name.ljust(100, b"\0") + b"0000444\0" + 2 * b"0000000\0" + b"%011o\0" % size + b"00000000000\0"
    after = b"0" + bytes(100) + b"ustar\x0000" + bytes(247)
    checksum = sum(before) + sum(b" " * 8) + sum(after)
    return before + b"%06o\0 " % checksum + after
