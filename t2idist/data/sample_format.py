"""One sample as it lies in a shard: consecutive tar members ``<key>.<webp|png|jpg>``, ``<key>.json``, and in a set with
sentence vectors ``<key>.vectors.npy``.

Kept free of heavy imports, because every process that makes samples loads it.
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
    """One picture with what is known about it, as the writer takes it.

    image: encoded bytes, stored as they are. extension: webp, png or jpg. class_id: samples of one class are not each
    other's negatives (None: each sample is its own class). width, height: of the encoded picture, in pixels. vectors:
    (captions, D) float16 or float32, one for each caption in their order (None: a set without).
    """

    split: str
    key: str
    image: bytes
    extension: str
    captions: tuple[str, ...]
    width: int
    height: int
    attributes: tuple[str, ...] = ()
    class_id: int | None = None
    vectors: NDArray[Any] | None = None

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
    """A sample's tar members, headers and padding included, and its row of the manifest without shard and offset."""

    tar: bytes
    row: dict[str, Any]


def pack(sample: SampleRecord) -> PackedSample:
    """The sample as bytes of a tar; the same sample gives the same bytes."""
    facts = {"captions": sample.captions, "attributes": sample.attributes, "class_id": sample.class_id}
    text = json.dumps(facts, ensure_ascii=False, sort_keys=True).encode()
    tar = member(f"{sample.key}.{sample.extension}", sample.image) + member(f"{sample.key}.json", text)
    seen = {"split": sample.split, "key": sample.key, "width": sample.width, "height": sample.height}
    if sample.vectors is not None:
        tar += member(f"{sample.key}.{VECTORS}", npy(sample.vectors))
    return PackedSample(tar, {**seen, "size": len(tar), "sha256": hashlib.sha256(tar).hexdigest(), **facts})


def _check_vectors(key: str, vectors: NDArray[Any], captions: int) -> None:
    if vectors.dtype.name not in VECTOR_TYPES:
        raise ValueError(f"sample {key}: vectors of {vectors.dtype.name}; allowed are {', '.join(VECTOR_TYPES)}")
    if vectors.ndim != 2 or len(vectors) != captions or not 1 <= vectors.shape[1] <= MAX_VECTOR_DIM:
        shape = " x ".join(str(size) for size in vectors.shape)
        raise ValueError(f"sample {key}: vectors {shape}; give one for each of its {captions} captions")
    if not (abs(vectors) < float("inf")).all():
        raise ValueError(f"sample {key}: its vectors have values that are not finite")


def npy(vectors: NDArray[Any]) -> bytes:
    """Vectors (n, D) as an .npy file."""
    dtype = vectors.dtype.name
    return npy_header(dtype, *vectors.shape) + vectors.astype(VECTOR_TYPES[dtype], order="C").tobytes()


def npy_header(dtype: str, rows: int, columns: int) -> bytes:
    """What an .npy file (version 1.0) of such an array begins with, as numpy writes it; a reader compares and never
    parses it."""
    text = f"{{'descr': '{VECTOR_TYPES[dtype]}', 'fortran_order': False, 'shape': ({rows}, {columns}), }}"
    length = -(-(10 + len(text) + 1) // 64) * 64 - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text.ljust(length - 1).encode() + b"\n"


def member(name: str, data: bytes) -> bytes:
    """One regular file of a tar: header, bytes, padding; no owner and no time."""
    return b"".join([header(name.encode("ascii"), len(data)), data, bytes(-len(data) % tarfile.BLOCKSIZE)])


def header(name: bytes, size: int) -> bytes:
    """A USTAR header, as tarfile makes it in ten times the time."""
    assert len(name) <= 100 and size < 8**11
    before = name.ljust(100, b"\0") + b"0000444\0" + 2 * b"0000000\0" + b"%011o\0" % size + b"00000000000\0"
    after = b"0" + bytes(100) + b"ustar\x0000" + bytes(247)
    checksum = sum(before) + sum(b" " * 8) + sum(after)
    return before + b"%06o\0 " % checksum + after
