"""A shard set again, with sentence vectors: shard by shard, so that what was cut off goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2idist import storage
from t2idist.data.order import SampleRange
from t2idist.data.reader import Bad, ShardReader
from t2idist.data.sample_format import SampleRecord, pack
from t2idist.data.shard_writer import Row, ShardPacker, refuse_finished, write_index
from t2idist.data.shards import DESCRIPTION, Dataset, Shard, Split, VectorFacts, stored_bytes
from t2idist.ingest.writer import PROGRESS, Progress

logger = logging.getLogger(__name__)

SAMPLES_AT_ONCE = 256

Sentences = Sequence[tuple[str, Sequence[str]]]
"""Samples, each by its key and its captions."""

VectorsOf = Callable[[Sentences], Sequence[NDArray[np.float32]]]
"""Gives each sample's vectors (captions, D); a row of NaN for a caption that has none."""


@dataclass(frozen=True)
class LeftOut:
    """Of one shard or of a set: samples that could not be used, captions without a vector."""

    samples: int
    captions: int


def embed_set(
    dataset: Dataset,
    out: str,
    vectors_of: VectorsOf,
    facts: VectorFacts,
    *,
    restart: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Write the set again at `out` with vectors of its captions, or go on with it; gives its dataset.json.

    Shards keep their names and samples, so that a run reads both sets in the same order. A caption that has no vector
    is left out, and a sample that has none then or that cannot be read; they are counted. restart: forget what a run
    that was cut off has stored. report: is called as samples are done. Raises ValueError for a finished set, for one
    that was begun with another source or encoder, and where nothing is left.
    """
    if storage.exists(storage.join(out, DESCRIPTION)):
        storage.remove(storage.join(out, PROGRESS))  # left where the last run was killed at its very end
    refuse_finished(out)
    if restart:
        storage.remove(storage.join(out, PROGRESS))
    source = storage.read_json(storage.join(dataset.url, DESCRIPTION), endpoint_url=dataset.endpoint_url)
    plan = {"data": source["manifest"]["sha256"], "vectors": asdict(facts)}
    total = sum(len(split) for split in dataset.splits.values())
    shards: dict[str, list[Shard]] = {}
    left_out: list[LeftOut] = []
    done = stored = 0
    for name, split in dataset.splits.items():
        reader = ShardReader(dataset, name)
        first = 0
        for number, shard in enumerate(split.shards):
            record = _record(out, shard.name, plan)
            if record is None:
                record = _write(reader, split, number, first, out, vectors_of, facts, plan)
            first += shard.samples
            done += shard.samples
            left_out.append(LeftOut(**record["left_out"]))
            if record["rows"]:
                shards.setdefault(name, []).append(Shard(**record["shard"]))
                stored += 1
            report(Progress(done, total, stored))
        reader.close()
    if not shards:
        raise ValueError(f"{storage.redact(dataset.url)}: no sample of it has a caption with a vector")
    description = _finish(dataset, out, source, shards, facts, left_out)
    storage.remove(storage.join(out, PROGRESS))
    return description


def _record(out: str, name: str, plan: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an earlier run noted of a shard that it stored; None where it did not, or where either is damaged."""
    try:
        record: dict[str, Any] = storage.read_json(_record_url(out, name))
        before, shard = record["plan"], record["shard"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    if before != plan:
        raise ValueError(
            f"{storage.redact(out)}: was begun with other data or another encoder ({before['vectors']}); give the same "
            "again, or --restart to begin anew"
        )
    if record["rows"] and stored_bytes(out, Shard(**shard)) != shard["bytes"]:
        return None
    return record


def _record_url(out: str, name: str) -> str:
    return storage.join(out, PROGRESS, f"{name}.json")


def _write(
    reader: ShardReader, split: Split, number: int, first: int, out: str, vectors_of: VectorsOf, facts: VectorFacts,
    plan: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Store one shard with its vectors, then its record, which it gives."""
    name, size = split.shards[number].name, split.shards[number].samples
    packer = ShardPacker()
    samples = captions = 0
    for start in range(0, size, SAMPLES_AT_ONCE):
        run = SampleRange(number, start, min(SAMPLES_AT_ONCE, size - start))
        for index, sample in _with_vectors(reader, split, run, first + start, vectors_of, facts):
            captions += len(split.captions(index)) - (0 if sample is None else len(sample.captions))
            samples += sample is None
            if sample is not None:
                packer.add(pack(sample))
    shard = split.shards[number]
    if packer.rows:
        shard, data = packer.finish(name, compress=name.endswith(".gz"))
        storage.write_bytes(storage.join(out, name), data)
    left_out = {"samples": samples, "captions": captions}
    record = {"plan": plan, "shard": asdict(shard), "left_out": left_out, "rows": packer.rows}
    storage.write_bytes(_record_url(out, name), json.dumps(record).encode())
    return record


def _with_vectors(
    reader: ShardReader, split: Split, run: SampleRange, first: int, vectors_of: VectorsOf, facts: VectorFacts
) -> Iterator[tuple[int, SampleRecord | None]]:
    """The run's samples by index in the split; None for one that is left out."""
    read = reader.read(run)
    indices = range(first, first + run.count)
    found = vectors_of([(split.keys[i], split.captions(i)) for i in indices])
    for i, encoded, vectors in zip(indices, read, found, strict=True):
        spoken: NDArray[np.bool_] = np.asarray(np.isfinite(vectors).all(axis=1))
        if isinstance(encoded, Bad) or not spoken.any():
            reason = encoded.reason if isinstance(encoded, Bad) else "none of its captions has a vector"
            logger.warning("sample %s is left out: %s", split.keys[i], reason)
            yield i, None
            continue
        width, height = split.picture_size(i)
        yield (
            i,
            SampleRecord(
                split=split.name,
                key=split.keys[i],
                image=encoded.data,
                extension=encoded.extension,
                captions=tuple(c for c, kept in zip(split.captions(i), spoken, strict=True) if kept),
                width=width,
                height=height,
                attributes=tuple(split.attributes(i)),
                class_id=int(split.class_ids[i]) if split.has_class(i) else None,
                vectors=vectors[spoken].astype(facts.dtype),
            ),
        )


def _finish(
    dataset: Dataset, out: str, source: Mapping[str, Any], shards: Mapping[str, Sequence[Shard]], facts: VectorFacts,
    left_out: Sequence[LeftOut],
) -> dict[str, Any]:  # fmt: skip
    def rows() -> Iterator[Sequence[Row]]:
        for of_split in shards.values():
            for shard in of_split:
                yield storage.read_json(_record_url(out, shard.name))["rows"]

    kept = {key: value for key, value in source.items() if key != "rejected"}  # counts of a list that is not copied
    kept["vectors"] = asdict(facts)
    samples, captions = sum(part.samples for part in left_out), sum(part.captions for part in left_out)
    if samples or captions:
        kept["without_vector"] = {"samples": samples, "captions": captions}
    # every word that occurs as often as the rarest known one is known: the set keeps its vocabulary
    min_count = min(dataset.word_counts.values(), default=1)
    return write_index(out, shards, rows(), facts=kept, min_count=min_count)
