"""One sample as it lies in a shard: two consecutive tar members, ``<key>.<webp|png|jpg>`` and ``<key>.json``.

Kept free of heavy imports, because every process that makes samples loads it.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from dataclasses import dataclass
from typing import Any

EXTENSIONS = ("webp", "png", "jpg")
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,90}")
"""Keys have no dots (a dot ends a webdataset key) and no slashes, and fit a plain tar header."""

MAX_PIXELS = 64 << 20
MAX_FILE_BYTES = 512 << 20
MAX_CAPTION_CHARACTERS = 10_000


@dataclass(frozen=True)
class SampleRecord:
    """One picture with what is known about it, as the writer takes it.

    image: encoded bytes, stored as they are. extension: webp, png or jpg. class_id: samples of one class are not each
    other's negatives (None: each sample is its own class). width, height: of the encoded picture, in pixels.
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

    def __post_init__(self) -> None:
        if not KEY_PATTERN.fullmatch(self.key):
            raise ValueError(f"sample key {self.key!r}: allowed are 1 to 90 letters, digits, '_' and '-'")
        if not KEY_PATTERN.fullmatch(self.split):
            raise ValueError(f"split {self.split!r} of sample {self.key}: allowed are letters, digits, '_' and '-'")
        if self.extension not in EXTENSIONS:
            raise ValueError(f"sample {self.key}: extension {self.extension!r}; allowed are {', '.join(EXTENSIONS)}")


@dataclass(frozen=True)
class Packed:
    """A sample's tar members, headers and padding included, and its row of the manifest without shard and offset."""

    tar: bytes
    row: dict[str, Any]


def pack(sample: SampleRecord) -> Packed:
    """The sample as bytes of a tar; the same sample gives the same bytes."""
    facts = {"captions": sample.captions, "attributes": sample.attributes, "class_id": sample.class_id}
    text = json.dumps(facts, ensure_ascii=False, sort_keys=True).encode()
    tar = member(f"{sample.key}.{sample.extension}", sample.image) + member(f"{sample.key}.json", text)
    seen = {"split": sample.split, "key": sample.key, "width": sample.width, "height": sample.height}
    return Packed(tar, {**seen, "size": len(tar), "sha256": hashlib.sha256(tar).hexdigest(), **facts})


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
