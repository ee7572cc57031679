"""A shard set: tar shards, one manifest.parquet and one dataset.json; this file writes it and opens it.

A sample is two consecutive tar members, ``<key>.<webp|png|jpg>`` and ``<key>.json``, so that any webdataset reader can
use the shards alone. The manifest knows where each sample lies, so that a reader can take any range of samples.
dataset.json is written last: a set without it is not finished.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import logging
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from t2idist import storage
from t2idist.data.text import END, Vocabulary, count_words

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 2
DESCRIPTION = "dataset.json"
MANIFEST = "manifest.parquet"
EXTENSIONS = ("webp", "png", "jpg")
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,90}")
"""Keys have no dots (a dot ends a webdataset key) and no slashes, and fit a plain tar header."""

_NAME_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,120}")
_TAR_END = bytes(2 * tarfile.BLOCKSIZE)
_COLUMNS = pa.schema(
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


# ------------------------------------------------------------------------------------------------ writing
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
class Shard:
    """One tar. bytes, sha256: of the object as stored. tar_bytes: of the tar, which differs if it is compressed."""

    name: str
    samples: int
    bytes: int
    sha256: str
    tar_bytes: int


class ShardPacker:
    """Makes one shard's bytes; the same samples give the same bytes."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._tar = io.BytesIO()

    @property
    def tar_bytes(self) -> int:
        return self._tar.tell()

    def add(self, sample: SampleRecord) -> None:
        offset = self._tar.tell()
        facts = {"captions": sample.captions, "attributes": sample.attributes, "class_id": sample.class_id}
        self._member(f"{sample.key}.{sample.extension}", sample.image)
        self._member(f"{sample.key}.json", json.dumps(facts, ensure_ascii=False, sort_keys=True).encode())
        data = self._tar.getbuffer()[offset:]
        place = {"offset": offset, "size": len(data), "sha256": hashlib.sha256(data).digest()}
        seen = {"split": sample.split, "key": sample.key, "width": sample.width, "height": sample.height}
        self.rows.append({**seen, **place, **facts})

    def _member(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        info.mode = 0o444
        self._tar.write(info.tobuf(tarfile.USTAR_FORMAT))
        self._tar.write(data)
        self._tar.write(bytes(-len(data) % tarfile.BLOCKSIZE))

    def finish(self, name: str, compress: bool) -> tuple[Shard, bytes]:
        """The shard's description and its bytes; fills in the rows' shard."""
        tar = self._tar.getvalue() + _TAR_END
        data = gzip.compress(tar, compresslevel=9, mtime=0) if compress else tar
        for row in self.rows:
            row["shard"] = name
        return Shard(name, len(self.rows), len(data), storage.sha256(data), len(tar)), data


def write_shards(
    url: str,
    samples: Iterable[SampleRecord],
    *,
    source: str,
    licence: str,
    options: Mapping[str, Any] | None = None,
    shard_samples: int = 1000,
    shard_bytes: int = 100 << 20,
    compress: bool = False,
    min_count: int = 1,
) -> None:
    """Write a shard set; the same samples in the same order give the same bytes.

    samples: of all splits, mixed as they come; each split keeps its order. A shard ends at `shard_samples` samples or
    `shard_bytes` bytes. compress: gzip the shards (for small sets that ship; a reader then takes whole shards).
    min_count: words that are rarer are left out of the vocabulary, which is made of the captions of all splits.
    Raises ValueError for a key that comes twice, and when there is no sample.
    """
    if storage.exists(storage.join(url, DESCRIPTION)):
        raise ValueError(f"{storage.redact(url)}: holds a finished shard set already; remove it or give another folder")
    open_shards: dict[str, ShardPacker] = {}
    shards: dict[str, list[Shard]] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    keys: set[str] = set()

    def close(split: str) -> None:
        packer = open_shards.pop(split)
        name = f"{split}-{len(shards[split]):05d}.tar{'.gz' if compress else ''}"
        shard, data = packer.finish(name, compress)
        storage.write_bytes(storage.join(url, name), data)
        shards[split].append(shard)
        rows[split].extend(packer.rows)

    for sample in samples:
        if sample.key in keys:
            raise ValueError(f"sample key {sample.key!r} comes twice; each sample needs a key of its own")
        keys.add(sample.key)
        shards.setdefault(sample.split, [])
        rows.setdefault(sample.split, [])
        packer = open_shards.setdefault(sample.split, ShardPacker())
        packer.add(sample)
        if len(packer.rows) >= shard_samples or packer.tar_bytes >= shard_bytes:
            close(sample.split)
    for split in sorted(open_shards):
        close(split)
    if not keys:
        raise ValueError(f"{storage.redact(url)}: no sample to write")
    write_index(
        url, {s: shards[s] for s in sorted(shards)}, [row for s in sorted(rows) for row in rows[s]],
        source=source, licence=licence, options=options or {}, min_count=min_count,
    )  # fmt: skip


def write_index(
    url: str,
    shards: Mapping[str, Sequence[Shard]],
    rows: Sequence[Mapping[str, Any]],
    *,
    source: str,
    licence: str,
    options: Mapping[str, Any],
    min_count: int,
) -> None:
    """Write manifest.parquet and then dataset.json for shards that are written already; rows: by split and shard."""
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=_COLUMNS), sink, compression="zstd")
    manifest = sink.getvalue()
    storage.write_bytes(storage.join(url, MANIFEST), manifest)
    counts = count_words(caption for row in rows for caption in row["captions"])
    words = Vocabulary.from_counts(counts, min_count).words[1:]
    splits = {
        split: {"samples": sum(shard.samples for shard in of_split), "shards": [asdict(shard) for shard in of_split]}
        for split, of_split in shards.items()
    }
    description = {
        "schema": SCHEMA_VERSION,
        "source": source,
        "licence": licence,
        "options": dict(options),
        "manifest": {"bytes": len(manifest), "sha256": storage.sha256(manifest)},
        "splits": splits,
        "attributes": sorted({name for row in rows for name in row["attributes"]}),
        "vocabulary": {word: counts[word] for word in words},
    }
    storage.write_json(storage.join(url, DESCRIPTION), description)


# ------------------------------------------------------------------------------------------------ reading
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
        if not storage.exists(storage.join(url, DESCRIPTION)):
            raise ValueError(f"{where}: no {DESCRIPTION} there, so no finished shard set; is the URL right?")
        description = storage.read_json(storage.join(url, DESCRIPTION))
        version = description.get("schema") if isinstance(description, dict) else None
        if version != SCHEMA_VERSION:
            raise ValueError(f"{where}/{DESCRIPTION}: schema version {version!r}; this program reads {SCHEMA_VERSION}")
        try:
            listed = {name: split["shards"] for name, split in description["splits"].items()}
            shards = {name: tuple(Shard(**shard) for shard in of_split) for name, of_split in listed.items()}
            counts = {str(word): int(count) for word, count in description["vocabulary"].items()}
            names = tuple(str(name) for name in description["attributes"])
            source, licence, options = (description[key] for key in ("source", "licence", "options"))
            table = _read_manifest(url, int(description["manifest"]["bytes"]), description["manifest"]["sha256"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}/{DESCRIPTION}: not a shard set's description: {error!r}") from None
        splits = _split_table(where, shards, table)
        if check_sizes:
            _check_sizes(url, [shard for of_split in shards.values() for shard in of_split])
        return cls(url, splits, Vocabulary([END, *counts]), counts, names, source, licence, options, endpoint_url)

    def split(self, name: str) -> Split:
        """The split `name`; raises ValueError that names what exists."""
        if name not in self.splits:
            raise ValueError(f"{storage.redact(self.url)}: no split '{name}'; there are {', '.join(self.splits)}")
        return self.splits[name]


def _read_manifest(url: str, size: int, sha256: str) -> pa.Table:
    where = f"{storage.redact(url)}/{MANIFEST}"
    try:
        data = storage.read_bytes(storage.join(url, MANIFEST))
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
    if not table.schema.equals(_COLUMNS):
        raise ValueError(f"{where}: columns {table.schema.names}; expected {_COLUMNS.names} with their types")
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


def _check_sizes(url: str, shards: Sequence[Shard]) -> None:
    def found(shard: Shard) -> int | None:
        try:
            return storage.size(storage.join(url, shard.name))
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(16) as pool:
        for shard, size in zip(shards, pool.map(found, shards), strict=True):
            if size != shard.bytes:
                has = "is missing" if size is None else f"has {size} bytes"
                raise ValueError(f"{storage.redact(url)}/{shard.name}: {has}; {DESCRIPTION} says {shard.bytes} bytes")
