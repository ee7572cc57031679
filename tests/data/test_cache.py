"""The shard cache: its limit, what it evicts, and crashed processes and failing disks."""

from __future__ import annotations

import logging
import os
import time
import uuid
from pathlib import Path

import pytest

from t2idist import storage
from t2idist.config import DataConfig
from t2idist.data import cache as caching
from t2idist.data.cache import ShardCache
from t2idist.data.loader import LoaderSpec, open_loader
from t2idist.data.order import SampleRange
from t2idist.data.reader import ShardReader
from t2idist.data.samples import BadSample, EncodedImage
from t2idist.data.shards import Dataset, Shard
from tests.helpers.shard_sets import make_sample, write_set


def write_remote_set(samples: int, first: int = 0) -> Dataset:
    """Write a new set to storage that counts as remote."""
    return write_set(f"memory://cache-{uuid.uuid4().hex}", [make_sample(first + n) for n in range(samples)])


def open_cache(dataset: Dataset, folder: Path, limit_bytes: int = 1 << 30) -> ShardCache:
    return ShardCache(folder, limit_bytes, dataset.url, train_shards(dataset))


def train_shards(dataset: Dataset) -> tuple[Shard, ...]:
    return dataset.split("train").shards


def cached_files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def read_all(dataset: Dataset, cache: ShardCache) -> list[bool]:
    """Return whether the cache has each shard, and check the bytes of those that it has."""
    cached = []
    for shard in train_shards(dataset):
        data = cache.read(shard, 100, shard.bytes - 7)
        assert data in (None, storage.read_bytes(f"{dataset.url}/{shard.name}", 100, shard.bytes - 7))
        cached.append(data is not None)
    return cached


def test_shards_are_cached_by_hash_and_read_without_the_store(tmp_path: Path) -> None:
    dataset = write_remote_set(40)
    assert read_all(dataset, open_cache(dataset, tmp_path)) == [True] * 3
    assert cached_files(tmp_path) == {shard.sha256 for shard in train_shards(dataset)}
    storage.remove(dataset.url)
    cache = open_cache(dataset, tmp_path)
    assert all(cache.read(shard, 0, 10) for shard in train_shards(dataset))


def test_limit_holds_and_own_shards_are_never_evicted(tmp_path: Path) -> None:
    dataset = write_remote_set(80)
    sizes = [shard.bytes for shard in train_shards(dataset)]
    cache = open_cache(dataset, tmp_path, limit_bytes=sum(sizes[:3]))
    assert read_all(dataset, cache) == [True, True, True, False, False]
    before = cached_files(tmp_path)
    for name in before:
        os.utime(tmp_path / name, (0, 0))  # idle for long, but of the set in use
    assert read_all(dataset, open_cache(dataset, tmp_path, sum(sizes[:3]))) == [True, True, True, False, False]
    assert cached_files(tmp_path) == before


def test_idle_shards_of_other_sets_are_evicted_the_oldest_first(tmp_path: Path) -> None:
    other, mine = write_remote_set(51), write_remote_set(17, first=100)
    old = [shard.sha256 for shard in train_shards(other)]
    size = train_shards(mine)[0].bytes
    limit = sum(shard.bytes for shard in train_shards(other)) + size // 2
    assert all(read_all(other, open_cache(other, tmp_path)))
    assert read_all(mine, open_cache(mine, tmp_path, limit)) == [False], "the other set is in use"
    now = time.time()
    for name, age in zip(old, (2, 9, 5), strict=True):
        os.utime(tmp_path / name, (now, now - age * caching.IDLE_SECONDS))
    assert read_all(mine, open_cache(mine, tmp_path, limit)) == [True]
    assert cached_files(tmp_path) == {old[0], old[2], train_shards(mine)[0].sha256}


def test_partial_files_of_a_crash_are_neither_used_nor_kept(tmp_path: Path) -> None:
    dataset = write_remote_set(34)
    first, second = train_shards(dataset)
    (tmp_path / f"{first.sha256}.part").write_bytes(bytes(first.bytes))
    (tmp_path / f"{'0' * 64}.part").write_bytes(bytes(1 << 20))
    (tmp_path / second.sha256).write_bytes(bytes(second.bytes - 1))
    assert read_all(dataset, open_cache(dataset, tmp_path, limit_bytes=first.bytes + second.bytes)) == [True, True]
    assert cached_files(tmp_path) == {first.sha256, second.sha256}


def test_corrupt_copy_is_deleted_and_read_from_the_store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = write_remote_set(17)
    (shard,) = train_shards(dataset)
    cache = open_cache(dataset, tmp_path)
    assert read_all(dataset, cache) == [True]
    corrupt = bytearray((tmp_path / shard.sha256).read_bytes())
    corrupt[len(corrupt) // 2] ^= 1
    (tmp_path / shard.sha256).write_bytes(corrupt)
    with caplog.at_level(logging.WARNING):
        read = ShardReader(dataset, "train", cache).read_encoded(SampleRange(0, 0, 17))
    assert all(isinstance(sample, EncodedImage) for sample in read)
    assert "wrong bytes of 1 samples" in caplog.text
    assert cached_files(tmp_path) == set()
    assert read_all(dataset, cache) == [True]


def test_corrupt_stored_shard_is_not_cached_and_its_samples_are_bad(tmp_path: Path) -> None:
    dataset = write_remote_set(17)
    (shard,) = train_shards(dataset)
    url = f"{dataset.url}/{shard.name}"
    data = bytearray(storage.read_bytes(url))
    data[int(dataset.split("train").offsets[5]) + 700] ^= 1
    storage.write_bytes(url, bytes(data))
    read = ShardReader(dataset, "train", open_cache(dataset, tmp_path)).read_encoded(SampleRange(0, 0, 17))
    assert [i for i, sample in enumerate(read) if isinstance(sample, BadSample)] == [5]
    assert cached_files(tmp_path) == set()


def test_full_disk_is_reported_once_and_the_loader_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = os.open("/dev/full", os.O_RDWR)
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: os.write(full, data))
    dataset = write_remote_set(60)
    config = DataConfig(max_words=5, cache=str(tmp_path), cache_gib=1.0)
    loader = open_loader(dataset, LoaderSpec(config, sizes=(8,), groups=[0], total_groups=1, group_size=6), seed=0)
    with caplog.at_level(logging.WARNING), loader:
        ids = [key for _ in range(10) for key in next(loader).ids]
    os.close(full)
    assert sorted(ids) == dataset.split("train").keys
    assert sum("is disabled" in message for message in caplog.messages) == 1
    assert "No space left" in caplog.text
    assert cached_files(tmp_path / "shards") == set()


def test_shards_of_local_sets_are_not_cached(tmp_path: Path) -> None:
    dataset = write_set(tmp_path / "set", [make_sample(n) for n in range(20)])
    config = DataConfig(max_words=5, cache=str(tmp_path / "cache"), cache_gib=1.0)
    loader = open_loader(dataset, LoaderSpec(config, sizes=(8,), groups=[0], total_groups=1, group_size=6), seed=0)
    with loader:
        next(loader)
    assert not (tmp_path / "cache" / "shards").exists()
