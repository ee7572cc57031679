"""Add sentence vectors to a shard set, shard by shard, so that an interrupted run can resume."""

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
from t2idist.data.reader import ShardReader
from t2idist.data.sample_format import SampleRecord, pack
from t2idist.data.samples import BadSample
from t2idist.data.shard_writer import Row, ShardBuilder, check_unfinished, write_index
from t2idist.data.shards import DESCRIPTION, Dataset, SentenceVectorInfo, Shard, Split, stored_bytes
from t2idist.ingest.files import PROGRESS
from t2idist.ingest.writer import ReportProgress

logger = logging.getLogger(__name__)

SAMPLES_AT_ONCE = 256

CaptionedSamples = Sequence[tuple[str, Sequence[str]]]
"""Key and captions of each sample."""

EncodeFn = Callable[[CaptionedSamples], Sequence[NDArray[np.float32]]]
"""Returns the vectors (captions, D) of each sample; a row of NaN for a caption without a vector."""


@dataclass(frozen=True)
class ExclusionCounts:
    """Counts of what is excluded from a shard."""

    samples: int
    """Unreadable samples, and samples none of whose captions has a vector."""
    captions: int
    """Captions without a vector."""


def embed_set(
    dataset: Dataset,
    out: str,
    encode: EncodeFn,
    info: SentenceVectorInfo,
    *,
    restart: bool = False,
    report: ReportProgress = lambda done, total, shards: None,
) -> dict[str, Any]:
    """Copy the set to `out` with vectors of its captions, or resume an interrupted copy.

    Shards keep their names and samples, so that a run reads both sets in the same order. Captions without a vector,
    samples without such captions, and unreadable samples are excluded and counted.

    Args:
        restart: ignore what an interrupted run has stored.
        report: called after each shard.

    Returns:
        The content of dataset.json.

    Raises:
        ValueError: the set is finished, was started with other data or another encoder, or no sample remains.
    """
    if storage.exists(storage.join(out, DESCRIPTION)):
        storage.remove(storage.join(out, PROGRESS))  # a run that was killed at the very end leaves it
    check_unfinished(out)
    if restart:
        storage.remove(storage.join(out, PROGRESS))
    source = storage.read_json(storage.join(dataset.url, DESCRIPTION), endpoint_url=dataset.endpoint_url)
    plan = {"data": source["manifest"]["sha256"], "vectors": asdict(info)}
    total = sum(len(split) for split in dataset.splits.values())
    shards: dict[str, list[Shard]] = {}
    excluded: list[ExclusionCounts] = []
    done = stored = 0
    for name, split in dataset.splits.items():
        reader = ShardReader(dataset, name)
        first = 0
        for number, shard in enumerate(split.shards):
            record = _read_record(out, shard.name, plan)
            if record is None:
                record = _write_shard(reader, split, number, first, out, encode, info, plan)
            first += shard.samples
            done += shard.samples
            excluded.append(ExclusionCounts(**record["left_out"]))
            if record["rows"]:
                shards.setdefault(name, []).append(Shard(**record["shard"]))
                stored += 1
            report(done, total, stored)
        reader.close()
    if not shards:
        raise ValueError(f"{storage.redact(dataset.url)}: no sample has a caption with a vector")
    description = _finish(dataset, out, source, shards, info, excluded)
    storage.remove(storage.join(out, PROGRESS))
    return description


def _read_record(out: str, name: str, plan: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the record of a shard; None if it was not stored, or if the record or the shard is damaged."""
    try:
        record: dict[str, Any] = storage.read_json(_record_url(out, name))
        previous, shard = record["plan"], record["shard"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    if previous != plan:
        raise ValueError(
            f"{storage.redact(out)}: was started with other data or another encoder ({previous['vectors']}); use the "
            "same ones, or --restart to start again"
        )
    if record["rows"] and stored_bytes(out, Shard(**shard)) != shard["bytes"]:
        return None
    return record


def _record_url(out: str, name: str) -> str:
    return storage.join(out, PROGRESS, f"{name}.json")


def _write_shard(
    reader: ShardReader, split: Split, number: int, first: int, out: str, encode: EncodeFn, info: SentenceVectorInfo,
    plan: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Store one shard with its vectors, then its record. Returns the record."""
    name, size = split.shards[number].name, split.shards[number].samples
    builder = ShardBuilder()
    samples = captions = 0
    for start in range(0, size, SAMPLES_AT_ONCE):
        samples_range = SampleRange(number, start, min(SAMPLES_AT_ONCE, size - start))
        for index, sample in _read_with_vectors(reader, split, samples_range, first + start, encode, info):
            captions += len(split.captions(index)) - (0 if sample is None else len(sample.captions))
            samples += sample is None
            if sample is not None:
                builder.add(pack(sample))
    shard = split.shards[number]
    if builder.rows:
        shard, data = builder.finish(name, compress=name.endswith(".gz"))
        storage.write_bytes(storage.join(out, name), data)
    left_out = {"samples": samples, "captions": captions}
    record = {"plan": plan, "shard": asdict(shard), "left_out": left_out, "rows": builder.rows}
    storage.write_bytes(_record_url(out, name), json.dumps(record).encode())
    return record


def _read_with_vectors(
    reader: ShardReader, split: Split, samples: SampleRange, first: int, encode: EncodeFn, info: SentenceVectorInfo
) -> Iterator[tuple[int, SampleRecord | None]]:
    """Yield the index in the split and the record of each sample; None for an excluded sample."""
    images = reader.read_encoded(samples)
    indices = range(first, first + samples.count)
    batch = encode([(split.keys[i], split.captions(i)) for i in indices])
    for i, image, vectors in zip(indices, images, batch, strict=True):
        has_vector: NDArray[np.bool_] = np.asarray(np.isfinite(vectors).all(axis=1))
        if isinstance(image, BadSample) or not has_vector.any():
            reason = image.reason if isinstance(image, BadSample) else "none of its captions has a vector"
            logger.warning("sample %s is excluded: %s", split.keys[i], reason)
            yield i, None
            continue
        width, height = split.image_size(i)
        yield (
            i,
            SampleRecord(
                split=split.name,
                key=split.keys[i],
                image=image.data,
                extension=image.extension,
                captions=tuple(c for c, keep in zip(split.captions(i), has_vector, strict=True) if keep),
                width=width,
                height=height,
                attributes=tuple(split.attributes(i)),
                class_id=int(split.class_ids[i]) if split.has_class(i) else None,
                vectors=vectors[has_vector].astype(info.dtype),
            ),
        )


def _finish(
    dataset: Dataset, out: str, source: Mapping[str, Any], shards: Mapping[str, Sequence[Shard]],
    info: SentenceVectorInfo, excluded: Sequence[ExclusionCounts],
) -> dict[str, Any]:  # fmt: skip
    def rows() -> Iterator[Sequence[Row]]:
        for split_shards in shards.values():
            for shard in split_shards:
                yield storage.read_json(_record_url(out, shard.name))["rows"]

    # "rejected" counts a list that is not copied
    facts = {key: value for key, value in source.items() if key != "rejected"}
    facts["vectors"] = asdict(info)
    samples, captions = sum(counts.samples for counts in excluded), sum(counts.captions for counts in excluded)
    if samples or captions:
        facts["without_vector"] = {"samples": samples, "captions": captions}
    # the count of the rarest known word keeps the vocabulary unchanged
    min_count = min(dataset.word_counts.values(), default=1)
    tokenizer = dataset.vocabulary.tokenizer
    return write_index(out, shards, rows(), facts=facts, min_count=min_count, tokenizer=tokenizer)
