"""A shard set: tar shards, one manifest.parquet and one dataset.json; this file opens it, data/pack.py writes it.

The manifest knows where each sample lies, so that a reader can take any range of samples. Any webdataset reader can
use the shards alone. dataset.json is written last: a set without it is not finished.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from t2idist import storage
from t2idist.contract import DataInfo
from t2idist.data.sample_format import KEY_PATTERN, MAX_CAPTION_CHARACTERS, MAX_VECTOR_DIM, VECTOR_TYPES, npy_header
from t2idist.data.tokenizer import END, Vocabulary

SCHEMA_VERSION = 2
DESCRIPTION = "dataset.json"
MANIFEST = "manifest.parquet"
COLUMNS = pa.schema(
    [
        ("split", pa.string()),
        ("shard", pa.string()),
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("sha256", pa.binary(32)),
        ("captions", pa.list_(pa.string())),
        ("attributes", pa.list_(pa.string())),
        ("class_id", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)

_NAME_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,120}")
_DESCRIPTION_MAX_BYTES = 256 << 20
_MANIFEST_MAX_ROW_BYTES = 64 << 10
_MANIFEST_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class Shard:
    """One tar. bytes, sha256: of the object as stored. tar_bytes: of the tar, which differs if it is compressed."""

    name: str
    samples: int
    bytes: int
    sha256: str
    tar_bytes: int


@dataclass(frozen=True)
class VectorFacts:
    """The sentence vectors of a set: one for each caption of each sample, in the captions' order.

    dtype: float16 or float32. encoder: what made them: its name and what else tells it from others.
    """

    dim: int
    dtype: str
    encoder: dict[str, Any]

    def __post_init__(self) -> None:
        if self.dtype not in VECTOR_TYPES:
            raise ValueError(f"vectors of {self.dtype!r}; allowed are {', '.join(VECTOR_TYPES)}")
        if isinstance(self.dim, bool) or not isinstance(self.dim, int) or not 1 <= self.dim <= MAX_VECTOR_DIM:
            raise ValueError(f"vectors of {self.dim!r} numbers; allowed are 1 to {MAX_VECTOR_DIM}")
        if not isinstance(self.encoder, dict):
            raise ValueError(f"the vectors' encoder is {self.encoder!r}; it must be a mapping")

    def read(self, data: bytes, captions: int) -> NDArray[np.float32]:
        """A sample's vectors (captions, dim). Raises ValueError with the reason where `data` is no such array."""
        if not data:
            raise ValueError("has no sentence vectors")
        header = npy_header(self.dtype, captions, self.dim)
        numbers = np.dtype(VECTOR_TYPES[self.dtype])
        if not data.startswith(header) or len(data) != len(header) + captions * self.dim * numbers.itemsize:
            raise ValueError(f"its sentence vectors are not {captions} x {self.dim} numbers of {self.dtype}")
        found = np.frombuffer(data, numbers, offset=len(header)).reshape(captions, self.dim).astype(np.float32)
        if not np.isfinite(found).all():
            raise ValueError("its sentence vectors have values that are not finite")
        return found


class Split:
    """The samples of one split, by index 0 .. len - 1, in the order of the shards.

    offsets, lengths: (n,) bytes in the tar. class_ids: (n,), a sample's own index where the data has none.
    """

    def __init__(self, name: str, shards: tuple[Shard, ...], table: pa.Table) -> None:
        self.name = name
        self.shards = shards
        self.keys: list[str] = table["key"].to_pylist()
        self.offsets: NDArray[np.int64] = table["offset"].to_numpy()
        self.lengths: NDArray[np.int64] = table["size"].to_numpy()
        self._hashes = table["sha256"].combine_chunks()
        given: NDArray[np.int64] = table["class_id"].combine_chunks().fill_null(-1).to_numpy()
        self._has_class = given >= 0
        self.class_ids: NDArray[np.int64] = np.where(self._has_class, given, np.arange(len(table), dtype=np.int64))
        self._widths = table["width"].to_numpy()
        self._heights = table["height"].to_numpy()
        self._captions = table["captions"].combine_chunks()
        self._attributes = table["attributes"].combine_chunks()

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def shard_sizes(self) -> list[int]:
        """Samples per shard."""
        return [shard.samples for shard in self.shards]

    def sha256(self, index: int) -> bytes:
        """Of the sample's bytes in the tar, headers and padding included."""
        found: bytes = self._hashes[index].as_py()
        return found

    def has_class(self, index: int) -> bool:
        """Whether the data gives the sample a class."""
        return bool(self._has_class[index])

    def picture_size(self, index: int) -> tuple[int, int]:
        """Width and height in pixels."""
        return int(self._widths[index]), int(self._heights[index])

    def captions(self, index: int) -> list[str]:
        found: list[str] = self._captions[index].as_py()
        return found

    def attributes(self, index: int) -> list[str]:
        found: list[str] = self._attributes[index].as_py()
        return found


@dataclass(frozen=True)
class Dataset:
    """An opened shard set.

    vocabulary: of all its captions. word_counts: by word. source, licence: for reports. endpoint_url: of the object
    store, where it is not the usual one. vectors: of its sentence vectors (None: it has none).
    """

    url: str
    splits: dict[str, Split]
    vocabulary: Vocabulary
    word_counts: dict[str, int]
    attribute_names: tuple[str, ...]
    source: str
    licence: str
    options: dict[str, Any]
    endpoint_url: str | None = None
    vectors: VectorFacts | None = None

    @classmethod
    def open(cls, url: str, check_sizes: bool = True, endpoint_url: str | None = None) -> Dataset:
        """Open the shard set at `url`.

        check_sizes: also ask storage for the size of every shard. endpoint_url: of the object store. Raises
        ValueError, naming the URL and what is wrong, for a missing or unfinished set, another schema version, and a
        manifest or sizes that do not fit.
        """
        where = storage.redact(url)
        description = _read_description(url, endpoint_url)
        try:
            listed = {name: split["shards"] for name, split in description["splits"].items()}
            shards = {name: tuple(_shard(where, shard) for shard in of_split) for name, of_split in listed.items()}
            counts = {str(word): int(count) for word, count in description["vocabulary"].items()}
            names = tuple(str(name) for name in description["attributes"])
            source, licence, options = (description[key] for key in ("source", "licence", "options"))
            manifest_bytes, manifest_sha256 = (description["manifest"][key] for key in ("bytes", "sha256"))
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{where}/{DESCRIPTION}: not a shard set's description: {error!r}") from None
        vectors = _read_vector_facts(where, description)
        table = _read_manifest(url, manifest_bytes, manifest_sha256, endpoint_url)
        splits = _split_table(where, shards, table)
        if check_sizes:
            _check_sizes(url, [shard for of_split in shards.values() for shard in of_split], endpoint_url)
        return cls(
            url,
            splits,
            Vocabulary([END, *counts]),
            counts,
            names,
            str(source),
            str(licence),
            dict(options),
            endpoint_url,
            vectors,
        )

    @property
    def extent(self) -> DataInfo:
        """What a system may know of it. Raises ValueError where there is no train split."""
        words, images = tuple(self.vocabulary.words), len(self.split("train"))
        return DataInfo(words, images, self.vector_dim, (tuple(self.attribute_names),))

    @property
    def vector_dim(self) -> int:
        """Of its sentence vectors, 0 where there are none."""
        return 0 if self.vectors is None else self.vectors.dim

    def split(self, name: str) -> Split:
        """The split `name`; raises ValueError that names what exists."""
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


def _read_vector_facts(where: str, description: Mapping[str, Any]) -> VectorFacts | None:
    said = description.get("vectors")
    if said is None:
        return None
    try:
        return VectorFacts(**said)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}/{DESCRIPTION}: vectors: {error}") from None


def _shard(where: str, facts: Mapping[str, Any]) -> Shard:
    shard = Shard(**facts)
    if not isinstance(shard.name, str) or not _NAME_PATTERN.fullmatch(shard.name):
        raise ValueError(f"{where}/{DESCRIPTION}: shard name {shard.name!r}; allowed are plain file names")
    for name in ("samples", "bytes", "tar_bytes"):
        value = facts[name]
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**60:
            raise ValueError(f"{where}/{DESCRIPTION}: {name} of shard {shard.name} is {value!r}; it must be positive")
    return shard


def _read_manifest(url: str, size: int, sha256: str, endpoint_url: str | None) -> pa.Table:
    where = f"{storage.redact(url)}/{MANIFEST}"
    try:
        data = storage.read_bytes(storage.join(url, MANIFEST), endpoint_url=endpoint_url)
    except FileNotFoundError:
        raise ValueError(f"{where}: missing, though {DESCRIPTION} names it") from None
    if len(data) != size or storage.sha256(data) != sha256:
        raise ValueError(
            f"{where}: its {len(data)} bytes are not those that {DESCRIPTION} describes ({size} bytes, hash)"
        )
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        facts = file.metadata
        unpacked_bytes = sum(facts.row_group(group).total_byte_size for group in range(facts.num_row_groups))
        if unpacked_bytes > _MANIFEST_SPARE_BYTES + facts.num_rows * _MANIFEST_MAX_ROW_BYTES:
            raise ValueError(f"{where}: unpacks to {unpacked_bytes} bytes, too many for {facts.num_rows} samples")
        table = file.read()
        table.validate(full=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: not a parquet file: {str(error)[:300]}") from None
    if not table.schema.equals(COLUMNS):
        raise ValueError(f"{where}: columns {table.schema.names}; expected {COLUMNS.names} with their types")
    table = table.combine_chunks()
    _check_values(where, table)
    return table


def _check_values(where: str, table: pa.Table) -> None:
    """No holes, keys as they must be, captions of a length that somebody could have written."""
    for name in COLUMNS.names:
        column = table[name]
        items = column.null_count + (pc.list_flatten(column).null_count if name in ("captions", "attributes") else 0)
        if items and name != "class_id":
            raise ValueError(f"{where}: column {name} has {items} values that are missing")
    good = pc.match_substring_regex(table["key"], f"^{KEY_PATTERN.pattern}$")
    if not pc.all(good, min_count=0).as_py():
        key = table["key"].filter(pc.invert(good))[0].as_py()
        raise ValueError(f"{where}: sample key {key[:100]!r} is not allowed; allowed are letters, digits, '_' and '-'")
    longest = pc.max(pc.utf8_length(pc.list_flatten(table["captions"]))).as_py() or 0
    if longest > MAX_CAPTION_CHARACTERS:
        raise ValueError(f"{where}: a caption has {longest} characters; at most {MAX_CAPTION_CHARACTERS} are allowed")


def _split_table(where: str, shards: Mapping[str, tuple[Shard, ...]], table: pa.Table) -> dict[str, Split]:
    """The manifest's rows by split, checked against the list of shards."""
    splits = {}
    start = 0
    counted = sum(shard.samples for of_split in shards.values() for shard in of_split)
    if counted != len(table):
        raise ValueError(f"{where}/{MANIFEST}: {len(table)} rows; {DESCRIPTION} counts {counted} samples")
    for name, of_split in shards.items():
        expected = [shard.name for shard in of_split for _ in range(shard.samples)]
        rows = table.slice(start, len(expected))
        start += len(expected)
        if rows["shard"].to_pylist() != expected or set(rows["split"].to_pylist()) - {name}:
            raise ValueError(f"{where}/{MANIFEST}: its rows of split '{name}' do not fit the shards in {DESCRIPTION}")
        splits[name] = Split(name, of_split, rows)
        _check_offsets(where, splits[name])
    twice = [key for key, times in Counter(table["key"].to_pylist()).items() if times > 1]
    if twice:
        raise ValueError(f"{where}/{MANIFEST}: sample key {twice[0]!r} comes more than once")
    return splits


def _check_offsets(where: str, split: Split) -> None:
    first = 0
    for shard in split.shards:
        offsets, lengths = (values[first : first + shard.samples] for values in (split.offsets, split.lengths))
        ends = np.concatenate([[0], offsets + lengths])
        if (lengths <= 0).any() or not np.array_equal(offsets, ends[:-1]) or ends[-1] > shard.tar_bytes:
            raise ValueError(f"{where}/{MANIFEST}: the places of the samples of {shard.name} do not fit its size")
        first += shard.samples


def inflate(data: bytes, shard: Shard) -> bytes:
    """The tar of a gzipped shard's bytes; never makes more bytes than dataset.json promises, raises ValueError."""
    machine = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        tar = machine.decompress(data, shard.tar_bytes + 1)
    except zlib.error as error:
        raise ValueError(f"not a gzip file: {error}") from None
    if len(tar) != shard.tar_bytes:
        raise ValueError(f"unpacks to {len(tar)} bytes or more; {DESCRIPTION} says {shard.tar_bytes}")
    return tar


def stored_bytes(url: str, shard: Shard, endpoint_url: str | None = None) -> int | None:
    """The size of the shard of that name in the set at `url`; None where it is missing."""
    try:
        return storage.size(storage.join(url, shard.name), endpoint_url=endpoint_url)
    except FileNotFoundError:
        return None


def _check_sizes(url: str, shards: Sequence[Shard], endpoint_url: str | None) -> None:
    def found(shard: Shard) -> int | None:
        return stored_bytes(url, shard, endpoint_url)

    with ThreadPoolExecutor(16) as pool:
        for shard, size in zip(shards, pool.map(found, shards), strict=True):
            if size != shard.bytes:
                has = "is missing" if size is None else f"has {size} bytes"
                raise ValueError(f"{storage.redact(url)}/{shard.name}: {has}; {DESCRIPTION} says {shard.bytes} bytes")
