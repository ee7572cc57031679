"""Shard sets of millions of samples without images, for what depends on their number alone."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from t2idist.data.shards import COLUMNS, DESCRIPTION, MANIFEST, Shard


def write_made_up_set(folder: Path, samples: int) -> None:
    """Write the manifest and dataset.json of a set of one caption per image, and shards of the right size."""
    rng = np.random.default_rng(0)
    words = [f"word{n}" for n in range(5000)]
    texts = [[" ".join(words[i] for i in row)] for row in rng.integers(0, len(words), (1 << 16, 9))]
    captions, shard_samples = pa.array(texts, pa.list_(pa.string())), 1024
    folder.mkdir()
    shards = []
    with pq.ParquetWriter(folder / MANIFEST, COLUMNS, compression="zstd") as writer:
        for first in range(0, samples, 1 << 16):
            count = min(1 << 16, samples - first)
            lengths = rng.integers(20, 80, count) * 512
            offsets = np.cumsum(lengths) - lengths
            names = [f"train-{(first + start) // shard_samples:05d}.tar" for start in range(0, count, shard_samples)]
            for start, name in zip(range(0, count, shard_samples), names, strict=True):
                part = slice(start, start + shard_samples)
                offsets[part] -= offsets[start]
                size = int(lengths[part].sum()) + 1024
                with open(folder / name, "wb") as file:
                    file.truncate(size)
                shards.append(asdict(Shard(name, len(lengths[part]), size, "0" * 64, size)))
            columns = [
                pa.array(["train"] * count),
                pa.array(names).take(pa.array(np.arange(count) // shard_samples)),
                pa.array([f"{number:09d}" for number in range(first, first + count)]),
                *(pa.array(values) for values in (offsets, lengths)),
                pa.Array.from_buffers(pa.binary(32), count, [None, pa.py_buffer(rng.bytes(32 * count))]),
                captions.slice(0, count),
                pa.array([[]] * count, pa.list_(pa.string())),
                pa.nulls(count, pa.int64()),
                *(pa.array(np.full(count, 304, np.int32)) for _ in range(2)),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=COLUMNS), row_group_size=shard_samples)
    data = (folder / MANIFEST).read_bytes()
    facts = {"schema": 2, "source": "bench", "licence": "none", "options": {}, "attributes": []}
    facts |= {"splits": {"train": {"samples": samples, "shards": shards}}, "vocabulary": dict.fromkeys(words, 1)}
    facts |= {"manifest": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    (folder / DESCRIPTION).write_text(json.dumps(facts))
