"""Writing shard sets: shards from samples, then manifest.parquet, then dataset.json, which says that it is finished."""

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
from t2idist.data.shards import COLUMNS, DESCRIPTION, MANIFEST, SCHEMA_VERSION, Shard, VectorFacts
from t2idist.data.tokenizer import Vocabulary, tokenise

_TAR_END = bytes(2 * tarfile.BLOCKSIZE)
Row = dict[str, Any]


class ShardPacker:
    """Collects one shard's samples; the same samples give the same bytes."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.tar_bytes = 0
        self._parts: list[bytes] = []

    def add(self, packed: PackedSample) -> None:
        self.rows.append({**packed.row, "offset": self.tar_bytes})
        self._parts.append(packed.tar)
        self.tar_bytes += len(packed.tar)

    def finish(self, name: str, compress: bool = False) -> tuple[Shard, bytes]:
        """The shard's description and its bytes; fills in the rows' shard."""
        tar = b"".join([*self._parts, _TAR_END])
        self._parts.clear()
        data = gzip.compress(tar, compresslevel=9, mtime=0) if compress else tar
        for row in self.rows:
            row["shard"] = name
        return Shard(name, len(self.rows), len(data), storage.sha256(data), len(tar)), data


def cores() -> int:
    """Those that this process may use: as many processes make samples where no number is given."""
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
) -> None:
    """Write a shard set of samples that are made already; the same samples in the same order give the same bytes.

    samples: of all splits, mixed as they come; each split keeps its order. A shard ends at `shard_samples` samples or
    `shard_bytes` bytes. compress: gzip the shards (for small sets that ship; a reader then takes whole shards).
    min_count: words that are rarer are left out of the vocabulary, which is made of the captions of all splits.
    encoder: what made the samples' sentence vectors, which all or none have. Raises ValueError for a key that comes
    twice, for vectors of another kind than those before, and when there is no sample.
    """
    refuse_finished(url)
    open_shards: dict[str, ShardPacker] = {}
    shards: dict[str, list[Shard]] = {}
    rows: dict[str, list[list[Row]]] = {}
    keys: set[str] = set()
    vectors = _VectorsOfAll(dict(encoder or {}))

    def close(split: str) -> None:
        packer = open_shards.pop(split)
        name = f"{shard_name(split, len(shards[split]))}{'.gz' if compress else ''}"
        shard, data = packer.finish(name, compress)
        storage.write_bytes(storage.join(url, name), data)
        shards[split].append(shard)
        rows[split].append(packer.rows)

    for sample in samples:
        if sample.key in keys:
            raise ValueError(f"sample key {sample.key!r} comes twice; each sample needs a key of its own")
        keys.add(sample.key)
        vectors.add(sample)
        shards.setdefault(sample.split, [])
        rows.setdefault(sample.split, [])
        packer = open_shards.setdefault(sample.split, ShardPacker())
        packer.add(pack(sample))
        if len(packer.rows) >= shard_samples or packer.tar_bytes >= shard_bytes:
            close(sample.split)
    for split in sorted(open_shards):
        close(split)
    if not keys:
        raise ValueError(f"{storage.redact(url)}: no sample to write")
    write_index(
        url, {s: shards[s] for s in sorted(shards)}, (part for s in sorted(rows) for part in rows[s]),
        facts={"source": source, "licence": licence, "options": dict(options or {}), **vectors.facts},
        min_count=min_count,
    )  # fmt: skip


class _VectorsOfAll:
    """Holds that all samples of a set have sentence vectors of one kind, or none has any."""

    def __init__(self, encoder: dict[str, Any]) -> None:
        self._encoder = encoder
        self._kinds: list[tuple[int, str] | None] = []

    def add(self, sample: SampleRecord) -> None:
        kind = None if sample.vectors is None else (sample.vectors.shape[1], sample.vectors.dtype.name)
        if not self._kinds:
            self._kinds.append(kind)
        if kind != self._kinds[0]:
            ours, others = (f"{k[0]} numbers of {k[1]}" if k else "none" for k in (kind, self._kinds[0]))
            raise ValueError(f"sample {sample.key}: sentence vectors: {ours}; samples before it have {others}")

    @property
    def facts(self) -> dict[str, Any]:
        """As dataset.json has them."""
        kind = self._kinds[0] if self._kinds else None
        return {} if kind is None else {"vectors": asdict(VectorFacts(*kind, self._encoder))}


def refuse_finished(url: str) -> None:
    """Raises ValueError where a finished shard set is already."""
    if storage.exists(storage.join(url, DESCRIPTION)):
        raise ValueError(f"{storage.redact(url)}: holds a finished shard set already; remove it or give another folder")


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.tar"


def write_index(
    url: str,
    shards: Mapping[str, Sequence[Shard]],
    rows_of_shards: Iterable[Sequence[Row]],
    *,
    facts: Mapping[str, Any],
    min_count: int,
) -> dict[str, Any]:
    """Write manifest.parquet and then dataset.json for shards that are stored already; gives the latter.

    rows_of_shards: rows of one shard after the other, in the order of `shards`; one is held at a time. facts: source,
    licence and options, and what else dataset.json shall say.
    """
    text: dict[str, _Text] = {split: _Text() for split in shards}
    attributes: Counter[str] = Counter()
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, COLUMNS, compression="zstd") as writer:
        for rows in rows_of_shards:
            columns = [{**row, "sha256": bytes.fromhex(row["sha256"])} for row in rows]
            writer.write_table(pa.Table.from_pylist(columns, schema=COLUMNS))
            for row in rows:
                attributes.update(row["attributes"])
                text[row["split"]].add(row["captions"])
    manifest = sink.getvalue()
    storage.write_bytes(storage.join(url, MANIFEST), manifest)
    counts: Counter[str] = Counter()
    for of_split in text.values():
        counts.update(of_split.counts)
    known = Vocabulary.from_counts(counts, min_count).words[1:]
    splits = {
        split: {"samples": sum(shard.samples for shard in of_split), "shards": [asdict(shard) for shard in of_split]}
        for split, of_split in shards.items()
    }
    description = {
        "schema": SCHEMA_VERSION,
        **facts,
        "manifest": {"bytes": len(manifest), "sha256": storage.sha256(manifest)},
        "splits": splits,
        "captions": {split: of_split.summary(set(known)) for split, of_split in text.items()},
        "attributes": sorted(attributes),
        "attribute_counts": {name: attributes[name] for name in sorted(attributes)},
        "vocabulary": {word: counts[word] for word in known},
    }
    storage.write_json(storage.join(url, DESCRIPTION), description)
    return description


@dataclass
class _Text:
    """A split's captions, counted: how many a picture has, how many words each has, and which."""

    captions: Counter[int] = field(default_factory=Counter)
    words: Counter[int] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, captions: Sequence[str]) -> None:
        self.captions[len(captions)] += 1
        for caption in captions:
            words = tokenise(caption)
            self.words[len(words)] += 1
            self.counts.update(words)

    def summary(self, known: set[str]) -> dict[str, Any]:
        spoken = self.counts.total()
        unknown = sum(count for word, count in self.counts.items() if word not in known)
        return {
            "samples": self.captions.total(),
            "captions": self.words.total(),
            "captions_per_picture": spread(self.captions),
            "words_per_caption": spread(self.words),
            "unknown_word_share": round(unknown / spoken, 6) if spoken else 0.0,
        }


def spread(histogram: Mapping[int, int]) -> dict[str, float]:
    """min, mean, median, p95 and max of values that come `histogram[value]` times; empty for no value."""
    total = sum(histogram.values())
    if not total:
        return {}

    def quantile(share: float) -> int:
        """The smallest value that at least `share` of all values do not surpass."""
        seen = 0
        for value in sorted(histogram):
            seen += histogram[value]
            if seen >= share * total:
                return value
        raise AssertionError("unreachable")

    mean = sum(value * times for value, times in histogram.items()) / total
    return {
        "min": min(histogram),
        "mean": round(mean, 3),
        "median": quantile(0.5),
        "p95": quantile(0.95),
        "max": max(histogram),
    }
