"""The rows of a manifest: one per sample, checked against the shards in dataset.json while they are read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from t2idist.data.sample_format import KEY_PATTERN, MAX_CAPTION_CHARACTERS

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
TEXTS = ("key", "sha256", "captions", "attributes")
"""Columns that are kept as they are."""
NUMBERS: dict[str, Any] = {
    "offsets": np.int64,
    "lengths": np.int64,
    "class_ids": np.int64,
    "has_class": np.bool_,
    "widths": np.int32,
    "heights": np.int32,
}
"""Columns that are arrays: class_ids are a sample's own index in its split if it has no class."""

_MAX_ROW_BYTES = 64 << 10
_SPARE_BYTES = 64 << 20
_ROWS_AT_ONCE, _BYTES_AT_ONCE = 1 << 16, 32 << 20
_HASHED_CHARACTERS = 96


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    name: str
    samples: int
    bytes: int
    """Size of the stored object."""
    sha256: str
    """Of the stored object."""
    tar_bytes: int
    """Size of the tar, which differs if the shard is compressed."""


def checked_parts(
    where: str, shards: Mapping[str, Sequence[Shard]], source: Any
) -> Iterator[tuple[dict[str, NDArray[Any]], pa.Table]]:
    """Check a manifest while it is read. All rows are right once the last part is out.

    Args:
        where: Name of the manifest, for messages.
        shards: The shards of each split, by dataset.json.
        source: The Parquet file, as pyarrow takes it.

    Yields:
        The columns of consecutive rows: `NUMBERS` and `TEXTS`.

    Raises:
        ValueError: If it is no manifest, or has rows that are not allowed or do not match the shards.
    """
    with _parquet_errors(where):
        file = pq.ParquetFile(source)
        metadata = file.metadata
        unpacked_bytes = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
        if unpacked_bytes > _SPARE_BYTES + metadata.num_rows * _MAX_ROW_BYTES:
            raise ValueError(f"{where}: unpacks to {unpacked_bytes} bytes, too many for {metadata.num_rows} samples")
        if not file.schema_arrow.equals(COLUMNS):
            raise ValueError(f"{where}: columns {file.schema_arrow.names}; expected {COLUMNS.names} with their types")
    expected = _ShardRows(where, shards, metadata.num_rows)
    hashes = bytearray()  # it grows in place
    for groups in _groups_at_once(metadata):
        with _parquet_errors(where):
            table = file.read_row_groups(groups)
            table.validate(full=True)
            table = table.combine_chunks()
        _check_values(where, table)
        numbers = expected.check(table)
        for piece in table["key"].chunks:
            hashes += _hash_keys(piece).data
        yield numbers, table.select(TEXTS)
    expected.check_end()
    _check_unique(where, file, hashes)


@contextlib.contextmanager
def _parquet_errors(where: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not a parquet file: {error}") from None
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{where}: not a parquet file: {str(error)[:300]}") from None


def _groups_at_once(metadata: Any) -> Iterator[list[int]]:
    """Yield the row groups to read together: a set has one for each shard, too small for one read each."""
    groups: list[int] = []
    rows = unpacked_bytes = 0
    for group in range(metadata.num_row_groups):
        facts = metadata.row_group(group)
        if groups and (
            rows + facts.num_rows > _ROWS_AT_ONCE or unpacked_bytes + facts.total_byte_size > _BYTES_AT_ONCE
        ):
            yield groups
            groups, rows, unpacked_bytes = [], 0, 0
        groups.append(group)
        rows += facts.num_rows
        unpacked_bytes += facts.total_byte_size
    if groups:
        yield groups


def _check_values(where: str, table: pa.Table) -> None:
    """Check for missing values, invalid keys, and captions that are too long."""
    for name in COLUMNS.names:
        column = table[name]
        missing = column.null_count + (pc.list_flatten(column).null_count if name in ("captions", "attributes") else 0)
        if missing and name != "class_id":
            raise ValueError(f"{where}: column {name} has {missing} missing values")
    good = pc.match_substring_regex(table["key"], f"^{KEY_PATTERN.pattern}$")
    if not pc.all(good, min_count=0).as_py():
        key = table["key"].filter(pc.invert(good))[0].as_py()
        raise ValueError(f"{where}: sample key {key[:100]!r} is not allowed; allowed are letters, digits, '_' and '-'")
    longest = pc.max(pc.utf8_length(pc.list_flatten(table["captions"]))).as_py() or 0
    if longest > MAX_CAPTION_CHARACTERS:
        raise ValueError(f"{where}: a caption has {longest} characters; at most {MAX_CAPTION_CHARACTERS} are allowed")


class _ShardRows:
    """Checks consecutive rows against the list of shards."""

    def __init__(self, where: str, shards: Mapping[str, Sequence[Shard]], rows: int) -> None:
        self._where = where
        listed = [(split, shard) for split, of_split in shards.items() for shard in of_split]
        self._count = sum(shard.samples for _, shard in listed)
        self._check_count(rows)
        self._splits = pa.array([split for split, _ in listed], pa.string())
        self._names = pa.array([shard.name for _, shard in listed], pa.string())
        self._tar_bytes = np.array([shard.tar_bytes for _, shard in listed], np.int64)
        self._ends = np.cumsum([shard.samples for _, shard in listed], dtype=np.int64)
        first = dict[str, int]()
        for (split, shard), end in zip(listed, self._ends, strict=True):
            first.setdefault(split, int(end) - shard.samples)
        self._split_starts = np.array([first[split] for split, _ in listed], np.int64)
        self._rows = 0
        self._end_before = 0

    def _check_count(self, rows: int) -> None:
        if rows != self._count:
            raise ValueError(f"{self._where}: {rows} rows; {DESCRIPTION} counts {self._count} samples")

    def check_end(self) -> None:
        self._check_count(self._rows)

    def check(self, table: pa.Table) -> dict[str, NDArray[Any]]:
        """Check the next rows. Returns their numbers, as `NUMBERS`."""
        at = np.arange(self._rows, self._rows + len(table))
        self._rows += len(table)
        if self._rows > self._count:
            self._check_count(self._rows)
        of_row = np.searchsorted(self._ends, at, side="right")
        for column, expected in (("shard", self._names), ("split", self._splits)):
            equal = pc.equal(table[column], expected.take(pa.array(of_row)))
            if not pc.all(equal, min_count=0).as_py():
                split = self._splits[int(of_row[int(pc.index(equal, False).as_py())])].as_py()
                raise ValueError(f"{self._where}: its rows of split '{split}' do not match the shards in {DESCRIPTION}")
        offsets, lengths = table["offset"].to_numpy(), table["size"].to_numpy()
        self._check_offsets(at, of_row, offsets, lengths)
        given = table["class_id"].fill_null(-1).to_numpy()
        return {
            "offsets": offsets,
            "lengths": lengths,
            "class_ids": np.where(given >= 0, given, at - self._split_starts[of_row]),
            "has_class": given >= 0,
            "widths": table["width"].to_numpy(),
            "heights": table["height"].to_numpy(),
        }

    def _check_offsets(
        self, at: NDArray[np.int64], of_row: NDArray[np.int64], offsets: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> None:
        if not len(at):
            return
        room = self._tar_bytes[of_row]
        ends = offsets + lengths
        starts = np.concatenate([[self._end_before], ends[:-1]])
        starts[np.isin(at, np.append(0, self._ends))] = 0
        wrong = (lengths <= 0) | (lengths > room) | (offsets != starts) | (ends > room)
        if wrong.any():
            name = self._names[int(of_row[int(wrong.argmax())])].as_py()
            raise ValueError(f"{self._where}: the offsets of the samples of {name} do not match its size")
        self._end_before = int(ends[-1])


def _hash_keys(keys: pa.Array) -> NDArray[np.uint64]:
    """Hash keys, which are ASCII and shorter than `_HASHED_CHARACTERS`, to 64 bits each."""
    padded = pc.ascii_rpad(keys, _HASHED_CHARACTERS, padding="\0").buffers()[2]
    words = np.frombuffer(padded, "<u8", len(keys) * _HASHED_CHARACTERS // 8).reshape(len(keys), -1)
    hashes = np.zeros(len(keys), np.uint64)
    for place in range(words.shape[1]):
        hashes = (hashes ^ words[:, place]) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    return hashes


def _check_unique(where: str, file: pq.ParquetFile, hashes: bytearray) -> None:
    """Check that no key occurs twice; the keys themselves are read again only where hashes are equal."""
    ordered = np.frombuffer(hashes, np.uint64)
    ordered.sort()
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(twice):
        return
    seen: set[str] = set()
    for groups in _groups_at_once(file.metadata):
        for piece in file.read_row_groups(groups, ["key"])["key"].chunks:
            for key in piece.filter(pa.array(np.isin(_hash_keys(piece), twice))).to_pylist():
                if key in seen:
                    raise ValueError(f"{where}: sample key {key!r} occurs more than once")
                seen.add(key)
