"""Entry point of the processes in the test of the shared shard cache; imports little, so that it starts fast."""

from __future__ import annotations

from pathlib import Path

from t2idist import storage
from t2idist.data.cache import ShardCache
from t2idist.data.shards import Dataset


def fetch_all(url: str, folder: str, endpoint_url: str) -> None:
    """Read every shard of the split train through a cache in `folder`, and check the hashes."""
    dataset = Dataset.open(url, check_sizes=False, endpoint_url=endpoint_url)
    shards = dataset.split("train").shards
    cache = ShardCache(Path(folder), 1 << 30, url, shards, endpoint_url=endpoint_url)
    for shard in shards:
        data = cache.read(shard, 0, shard.bytes)
        assert data is not None and storage.sha256(data) == shard.sha256
