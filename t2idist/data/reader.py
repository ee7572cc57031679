"""Read ranges of samples, and parse the tar members of each.

The bytes come from our own storage layer; of webdataset, only the stage that expands tar members is used.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import tarfile
import threading
from collections import OrderedDict

from t2idist import storage
from t2idist.data.cache import ShardCache
from t2idist.data.decoded_cache import DecodedCache
from t2idist.data.order import SampleRange
from t2idist.data.sample_format import EXTENSIONS, VECTORS
from t2idist.data.samples import BadSample, EncodedImage, Sample, StoredSample
from t2idist.data.shards import Dataset, Shard, inflate

os.environ["WDS_SECURE"] = "1"  # webdataset reads it on import: no pipe: URLs, whatever it is given
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


class ShardReader:
    """Read the samples of one split; thread-safe.

    Args:
        dataset: The shard set.
        split: Name of the split.
        cache: Local cache of whole shards (None: every read goes to the store).
        decoded: Cache of decoded images (None: every image is returned as it is stored).
    """

    def __init__(
        self, dataset: Dataset, split: str, cache: ShardCache | None = None, decoded: DecodedCache | None = None
    ) -> None:
        self._url = dataset.url
        self._endpoint_url = dataset.endpoint_url
        self._split = dataset.split(split)
        self._cache = cache
        self._decoded = decoded
        self._starts = [0]
        for shard in self._split.shards:
            self._starts.append(self._starts[-1] + shard.samples)
        self._inflated: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self._stop = threading.Event()

    @property
    def mean_bytes(self) -> int:
        """Mean size in bytes of a stored sample."""
        return int(self._split.lengths.mean()) if len(self._split) else 0

    def close(self) -> None:
        """Cancel reads that wait for the store to recover; they raise storage.Cancelled."""
        self._stop.set()
        if self._cache is not None:
            self._cache.close()
        if self._decoded is not None:
            self._decoded.close()

    def read(self, samples: SampleRange) -> list[Sample]:
        """Read a range of samples, in order; those in the cache of decoded images are not decoded again.

        Raises:
            ValueError: As `read_stored`.
        """
        if self._decoded is None:
            return [*self.read_stored(samples)]
        decoded = self._decoded.find(self._indices(samples))
        found: list[Sample] = [image for image in decoded if image is not None]
        if len(found) == len(decoded):
            return found
        return [image or sample for image, sample in zip(decoded, self.read_stored(samples), strict=True)]

    def read_encoded(self, samples: SampleRange) -> list[EncodedImage | BadSample]:
        """Read the encoded images of a range of samples, in order.

        Raises:
            ValueError: As `read_stored`.
        """
        return [parse(sample) if isinstance(sample, StoredSample) else sample for sample in self.read_stored(samples)]

    def read_stored(self, samples: SampleRange) -> list[StoredSample | BadSample]:
        """Read a range of samples as they are stored, in order.

        If bytes differ from the hashes in the manifest, the range is read once more, from the store.

        Raises:
            ValueError: If the shard is missing, or shorter than the manifest says.
        """
        shard, indices = self._split.shards[samples.shard], self._indices(samples)
        keys = [self._split.keys[i] for i in indices]
        parts = self._read_parts(shard, indices, self._cache)
        corrupt = self._corrupt(indices, parts)
        if corrupt:
            named = ", ".join(self._split.keys[i] for i in sorted(corrupt)[:5])
            logger.warning(
                "%s: wrong bytes of %d samples (%s); reading again", self._location(shard), len(corrupt), named
            )
            self._evict(shard)
            parts = self._read_parts(shard, indices, None)
            corrupt = self._corrupt(indices, parts)
        return [
            BadSample("its bytes differ from the manifest's hash") if i in corrupt else StoredSample(key, bytes(part))
            for i, key, part in zip(indices, keys, parts, strict=True)
        ]

    def _indices(self, samples: SampleRange) -> range:
        first = self._starts[samples.shard] + samples.first
        return range(first, first + samples.count)

    def _read_parts(self, shard: Shard, indices: range, cache: ShardCache | None) -> list[memoryview]:
        """Return the bytes of each sample."""
        offsets, lengths = self._split.offsets, self._split.lengths
        start, end = int(offsets[indices[0]]), int(offsets[indices[-1]] + lengths[indices[-1]])
        try:
            data = self._read_tar(shard, start, end, cache)
        except FileNotFoundError:
            raise ValueError(f"{self._location(shard)}: is missing, though dataset.json lists it") from None
        if len(data) != end - start:
            raise ValueError(
                f"{self._location(shard)}: {len(data)} bytes from {start} on; the manifest needs {end - start}"
            )
        view = memoryview(data)
        return [view[offsets[i] - start : offsets[i] - start + lengths[i]] for i in indices]

    def _corrupt(self, indices: range, parts: list[memoryview]) -> set[int]:
        """Return the samples whose bytes differ from the manifest's hash."""
        hashes = (hashlib.sha256(part).digest() for part in parts)
        return {i for i, digest in zip(indices, hashes, strict=True) if digest != self._split.sha256(i)}

    def _evict(self, shard: Shard) -> None:
        if self._cache is not None:
            self._cache.drop(shard)
        with self._lock:
            self._inflated.pop(shard.name, None)

    def _location(self, shard: Shard) -> str:
        return storage.redact(storage.join(self._url, shard.name))

    def _read_tar(self, shard: Shard, start: int, end: int, cache: ShardCache | None) -> bytes:
        if not shard.name.endswith(".gz"):
            return self._read_stored(shard, start, end, cache)
        with self._lock:
            if shard.name not in self._inflated:
                data = self._read_stored(shard, 0, shard.bytes, cache)
                self._inflated[shard.name] = self._inflate(data, shard)
                while len(self._inflated) > 1 and sum(map(len, self._inflated.values())) > _INFLATED_BYTES_KEPT:
                    self._inflated.popitem(last=False)
            self._inflated.move_to_end(shard.name)
            return self._inflated[shard.name][start:end]

    def _inflate(self, data: bytes, shard: Shard) -> bytes:
        try:
            return inflate(data, shard)
        except ValueError as error:
            raise ValueError(f"{self._location(shard)}: {error}") from None

    def _read_stored(self, shard: Shard, start: int, end: int, cache: ShardCache | None) -> bytes:
        cached = None if cache is None else cache.read(shard, start, end)
        if cached is not None:
            return cached
        url = storage.join(self._url, shard.name)
        return storage.read_bytes(url, start, end, endpoint_url=self._endpoint_url, stop=self._stop)


def parse(sample: StoredSample) -> EncodedImage | BadSample:
    """Parse the tar members of a sample."""
    try:
        return _parse(sample.key, sample.data)
    except (KeyError, ValueError, tarfile.TarError, OSError, EOFError) as error:
        return BadSample(f"not readable in its shard: {error!r}"[:200])


def _parse(key: str, data: bytes) -> EncodedImage:
    if data[: len(key) + 1] != f"{key}.".encode():
        raise ValueError(f"no tar header of sample {key} at its offset")  # nor is it a compressed stream
    _check_members(data)
    source = [{"url": key, "stream": io.BytesIO(data)}]
    samples = group_by_keys(tar_file_expander(source, select_files=_select_member))
    return {sample["__key__"]: _encoded_image(sample) for sample in samples}[key]


def _check_members(data: bytes) -> None:
    """Raise ValueError for a member that is not a plain file, and for sizes that do not match the bytes."""
    at = 0
    while at < len(data):
        header = data[at : at + tarfile.BLOCKSIZE]
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
        raise ValueError("its members do not match its size")


def _select_member(name: str) -> bool:
    """Return whether to read a member; raises ValueError for a name that leaves its folder."""
    if name.startswith("/") or ".." in name.split("/") or "\\" in name:
        raise ValueError(f"member name {name[:100]!r} is not allowed")
    return not name.endswith(".json")


def _encoded_image(sample: dict[str, bytes]) -> EncodedImage:
    for extension in EXTENSIONS:
        if extension in sample:
            return EncodedImage(sample[extension], extension, sample.get(VECTORS, b""))
    raise ValueError(f"no image ({', '.join(EXTENSIONS)}) among its members {[n for n in sample if n[:2] != '__']}")
