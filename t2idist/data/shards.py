"""Shard sets: tar shards, manifest.parquet and dataset.json. This module opens them; shard_writer.py writes them.

The manifest records the offset of each sample, so that a reader can read any range of samples. The shards alone can be
read by any webdataset reader. dataset.json is written last: a set without it is unfinished.
"""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from t2idist import storage
from t2idist.contract import DataInfo
from t2idist.data.manifest import Cells, Keys, Rows, read_manifest
from t2idist.data.manifest_rows import COLUMNS as COLUMNS
from t2idist.data.manifest_rows import DESCRIPTION as DESCRIPTION
from t2idist.data.manifest_rows import MANIFEST as MANIFEST
from t2idist.data.manifest_rows import Shard as Shard
from t2idist.data.sample_format import MAX_VECTOR_DIM, VECTOR_TYPES, npy_header
from t2idist.data.tokenizer import ASCII, END_TOKEN, TOKENIZER_KEY, Vocabulary

SCHEMA_VERSION = 2
PAIRS = "pairs"
"""Option in dataset.json of a set of pairs: every stored image is two of equal size, side by side."""

_NAME_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,120}")
_DESCRIPTION_MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class SentenceVectorInfo:
    """The format of a set's sentence vectors: one for each caption of each sample, in the captions' order."""

    dim: int
    dtype: str
    """float16 or float32."""
    encoder: dict[str, Any]
    """Identifies the encoder: its name, and what else distinguishes it from others."""

    def __post_init__(self) -> None:
        if self.dtype not in VECTOR_TYPES:
            raise ValueError(f"vectors of {self.dtype!r}; allowed are {', '.join(VECTOR_TYPES)}")
        if isinstance(self.dim, bool) or not isinstance(self.dim, int) or not 1 <= self.dim <= MAX_VECTOR_DIM:
            raise ValueError(f"vectors of {self.dim!r} elements; allowed are 1 to {MAX_VECTOR_DIM}")
        if not isinstance(self.encoder, dict):
            raise ValueError(f"the vectors' encoder is {self.encoder!r}; it must be a mapping")

    def decode(self, data: bytes, captions: int) -> NDArray[np.float32]:
        """Decode a sample's .npy member to vectors (captions, dim).

        Raises:
            ValueError: If `data` is not such an array, or has values that are not finite; the message is the reason.
        """
        if not data:
            raise ValueError("has no sentence vectors")
        header = npy_header(self.dtype, captions, self.dim)
        dtype = np.dtype(VECTOR_TYPES[self.dtype])
        if not data.startswith(header) or len(data) != len(header) + captions * self.dim * dtype.itemsize:
            raise ValueError(f"its sentence vectors are not {captions} x {self.dim} elements of {self.dtype}")
        vectors = np.frombuffer(data, dtype, offset=len(header)).reshape(captions, self.dim).astype(np.float32)
        if not np.isfinite(vectors).all():
            raise ValueError("its sentence vectors have values that are not finite")
        return vectors


class Split:
    """The n samples of one split, indexed in the order of the shards.

    Attributes:
        offsets, lengths: (n,) byte offset and length in the tar.
        class_ids: (n,); a sample without a class has its own index.
    """

    def __init__(self, name: str, shards: tuple[Shard, ...], rows: Rows) -> None:
        self.name = name
        self.shards = shards
        self._rows = rows
        self.keys = Keys(rows.texts["key"])
        self.offsets: NDArray[np.int64] = rows.numbers["offsets"]
        self.lengths: NDArray[np.int64] = rows.numbers["lengths"]
        self.class_ids: NDArray[np.int64] = rows.numbers["class_ids"]
        self._has_class = rows.numbers["has_class"]
        self._widths = rows.numbers["widths"]
        self._heights = rows.numbers["heights"]
        self._hashes, self._captions, self._attributes = (
            Cells(rows.texts[name]) for name in ("sha256", "captions", "attributes")
        )

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def shard_sizes(self) -> list[int]:
        """Number of samples of each shard."""
        return [shard.samples for shard in self.shards]

    def sha256(self, index: int) -> bytes:
        """Return the hash of the sample's bytes in the tar, headers and padding included."""
        digest: bytes = self._hashes.at(index)
        return digest

    def has_class(self, index: int) -> bool:
        """Return whether the data assigns a class to the sample."""
        return bool(self._has_class[index])

    def image_size(self, index: int) -> tuple[int, int]:
        """Return width and height in pixels."""
        return int(self._widths[index]), int(self._heights[index])

    @property
    def largest_shorter_side(self) -> int:
        """Return the shorter side in pixels of the image in which it is largest."""
        return int(np.minimum(self._widths, self._heights).max(initial=0))

    @property
    def decoded_bytes(self) -> int:
        """Size of all images in memory, four bytes a pixel."""
        return 4 * int(np.dot(self._widths.astype(np.int64), self._heights.astype(np.int64)))

    def captions(self, index: int) -> list[str]:
        captions: list[str] = self._captions.at(index)
        return captions

    def attributes(self, index: int) -> list[str]:
        names: list[str] = self._attributes.at(index)
        return names

    def attribute_counts(self) -> dict[str, int]:
        """Return the number of samples of each attribute that occurs."""
        counts: Counter[str] = Counter()
        for piece in self._attributes.pieces:
            counted = pc.value_counts(piece.flatten())
            counts.update({entry["values"].as_py(): entry["counts"].as_py() for entry in counted})
        return dict(counts)

    def count_attributes(self, names: Sequence[str]) -> NDArray[np.int64]:
        """Return how many of the given attributes each sample has, (n,)."""
        counts = [np.zeros(0, np.int64)]
        for piece in self._attributes.pieces:
            known = pc.is_in(piece.flatten(), value_set=pa.array(names, pa.string()))
            rows = pc.list_parent_indices(piece).filter(known)
            counts.append(np.bincount(rows.to_numpy(zero_copy_only=False), minlength=len(piece)).astype(np.int64))
        return np.concatenate(counts)

    def having(self, attribute: str) -> Split:
        """Return the samples with an attribute, in the same order; shards without any are left out."""
        rows = np.flatnonzero(self.count_attributes([attribute]))
        starts = np.cumsum([0, *self.shard_sizes])
        counts = np.diff(np.searchsorted(rows, starts)).tolist()
        shards = (replace(shard, samples=count) for shard, count in zip(self.shards, counts, strict=True) if count)
        return Split(self.name, tuple(shards), self._rows.take(rows))

    def has_captions(self) -> bool:
        """Return whether any sample has a caption."""
        return any(len(piece.flatten()) for piece in self._captions.pieces)

    def only_caption(self) -> str | None:
        """Return the caption that all samples have; None if there are different ones, or none."""
        first: str | None = None
        for piece in self._captions.pieces:
            captions = piece.flatten()
            if first is None and len(captions):
                first = captions[0].as_py()
            if not pc.all(pc.equal(captions, pa.scalar(first, pa.string())), min_count=0).as_py():
                return None
        return first


@dataclass(frozen=True)
class Dataset:
    """An opened shard set."""

    url: str
    splits: dict[str, Split]
    vocabulary: Vocabulary
    """Words of the captions of all splits, and how captions are split into them."""
    word_counts: dict[str, int]
    attribute_names: tuple[str, ...]
    source: str
    licence: str
    options: dict[str, Any]
    endpoint_url: str | None = None
    """Of the object store (None: the environment's)."""
    vector_info: SentenceVectorInfo | None = None
    """Format of its sentence vectors (None: it has none)."""
    quality: dict[str, Any] = field(default_factory=dict)
    """What dataset.json says of images that were left out and of equal ones (see `data.statistics`)."""
    fingerprint: str = ""
    """SHA-256 of all that a run depends on: equal for a copy at another URL, another for any other content."""
    outlines: bool = False
    """Make pairs of the images, as in DataConfig."""

    @classmethod
    def open(
        cls, url: str, check_sizes: bool = True, endpoint_url: str | None = None, cache: str | None = None
    ) -> Dataset:
        """Open the shard set at `url`.

        Args:
            url: Folder of the shard set.
            check_sizes: Also check the size of every shard in storage.
            endpoint_url: Of the object store (None: the environment's).
            cache: Folder for large manifests that are converted (None: ~/.cache/t2idist).

        Raises:
            ValueError: If the set is missing or unfinished, has another schema version, or its manifest or sizes do not
                match; the message names the URL and the problem.
        """
        where = storage.redact(url)
        description = _read_description(url, endpoint_url)
        try:
            listed = {name: split["shards"] for name, split in description["splits"].items()}
            shards = {name: tuple(_parse_shard(where, shard) for shard in entries) for name, entries in listed.items()}
            counts = {str(word): int(count) for word, count in description["vocabulary"].items()}
            names = tuple(str(name) for name in description["attributes"])
            source, licence, options = (description[key] for key in ("source", "licence", "options"))
            manifest_bytes, manifest_sha256 = (description["manifest"][key] for key in ("bytes", "sha256"))
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{where}/{DESCRIPTION}: not a shard set's description: {error!r}") from None
        vector_info = _read_vector_info(where, description)
        try:
            vocabulary = Vocabulary([END_TOKEN, *counts], description.get(TOKENIZER_KEY, ASCII))
        except ValueError as error:
            raise ValueError(f"{where}/{DESCRIPTION}: {error}") from None
        folder = cache_folder(cache) / "manifests"
        rows = read_manifest(url, manifest_bytes, manifest_sha256, shards, endpoint_url=endpoint_url, cache=folder)
        splits = _split_rows(shards, rows)
        if check_sizes:
            _check_sizes(url, [shard for of_split in shards.values() for shard in of_split], endpoint_url)
        return cls(
            url, splits, vocabulary, counts, names, str(source), str(licence), dict(options),
            endpoint_url, vector_info, {key: description.get(key) for key in ("rejected", "image_statistics")},
            _fingerprint(manifest_sha256, description),
        )  # fmt: skip

    @property
    def info(self) -> DataInfo:
        """The facts that a system is built from. Raises ValueError if there is no train split."""
        words, images = tuple(self.vocabulary.words), len(self.split("train"))
        return DataInfo(words, images, self.vector_dim, (tuple(self.attribute_names),), self.paired)

    @property
    def vector_dim(self) -> int:
        """Dimension of its sentence vectors; 0 if it has none."""
        return 0 if self.vector_info is None else self.vector_info.dim

    @property
    def stored_pairs(self) -> bool:
        """Whether every stored image is two, side by side."""
        return bool(self.options.get(PAIRS))

    @property
    def paired(self) -> bool:
        """Whether every sample is a pair of images."""
        return self.stored_pairs or self.outlines

    def having(self, attribute: str) -> Dataset:
        """Return the set of the images with an attribute; it reads the same shards.

        Raises:
            ValueError: If no image of split train has it.
        """
        kept = {name: split.having(attribute) for name, split in self.splits.items()}
        splits = {name: split for name, split in kept.items() if len(split)}
        if "train" not in splits:
            raise ValueError(f"{storage.redact(self.url)}: no image of split train has the attribute {attribute}")
        fingerprint = storage.sha256(f"{self.fingerprint} {attribute}".encode())
        return replace(self, splits=splits, fingerprint=fingerprint)

    def split(self, name: str) -> Split:
        """Return the split `name`. Raises ValueError, listing the splits, if there is none of that name."""
        if name not in self.splits:
            raise ValueError(f"{storage.redact(self.url)}: no split '{name}'; there are {', '.join(self.splits)}")
        return self.splits[name]


def _read_description(url: str, endpoint_url: str | None) -> dict[str, Any]:
    where = storage.redact(url)
    file = storage.join(url, DESCRIPTION)
    try:
        size_bytes = storage.size(file, endpoint_url=endpoint_url)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{where}: no {DESCRIPTION} there, so no finished shard set; is the URL right?") from None
    if size_bytes > _DESCRIPTION_MAX_BYTES:
        raise ValueError(f"{where}/{DESCRIPTION}: {size_bytes} bytes; at most {_DESCRIPTION_MAX_BYTES} are read")
    description = storage.read_json(file, endpoint_url=endpoint_url)
    version = description.get("schema") if isinstance(description, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(f"{where}/{DESCRIPTION}: schema version {version!r}; this program reads {SCHEMA_VERSION}")
    assert isinstance(description, dict)
    if not isinstance(description.get("options"), dict):
        raise ValueError(f"{where}/{DESCRIPTION}: not a shard set's description: no options")
    return description


def _fingerprint(manifest_sha256: str, description: Mapping[str, Any]) -> str:
    """Hash the manifest's hash, which stands for every sample and caption, and the keys that define a run's tensors.

    A key that the set does not have is left out, so that keys of later versions change no hash of today's sets.
    """
    keys = ("vocabulary", TOKENIZER_KEY, "attributes", "vectors")
    defining = {key: description[key] for key in keys if description.get(key) is not None}
    # the order of the words is their numbering, so the keys of the vocabulary are not sorted
    text = json.dumps({"manifest": manifest_sha256, **defining}, ensure_ascii=False)
    return storage.sha256(text.encode())


def _read_vector_info(where: str, description: Mapping[str, Any]) -> SentenceVectorInfo | None:
    info = description.get("vectors")
    if info is None:
        return None
    try:
        return SentenceVectorInfo(**info)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}/{DESCRIPTION}: vectors: {error}") from None


def _parse_shard(where: str, entry: Mapping[str, Any]) -> Shard:
    shard = Shard(**entry)
    if not isinstance(shard.name, str) or not _NAME_PATTERN.fullmatch(shard.name):
        raise ValueError(f"{where}/{DESCRIPTION}: shard name {shard.name!r}; allowed are plain file names")
    for name in ("samples", "bytes", "tar_bytes"):
        value = entry[name]
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**60:
            raise ValueError(f"{where}/{DESCRIPTION}: {name} of shard {shard.name} is {value!r}; it must be positive")
    return shard


def _split_rows(shards: Mapping[str, tuple[Shard, ...]], rows: Rows) -> dict[str, Split]:
    splits = {}
    start = 0
    for name, of_split in shards.items():
        samples = sum(shard.samples for shard in of_split)
        splits[name] = Split(name, of_split, rows.slice(start, samples))
        start += samples
    return splits


def cache_folder(cache: str | None) -> Path:
    """Return the folder of cached data, `DataConfig.cache`."""
    return Path(cache).expanduser() if cache else Path("~/.cache/t2idist").expanduser()


def inflate(data: bytes, shard: Shard) -> bytes:
    """Decompress a gzipped shard; never to more bytes than dataset.json states.

    Raises:
        ValueError: If it is not a gzip file, or of another size.
    """
    decompressor = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        tar = decompressor.decompress(data, shard.tar_bytes + 1)
    except zlib.error as error:
        raise ValueError(f"not a gzip file: {error}") from None
    if len(tar) != shard.tar_bytes:
        raise ValueError(f"unpacks to {len(tar)} bytes or more; {DESCRIPTION} says {shard.tar_bytes}")
    return tar


def stored_bytes(url: str, shard: Shard, endpoint_url: str | None = None) -> int | None:
    """Return the stored size of a shard of the set at `url`; None if it is missing."""
    try:
        return storage.size(storage.join(url, shard.name), endpoint_url=endpoint_url)
    except FileNotFoundError:
        return None


def _check_sizes(url: str, shards: Sequence[Shard], endpoint_url: str | None) -> None:
    def stored(shard: Shard) -> int | None:
        return stored_bytes(url, shard, endpoint_url)

    with ThreadPoolExecutor(16) as pool:
        for shard, size in zip(shards, pool.map(stored, shards), strict=True):
            if size != shard.bytes:
                state = "is missing" if size is None else f"has {size} bytes"
                raise ValueError(f"{storage.redact(url)}/{shard.name}: {state}; {DESCRIPTION} says {shard.bytes} bytes")
