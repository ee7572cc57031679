"""From a range of samples to their encoded pictures: our own bytes, webdataset's tar stage, nothing else of it."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import threading
import zlib
from collections import OrderedDict
from dataclasses import dataclass

from t2idist import storage
from t2idist.data.order import Run
from t2idist.data.shards import EXTENSIONS, Dataset, Shard

os.environ["WDS_SECURE"] = "1"  # no pipe: URLs, should webdataset ever be handed one; read when it is imported
from webdataset.tariterators import group_by_keys, tar_file_expander

_INFLATED_BYTES_KEPT = 64 << 20


@dataclass(frozen=True)
class Encoded:
    """A picture as it is stored. extension: webp, png or jpg."""

    data: bytes
    extension: str


@dataclass(frozen=True)
class Bad:
    """In the place of a sample that cannot be used, and why."""

    reason: str


class ShardReader:
    """Reads samples of one split; may be used by several threads."""

    def __init__(self, dataset: Dataset, split: str) -> None:
        self._url = dataset.url
        self._split = dataset.split(split)
        self._starts = [0]
        for shard in self._split.shards:
            self._starts.append(self._starts[-1] + shard.samples)
        self._inflated: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, run: Run) -> list[Encoded | Bad]:
        """The run's samples in order; raises ValueError when the shard is shorter than the manifest says."""
        shard = self._split.shards[run.shard]
        first = self._starts[run.shard] + run.first
        places = range(first, first + run.count)
        offsets, lengths = self._split.offsets, self._split.lengths
        start, end = int(offsets[places[0]]), int(offsets[places[-1]] + lengths[places[-1]])
        data = memoryview(self._range(shard, start, end))
        if len(data) != end - start:
            raise ValueError(
                f"{self._where(shard)}: {len(data)} bytes from {start} on; the manifest needs {end - start}"
            )
        pieces = [data[offsets[i] - start : offsets[i] - start + lengths[i]] for i in places]
        keys = [self._split.keys[i] for i in places]
        sound = [hashlib.sha256(piece).digest() == self._split.sha256(i) for piece, i in zip(pieces, places, strict=True)]
        if all(sound):
            try:
                found = _expand(keys[0], data)
                return [found[key] for key in keys]
            except (KeyError, ValueError, tarfile.TarError, OSError, EOFError):
                pass  # find out below which sample it is
        return [
            _expand_one(key, piece) if good else Bad("its bytes differ from the manifest's hash")
            for key, piece, good in zip(keys, pieces, sound, strict=True)
        ]

    def _where(self, shard: Shard) -> str:
        return storage.redact(storage.join(self._url, shard.name))

    def _range(self, shard: Shard, start: int, end: int) -> bytes:
        url = storage.join(self._url, shard.name)
        if not shard.name.endswith(".gz"):
            return storage.read_bytes(url, start, end)
        with self._lock:
            if shard.name not in self._inflated:
                self._inflated[shard.name] = _inflate(storage.read_bytes(url), shard, self._where(shard))
                while len(self._inflated) > 1 and sum(map(len, self._inflated.values())) > _INFLATED_BYTES_KEPT:
                    self._inflated.popitem(last=False)
            self._inflated.move_to_end(shard.name)
            return self._inflated[shard.name][start:end]


def _inflate(data: bytes, shard: Shard, where: str) -> bytes:
    """The tar of a gzipped shard; never makes more bytes than its description promises."""
    machine = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        tar = machine.decompress(data, shard.tar_bytes + 1)
    except zlib.error as error:
        raise ValueError(f"{where}: not a gzip file: {error}") from None
    if len(tar) != shard.tar_bytes:
        raise ValueError(f"{where}: unpacks to {len(tar)} bytes or more; expected {shard.tar_bytes}")
    return tar


def _expand(first_key: str, data: memoryview | bytes) -> dict[str, Encoded]:
    """The pictures in consecutive samples' bytes, by key."""
    if bytes(data[: len(first_key) + 1]) != f"{first_key}.".encode():
        raise ValueError(f"no tar header of sample {first_key} at its place")  # so it is no compressed stream either
    source = [{"url": first_key, "stream": io.BytesIO(data)}]
    samples = group_by_keys(tar_file_expander(source, select_files=_wanted))
    return {sample["__key__"]: _picture(sample) for sample in samples}


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
            return Encoded(sample[extension], extension)
    raise ValueError(f"no picture ({', '.join(EXTENSIONS)}) among its members {[n for n in sample if n[:2] != '__']}")
