"""Shard sets and files with sentence vectors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
import torch

from t2idist import storage
from t2idist.data.sample_format import SampleRecord
from t2idist.data.shards import Dataset
from t2idist.ingest.check import check_shard, expected_sample
from tests.helpers.shard_sets import WORDS, make_sample

DIM = 7
CPU = torch.device("cpu")


def vector(key: str, caption: int, dim: int = DIM) -> np.ndarray:
    return np.random.default_rng([int(key[1:]), caption]).normal(size=dim).astype(np.float32)


def vectors(key: str, captions: int, dim: int = DIM) -> np.ndarray:
    return np.stack([vector(key, number, dim) for number in range(captions)])


def make_vector_sample(number: int, split: str = "train", captions: int = 5, dtype: str = "float32") -> SampleRecord:
    """Return a sample whose captions are distinct words, so that a token identifies the caption."""
    sample = make_sample(number, split)
    words = tuple(WORDS[(number + i) % len(WORDS)] for i in range(captions))
    return replace(sample, captions=words, vectors=vectors(sample.key, captions).astype(dtype))


def find_problems(dataset: Dataset) -> list[str]:
    """Check all shards in this process."""
    problems = []
    for split in dataset.splits.values():
        rows = [expected_sample(split, i, frozenset()) for i in range(len(split))]
        for shard in split.shards:
            expected, rows = rows[: shard.samples], rows[shard.samples :]
            report = check_shard(storage.join(dataset.url, shard.name), shard, expected, False, dataset.vector_info)
            problems += report.problems.sentences
    return problems


def write_vectors_file(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **arrays)  # type: ignore[arg-type]
    elif path.suffix == ".safetensors":
        safetensors.numpy.save_file(arrays, path)
    else:
        rows = [(key, i, row.tolist()) for key, array in arrays.items() for i, row in reversed(list(enumerate(array)))]
        columns = {name: [row[i] for row in rows] for i, name in enumerate(("key", "caption", "vector"))}
        pq.write_table(pa.table(columns), path)
    return path


def emoji() -> str:
    """Return the URL of the embedded emoji set."""
    return str(Path(__file__).parents[2] / "t2idist" / "data" / "embedded" / "emoji")
