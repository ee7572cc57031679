"""A shard set: tar shards, one manifest.parquet and one dataset.json; this file opens it, data/pack.py writes it.

The manifest knows where each sample lies, so that a reader can take any range of samples. Any webdataset reader can
use the shards alone. dataset.json is written last: a set without it is not finished.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from t2idist import storage
from t2idist.data.samples import EXTENSIONS as EXTENSIONS
from t2idist.data.text import END, Vocabulary

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


@dataclass(frozen=True)
class Shard:
    """One tar. bytes, sha256: of the object as stored. tar_bytes: of the tar, which differs if it is compressed."""

    name: str
    samples: int
    bytes: int
    sha256: str
    tar_bytes: int


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
        own = pa.array(np.arange(len(table), dtype=np.int64))
        self.class_ids: NDArray[np.int64] = table["class_id"].combine_chunks().fill_null(-1).to_numpy()
        self.class_ids = np.where(self.class_ids < 0, own.to_numpy(), self.class_ids)
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
    store, where it is not the usual one.
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

    @classmethod
    def open(cls, url: str, check_sizes: bool = True, endpoint_url: str | None = None) -> Dataset:
        """Open the shard set at `url`.

        check_sizes: also ask storage for the size of every shard. endpoint_url: of the object store. Raises
        ValueError, naming the URL and what is wrong, for a missing or unfinished set, another schema version, and a
        manifest or sizes that do not fit.
        """
        where = storage.redact(url)
        if not storage.exists(storage.join(url, DESCRIPTION), endpoint_url=endpoint_url):
            raise ValueError(f"{where}: no {DESCRIPTION} there, so no finished shard set; is the URL right?")
        description = storage.read_json(storage.join(url, DESCRIPTION), endpoint_url=endpoint_url)
        version = description.get("schema") if isinstance(description, dict) else None
        if version != SCHEMA_VERSION:
            raise ValueError(f"{where}/{DESCRIPTION}: schema version {version!r}; this program reads {SCHEMA_VERSION}")
        try:
            listed = {name: split["shards"] for name, split in description["splits"].items()}
            shards = {name: tuple(Shard(**shard) for shard in of_split) for name, of_split in listed.items()}
            counts = {str(word): int(count) for word, count in description["vocabulary"].items()}
            names = tuple(str(name) for name in description["attributes"])
            source, licence, options = (description[key] for key in ("source", "licence", "options"))
            manifest = description["manifest"]
            table = _read_manifest(url, int(manifest["bytes"]), manifest["sha256"], endpoint_url)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}/{DESCRIPTION}: not a shard set's description: {error!r}") from None
        splits = _split_table(where, shards, table)
        if check_sizes:
            _check_sizes(url, [shard for of_split in shards.values() for shard in of_split], endpoint_url)
        return cls(url, splits, Vocabulary([END, *counts]), counts, names, source, licence, options, endpoint_url)

    def split(self, name: str) -> Split:
        """The split `name`; raises ValueError that names what exists."""
        if name not in self.splits:
            raise ValueError(f"{storage.redact(self.url)}: no split '{name}'; there are {', '.join(self.splits)}")
        return self.splits[name]


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
        table = pq.read_table(pa.BufferReader(data))
    except pa.ArrowException as error:
        raise ValueError(f"{where}: not a parquet file: {error}") from None
    if not table.schema.equals(COLUMNS):
        raise ValueError(f"{where}: columns {table.schema.names}; expected {COLUMNS.names} with their types")
    return table.combine_chunks()


def _split_table(where: str, shards: Mapping[str, tuple[Shard, ...]], table: pa.Table) -> dict[str, Split]:
    """The manifest's rows by split, checked against the list of shards."""
    splits = {}
    start = 0
    for name, of_split in shards.items():
        for shard in of_split:
            if not _NAME_PATTERN.fullmatch(shard.name):
                raise ValueError(f"{where}/{DESCRIPTION}: shard name {shard.name!r}; allowed are plain file names")
        expected = [shard.name for shard in of_split for _ in range(shard.samples)]
        rows = table.slice(start, len(expected))
        start += len(expected)
        if rows["shard"].to_pylist() != expected or set(rows["split"].to_pylist()) - {name}:
            raise ValueError(f"{where}/{MANIFEST}: its rows of split '{name}' do not fit the shards in {DESCRIPTION}")
        splits[name] = Split(name, of_split, rows)
        _check_offsets(where, splits[name])
    if start != len(table):
        raise ValueError(f"{where}/{MANIFEST}: {len(table)} rows; {DESCRIPTION} counts {start} samples")
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


def _check_sizes(url: str, shards: Sequence[Shard], endpoint_url: str | None) -> None:
    def found(shard: Shard) -> int | None:
        try:
            return storage.size(storage.join(url, shard.name), endpoint_url=endpoint_url)
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(16) as pool:
        for shard, size in zip(shards, pool.map(found, shards), strict=True):
            if size != shard.bytes:
                has = "is missing" if size is None else f"has {size} bytes"
                raise ValueError(f"{storage.redact(url)}/{shard.name}: {has}; {DESCRIPTION} says {shard.bytes} bytes")
