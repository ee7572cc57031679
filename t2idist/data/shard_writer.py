"""Write shard sets: the shards, then manifest.parquet, then dataset.json, which marks the set as finished."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from t2idist import storage
from t2idist.data.sample_format import PackedSample, SampleRecord, pack
from t2idist.data.shards import COLUMNS, DESCRIPTION, MANIFEST, SCHEMA_VERSION, SentenceVectorInfo, Shard
from t2idist.data.statistics import IMAGES_KEY, ImageStatistics
from t2idist.data.tokenizer import ASCII, UNICODE, Vocabulary, recorded, tokenize, words_of

_TAR_END = bytes(2 * tarfile.BLOCKSIZE)
Row = dict[str, Any]


class ShardBuilder:
    """Collect the samples of one shard; deterministic."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.tar_bytes = 0
        self._parts: list[bytes] = []

    def add(self, packed: PackedSample) -> None:
        self.rows.append({**packed.row, "offset": self.tar_bytes})
        self._parts.append(packed.tar)
        self.tar_bytes += len(packed.tar)

    def finish(self, name: str, compress: bool = False) -> tuple[Shard, bytes]:
        """Return the shard's description and its bytes, and set the shard's name in the rows."""
        tar = b"".join([*self._parts, _TAR_END])
        self._parts.clear()
        data = gzip.compress(tar, compresslevel=9, mtime=0) if compress else tar
        for row in self.rows:
            row["shard"] = name
        return Shard(name, len(self.rows), len(data), storage.sha256(data), len(tar)), data


def available_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    encoder: Mapping[str, Any] | None = None,
    tokenizer: str = ASCII,
) -> None:
    """Write a shard set; the same samples in the same order give the same bytes.

    Args:
        url: Folder of the new set.
        samples: Samples of all splits, in any order; each split keeps its order.
        source, licence, options: Recorded in dataset.json.
        shard_samples, shard_bytes: A shard ends at either limit.
        compress: Gzip the shards. Meant for small sets that ship with a package: readers then read whole shards.
        min_count: Words that occur fewer times in the captions of all splits are left out of the vocabulary.
        encoder: What identifies the encoder of the sentence vectors, which either all samples have or none has.
        tokenizer: What splits the captions into words (`t2idist.data.tokenizer`).

    Raises:
        ValueError: If `url` holds a finished set, a key occurs twice, the formats of sentence vectors differ, or there
            is no sample.
    """
    check_unfinished(url)
    open_shards: dict[str, ShardBuilder] = {}
    shards: dict[str, list[Shard]] = {}
    rows: dict[str, list[list[Row]]] = {}
    keys: set[str] = set()
    vector_format = _VectorFormatCheck(dict(encoder or {}))

    def close(split: str) -> None:
        builder = open_shards.pop(split)
        name = f"{shard_name(split, len(shards[split]))}{'.gz' if compress else ''}"
        shard, data = builder.finish(name, compress)
        storage.write_bytes(storage.join(url, name), data)
        shards[split].append(shard)
        rows[split].append(builder.rows)

    for sample in samples:
        if sample.key in keys:
            raise ValueError(f"sample key {sample.key!r} occurs twice; keys must be unique")
        keys.add(sample.key)
        vector_format.check(sample)
        shards.setdefault(sample.split, [])
        rows.setdefault(sample.split, [])
        builder = open_shards.setdefault(sample.split, ShardBuilder())
        builder.add(pack(sample))
        if len(builder.rows) >= shard_samples or builder.tar_bytes >= shard_bytes:
            close(sample.split)
    for split in sorted(open_shards):
        close(split)
    if not keys:
        raise ValueError(f"{storage.redact(url)}: no sample to write")
    write_index(
        url, {s: shards[s] for s in sorted(shards)}, (part for s in sorted(rows) for part in rows[s]),
        facts={"source": source, "licence": licence, "options": dict(options or {}), **vector_format.description},
        min_count=min_count, tokenizer=tokenizer,
    )  # fmt: skip


class _VectorFormatCheck:
    """Check that all samples of a set have sentence vectors of one format, or none has any."""

    def __init__(self, encoder: dict[str, Any]) -> None:
        self._encoder = encoder
        self._kinds: list[tuple[int, str] | None] = []

    def check(self, sample: SampleRecord) -> None:
        vectors = sample.vectors
        kind = None if vectors is None else (vectors.shape[1], vectors.dtype.name)
        if not self._kinds:
            self._kinds.append(kind)
        if kind != self._kinds[0]:
            own, others = (f"{f[0]} elements of {f[1]}" if f else "none" for f in (kind, self._kinds[0]))
            raise ValueError(f"sample {sample.key}: sentence vectors: {own}; samples before it have {others}")

    @property
    def description(self) -> dict[str, Any]:
        """Entries of dataset.json."""
        kind = self._kinds[0] if self._kinds else None
        return {} if kind is None else {"vectors": asdict(SentenceVectorInfo(*kind, self._encoder))}


def check_unfinished(url: str) -> None:
    """Raise ValueError if `url` holds a finished shard set."""
    if storage.exists(storage.join(url, DESCRIPTION)):
        raise ValueError(f"{storage.redact(url)}: holds a finished shard set already; remove it or use another folder")


def shard_name(split: str, index: int) -> str:
    return f"{split}-{index:05d}.tar"


def write_index(
    url: str,
    shards: Mapping[str, Sequence[Shard]],
    rows_of_shards: Iterable[Sequence[Row]],
    *,
    facts: Mapping[str, Any],
    min_count: int,
    tokenizer: str = ASCII,
) -> dict[str, Any]:
    """Write manifest.parquet and then dataset.json for shards that are stored already.

    Args:
        url: Folder of the set.
        shards: The shards of each split.
        rows_of_shards: The manifest rows of each shard, in the order of `shards`; one shard's are held at a time.
        facts: Further entries of dataset.json, such as source, licence and options.
        min_count, tokenizer: As for `write_shards`.

    Returns:
        The content of dataset.json.
    """
    statistics: dict[str, _CaptionStatistics] = {split: _CaptionStatistics(tokenizer) for split in shards}
    attributes: Counter[str] = Counter()
    images = ImageStatistics({split: sum(shard.samples for shard in of_split) for split, of_split in shards.items()})
    position = 0
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, COLUMNS, compression="zstd") as writer:
        for rows in rows_of_shards:
            columns = [{**row, "sha256": bytes.fromhex(row["sha256"])} for row in rows]
            writer.write_table(pa.Table.from_pylist(columns, schema=COLUMNS))
            for row in rows:
                attributes.update(row["attributes"])
                if "image" in row:  # records of an interrupted run of an older version lack it
                    images.add(position, row["image"])
                position += 1
                statistics[row["split"]].add(row["captions"])
    manifest = sink.getvalue()
    storage.write_bytes(storage.join(url, MANIFEST), manifest)
    counts: Counter[str] = Counter()
    for of_split in statistics.values():
        counts.update(of_split.counts)
    known = Vocabulary.from_counts(counts, min_count, tokenizer).words[1:]
    splits = {
        split: {"samples": sum(shard.samples for shard in of_split), "shards": [asdict(shard) for shard in of_split]}
        for split, of_split in shards.items()
    }
    description = {
        "schema": SCHEMA_VERSION,
        **facts,
        **recorded(tokenizer),
        **({"words": words_of(counts)} if tokenizer == UNICODE else {}),
        "manifest": {"bytes": len(manifest), "sha256": storage.sha256(manifest)},
        "splits": splits,
        "captions": {split: of_split.summary(set(known)) for split, of_split in statistics.items()},
        "attributes": sorted(attributes),
        "attribute_counts": {name: attributes[name] for name in sorted(attributes)},
        "vocabulary": {word: counts[word] for word in known},
        **({IMAGES_KEY: equal} if (equal := images.describe(lambda position: _key_at(manifest, position))) else {}),
    }
    storage.write_json(storage.join(url, DESCRIPTION), description)
    return description


def _key_at(manifest: bytes, position: int) -> str:
    """Return the key of the sample at a position, from the part of the manifest that holds it."""
    file = pq.ParquetFile(pa.BufferReader(manifest))
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if position < rows:
            return str(file.read_row_group(group, ["key"])["key"][position])
        position -= rows
    raise AssertionError("unreachable")


@dataclass
class _CaptionStatistics:
    """Caption counts of a split."""

    tokenizer: str
    captions: Counter[int] = field(default_factory=Counter)
    """Number of images by their number of captions."""
    words: Counter[int] = field(default_factory=Counter)
    """Number of captions by their number of words."""
    counts: Counter[str] = field(default_factory=Counter)
    """Occurrences of each word."""

    def add(self, captions: Sequence[str]) -> None:
        self.captions[len(captions)] += 1
        for caption in captions:
            words = tokenize(caption, self.tokenizer)
            self.words[len(words)] += 1
            self.counts.update(words)

    def summary(self, known: set[str]) -> dict[str, Any]:
        total = self.counts.total()
        unknown = sum(count for word, count in self.counts.items() if word not in known)
        return {
            "samples": self.captions.total(),
            "captions": self.words.total(),
            "captions_per_picture": summarize_histogram(self.captions),
            "words_per_caption": summarize_histogram(self.words),
            "unknown_word_share": round(unknown / total, 6) if total else 0.0,
        }


def summarize_histogram(histogram: Mapping[int, int]) -> dict[str, float]:
    """Return min, mean, median, p95 and max of values that occur `histogram[value]` times; empty if there are none."""
    total = sum(histogram.values())
    if not total:
        return {}

    def quantile(share: float) -> int:
        """Return the smallest value that at least `share` of all values do not exceed."""
        seen = 0
        for value in sorted(histogram):
            seen += histogram[value]
            if seen >= share * total:
                return value
        raise AssertionError("unreachable")

    mean = sum(value * count for value, count in histogram.items()) / total
    return {
        "min": min(histogram),
        "mean": round(mean, 3),
        "median": quantile(0.5),
        "p95": quantile(0.95),
        "max": max(histogram),
    }
