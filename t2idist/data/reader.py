"""From a range of samples to their encoded pictures: our own bytes, webdataset's tar stage, nothing else of it."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import tarfile
import threading
from collections import OrderedDict
from dataclasses import dataclass

from t2idist import storage
from t2idist.data.cache import ShardCache
from t2idist.data.order import SampleRange
from t2idist.data.sample_format import EXTENSIONS, VECTORS
from t2idist.data.shards import Dataset, Shard, inflate

os.environ["WDS_SECURE"] = "1"  # no pipe: URLs, should webdataset ever be handed one; read when it is imported
from webdataset.tariterators import group_by_keys, tar_file_expander

logger = logging.getLogger(__name__)

_INFLATED_BYTES_KEPT = 64 << 20
_PLAIN = (tarfile.REGTYPE[0], tarfile.AREGTYPE[0])
_KINDS = {
    **dict.fromkeys(b"12", "a link"),
    **dict.fromkeys(b"34", "a device"),
    **dict.fromkeys(b"5", "a folder"),
    **dict.fromkeys(b"6", "a pipe"),
    **dict.fromkeys(b"S", "a file with holes"),
    **dict.fromkeys(b"xgLKX", "an extended header"),
}


@dataclass(frozen=True)
class Encoded:
    """A picture as it is stored. extension: webp, png or jpg. vectors: those of its captions, as they are stored."""

    data: bytes
    extension: str
    vectors: bytes = b""


@dataclass(frozen=True)
class Bad:
    """In the place of a sample that cannot be used, and why."""

    reason: str


class ShardReader:
    """Reads samples of one split; may be used by several threads. cache: keeps whole shards here (None: no cache)."""

    def __init__(self, dataset: Dataset, split: str, cache: ShardCache | None = None) -> None:
        self._url = dataset.url
        self._endpoint_url = dataset.endpoint_url
        self._split = dataset.split(split)
        self._cache = cache
        self._starts = [0]
        for shard in self._split.shards:
            self._starts.append(self._starts[-1] + shard.samples)
        self._inflated: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self._stop = threading.Event()

    @property
    def mean_bytes(self) -> int:
        """Of a sample of the split."""
        return int(self._split.lengths.mean()) if len(self._split) else 0

    def close(self) -> None:
        """End reads that wait for the store to come back: they raise storage.Cancelled."""
        self._stop.set()
        if self._cache is not None:
            self._cache.close()

    def read(self, run: SampleRange) -> list[Encoded | Bad]:
        """The run's samples in order; bytes that are not those of the manifest are read once more from the store.

        Raises ValueError when the shard is missing, or shorter than the manifest says.
        """
        shard = self._split.shards[run.shard]
        first = self._starts[run.shard] + run.first
        places = range(first, first + run.count)
        keys = [self._split.keys[i] for i in places]
        data, pieces = self._pieces(shard, places, self._cache)
        wrong = self._wrong(places, pieces)
        if wrong:
            named = ", ".join(self._split.keys[i] for i in sorted(wrong)[:5])
            logger.warning("%s: wrong bytes of %d samples (%s); reading again", self._where(shard), len(wrong), named)
            self._forget(shard)
            data, pieces = self._pieces(shard, places, None)
            wrong = self._wrong(places, pieces)
        if not wrong:
            try:
                found = _expand(keys[0], data)
                return [found[key] for key in keys]
            except (KeyError, ValueError, tarfile.TarError, OSError, EOFError):
                pass  # find out below which sample it is
        return [
            Bad("its bytes differ from the manifest's hash") if i in wrong else _expand_one(key, piece)
            for i, key, piece in zip(places, keys, pieces, strict=True)
        ]

    def _pieces(self, shard: Shard, places: range, cache: ShardCache | None) -> tuple[bytes, list[memoryview]]:
        """The samples' bytes, all in one and each alone."""
        offsets, lengths = self._split.offsets, self._split.lengths
        start, end = int(offsets[places[0]]), int(offsets[places[-1]] + lengths[places[-1]])
        try:
            data = self._range(shard, start, end, cache)
        except FileNotFoundError:
            raise ValueError(f"{self._where(shard)}: is missing, though dataset.json lists it") from None
        if len(data) != end - start:
            raise ValueError(
                f"{self._where(shard)}: {len(data)} bytes from {start} on; the manifest needs {end - start}"
            )
        view = memoryview(data)
        return data, [view[offsets[i] - start : offsets[i] - start + lengths[i]] for i in places]

    def _wrong(self, places: range, pieces: list[memoryview]) -> set[int]:
        """Samples whose bytes are not those of the manifest."""
        hashes = (hashlib.sha256(piece).digest() for piece in pieces)
        return {i for i, found in zip(places, hashes, strict=True) if found != self._split.sha256(i)}

    def _forget(self, shard: Shard) -> None:
        if self._cache is not None:
            self._cache.drop(shard)
        with self._lock:
            self._inflated.pop(shard.name, None)

    def _where(self, shard: Shard) -> str:
        return storage.redact(storage.join(self._url, shard.name))

    def _range(self, shard: Shard, start: int, end: int, cache: ShardCache | None) -> bytes:
        if not shard.name.endswith(".gz"):
            return self._stored(shard, start, end, cache)
        with self._lock:
            if shard.name not in self._inflated:
                data = self._stored(shard, 0, shard.bytes, cache)
                self._inflated[shard.name] = self._inflate(data, shard)
                while len(self._inflated) > 1 and sum(map(len, self._inflated.values())) > _INFLATED_BYTES_KEPT:
                    self._inflated.popitem(last=False)
            self._inflated.move_to_end(shard.name)
            return self._inflated[shard.name][start:end]

    def _inflate(self, data: bytes, shard: Shard) -> bytes:
        try:
            return inflate(data, shard)
        except ValueError as error:
            raise ValueError(f"{self._where(shard)}: {error}") from None

    def _stored(self, shard: Shard, start: int, end: int, cache: ShardCache | None) -> bytes:
        kept = None if cache is None else cache.read(shard, start, end)
        if kept is not None:
            return kept
        url = storage.join(self._url, shard.name)
        return storage.read_bytes(url, start, end, endpoint_url=self._endpoint_url, stop=self._stop)


def _expand(first_key: str, data: memoryview | bytes) -> dict[str, Encoded]:
    """The pictures in consecutive samples' bytes, by key."""
    if bytes(data[: len(first_key) + 1]) != f"{first_key}.".encode():
        raise ValueError(f"no tar header of sample {first_key} at its place")  # so it is no compressed stream either
    _check_members(data)
    source = [{"url": first_key, "stream": io.BytesIO(data)}]
    samples = group_by_keys(tar_file_expander(source, select_files=_wanted))
    return {sample["__key__"]: _picture(sample) for sample in samples}


def _check_members(data: memoryview | bytes) -> None:
    """Raises ValueError for a member that is no plain file, and for sizes that do not fit the bytes."""
    at = 0
    while at < len(data):
        header = bytes(data[at : at + tarfile.BLOCKSIZE])
        name = header[:100].rstrip(b"\0").decode(errors="replace")
        if len(header) < tarfile.BLOCKSIZE or header[156] not in _PLAIN:
            kind = _KINDS.get(header[156], "of an unknown kind") if len(header) == tarfile.BLOCKSIZE else "cut off"
            raise ValueError(f"member {name!r} is {kind}; only plain files are allowed")
        digits = header[124:136].strip(b" \0")
        if not digits.isdigit():
            raise ValueError(f"member {name!r} has no readable size")
        size = int(digits, 8)
        at += tarfile.BLOCKSIZE + size + -size % tarfile.BLOCKSIZE
    if at != len(data):
        raise ValueError("its members do not fit its bytes")


def _expand_one(key: str, data: memoryview) -> Encoded | Bad:
    try:
        return _expand(key, data)[key]
    except (KeyError, ValueError, tarfile.TarError, OSError, EOFError) as error:
        return Bad(f"not readable in its shard: {error!r}"[:200])


def _wanted(name: str) -> bool:
    """Whether to read a member; raises ValueError for a name that leaves its folder."""
    if name.startswith("/") or ".." in name.split("/") or "\\" in name:
        raise ValueError(f"member name {name[:100]!r} is not allowed")
    return not name.endswith(".json")


def _picture(sample: dict[str, bytes]) -> Encoded:
    for extension in EXTENSIONS:
        if extension in sample:
            return Encoded(sample[extension], extension, sample.get(VECTORS, b""))
    raise ValueError(f"no picture ({', '.join(EXTENSIONS)}) among its members {[n for n in sample if n[:2] != '__']}")
