"""The cache of shards: its limit, who makes room for whom, and what a crash or a bad disk leaves."""

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
from t2idist.data.loader import open_loader
from t2idist.data.order import SampleRange
from t2idist.data.reader import Bad, Encoded, ShardReader
from t2idist.data.shards import Dataset, Shard
from tests.data.test_loader import sample, write


def remote(samples: int, first: int = 0) -> Dataset:
    """A set of its own on what counts as remote."""
    return write(f"memory://cache-{uuid.uuid4().hex}", [sample(first + n) for n in range(samples)])


def cache_of(dataset: Dataset, folder: Path, limit_bytes: int = 1 << 30) -> ShardCache:
    return ShardCache(folder, limit_bytes, dataset.url, shards_of(dataset))


def shards_of(dataset: Dataset) -> tuple[Shard, ...]:
    return dataset.split("train").shards


def kept(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def read_all(dataset: Dataset, cache: ShardCache) -> list[bool]:
    """Whether the cache had each shard; what it has must be right."""
    found = []
    for shard in shards_of(dataset):
        data = cache.read(shard, 100, shard.bytes - 7)
        assert data in (None, storage.read_bytes(f"{dataset.url}/{shard.name}", 100, shard.bytes - 7))
        found.append(data is not None)
    return found


def test_shards_are_kept_by_their_hash_and_then_read_without_the_store(tmp_path: Path) -> None:
    dataset = remote(40)
    assert read_all(dataset, cache_of(dataset, tmp_path)) == [True] * 3
    assert kept(tmp_path) == {shard.sha256 for shard in shards_of(dataset)}
    storage.remove(dataset.url)
    cache = cache_of(dataset, tmp_path)
    assert all(cache.read(shard, 0, 10) for shard in shards_of(dataset))


def test_the_limit_holds_and_own_shards_never_push_each_other_out(tmp_path: Path) -> None:
    dataset = remote(80)
    sizes = [shard.bytes for shard in shards_of(dataset)]
    cache = cache_of(dataset, tmp_path, limit_bytes=sum(sizes[:3]))
    assert read_all(dataset, cache) == [True, True, True, False, False]
    before = kept(tmp_path)
    for name in before:
        os.utime(tmp_path / name, (0, 0))  # idle for ever, and yet one's own
    assert read_all(dataset, cache_of(dataset, tmp_path, sum(sizes[:3]))) == [True, True, True, False, False]
    assert kept(tmp_path) == before


def test_only_idle_shards_of_other_sets_make_room_the_oldest_first(tmp_path: Path) -> None:
    other, mine = remote(51), remote(17, first=100)
    old = [shard.sha256 for shard in shards_of(other)]
    size = shards_of(mine)[0].bytes
    limit = sum(shard.bytes for shard in shards_of(other)) + size // 2
    assert all(read_all(other, cache_of(other, tmp_path)))
    assert read_all(mine, cache_of(mine, tmp_path, limit)) == [False], "the other set is in use"
    now = time.time()
    for name, age in zip(old, (2, 9, 5), strict=True):
        os.utime(tmp_path / name, (now, now - age * caching.IDLE_SECONDS))
    assert read_all(mine, cache_of(mine, tmp_path, limit)) == [True]
    assert kept(tmp_path) == {old[0], old[2], shards_of(mine)[0].sha256}


def test_half_files_of_a_crash_are_neither_trusted_nor_kept(tmp_path: Path) -> None:
    dataset = remote(34)
    first, second = shards_of(dataset)
    (tmp_path / f"{first.sha256}.part").write_bytes(bytes(first.bytes))
    (tmp_path / f"{'0' * 64}.part").write_bytes(bytes(1 << 20))
    (tmp_path / second.sha256).write_bytes(bytes(second.bytes - 1))
    assert read_all(dataset, cache_of(dataset, tmp_path, limit_bytes=first.bytes + second.bytes)) == [True, True]
    assert kept(tmp_path) == {first.sha256, second.sha256}


def test_a_rotten_copy_is_dropped_and_its_bytes_come_from_the_store(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = remote(17)
    (shard,) = shards_of(dataset)
    cache = cache_of(dataset, tmp_path)
    assert read_all(dataset, cache) == [True]
    rotten = bytearray((tmp_path / shard.sha256).read_bytes())
    rotten[len(rotten) // 2] ^= 1
    (tmp_path / shard.sha256).write_bytes(rotten)
    with caplog.at_level(logging.WARNING):
        read = ShardReader(dataset, "train", cache).read(SampleRange(0, 0, 17))
    assert all(isinstance(found, Encoded) for found in read)
    assert "wrong bytes of 1 samples" in caplog.text
    assert kept(tmp_path) == set()
    assert read_all(dataset, cache) == [True]


def test_a_shard_that_is_wrong_in_the_store_is_not_kept_and_its_samples_are_named(tmp_path: Path) -> None:
    dataset = remote(17)
    (shard,) = shards_of(dataset)
    url = f"{dataset.url}/{shard.name}"
    data = bytearray(storage.read_bytes(url))
    data[int(dataset.split("train").offsets[5]) + 700] ^= 1
    storage.write_bytes(url, bytes(data))
    read = ShardReader(dataset, "train", cache_of(dataset, tmp_path)).read(SampleRange(0, 0, 17))
    assert [i for i, found in enumerate(read) if isinstance(found, Bad)] == [5]
    assert kept(tmp_path) == set()


def test_a_full_disk_is_told_once_and_the_loader_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = os.open("/dev/full", os.O_RDWR)
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: os.write(full, data))
    dataset = remote(60)
    config = DataConfig(max_words=5, cache=str(tmp_path), cache_gib=1.0)
    stream = open_loader(
        dataset, "train", config=config, groups=[0], total_groups=1, group_size=6, sizes=(8,), seed=0, step0=0
    )
    with caplog.at_level(logging.WARNING), stream:
        ids = [key for _ in range(10) for key in next(stream).ids]
    os.close(full)
    assert sorted(ids) == dataset.split("train").keys
    assert sum("is not used any more" in message for message in caplog.messages) == 1
    assert "No space left" in caplog.text
    assert kept(tmp_path / "shards") == set()


def test_local_sets_are_not_copied(tmp_path: Path) -> None:
    dataset = write(tmp_path / "set", [sample(n) for n in range(20)])
    config = DataConfig(max_words=5, cache=str(tmp_path / "cache"), cache_gib=1.0)
    stream = open_loader(
        dataset, "train", config=config, groups=[0], total_groups=1, group_size=6, sizes=(8,), seed=0, step0=0
    )
    with stream:
        next(stream)
    assert not (tmp_path / "cache").exists()
