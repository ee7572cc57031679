"""A loader against a real object store with injected faults: the batches stay the same, and nothing hangs."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from t2idist import storage
from t2idist.config import DataConfig
from t2idist.data.loader import Loader, LoaderSpec, open_loader
from t2idist.data.shards import Dataset
from t2idist.storage import objects, retry
from tests.helpers import fault_proxy as faults
from tests.helpers.fault_proxy import FAULTS, FaultProxy, random_faults
from tests.helpers.fetch_shards import fetch_all
from tests.helpers.object_store import KEY, SECRET, seaweedfs
from tests.helpers.shard_sets import assert_batches_equal, make_sample, png_image, take_batches, write_set

pytestmark = pytest.mark.whole

URL = "s3://bucket/set"


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    """Start a store with a shard set at URL; yields its address."""
    with seaweedfs() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            if name.startswith("AWS"):
                patch.setenv(name, value)
        write_set(URL, [make_sample(n, image=png_image(n, (50, 60))) for n in range(100)])
        yield environment["AWS_ENDPOINT_URL"]


@pytest.fixture
def proxy(store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    for module in (storage, objects):
        monkeypatch.setattr(module, "BLOCK_BYTES", 32 << 10)  # several blocks per read, as with real images
    monkeypatch.setattr(retry, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(faults, "STALL_SECONDS", 0.2)
    with faults.fault_proxy(store, lambda number, method, target: None) as proxy:
        yield proxy


def loader(address: str | None, **changed: object) -> Loader:
    settings: dict = {"total_groups": 2, "group_size": 6, "sizes": (8, 16), **changed}
    config = settings.pop("config", DataConfig(max_words=5, threads=2))
    dataset = Dataset.open(URL, endpoint_url=address)
    return open_loader(dataset, LoaderSpec(config=config, groups=[0, 1], **settings), seed=3)


@pytest.mark.whole
@pytest.mark.parametrize("kinds", [*([kind] for kind in FAULTS), list(FAULTS)], ids=lambda kinds: "+".join(kinds))
def test_batches_are_the_same_under_network_faults(proxy: FaultProxy, kinds: list[str]) -> None:
    expected = take_batches(loader(None), 17)  # two epochs
    proxy.plan = random_faults(len(kinds), 0.3, tuple(kinds))
    with loader(proxy.address) as stream:
        for batch in expected:
            assert_batches_equal(next(stream), batch)
        assert (stream.samples_read, stream.bad_reads, stream.quarantine) == (17 * 12, 0, {})
    assert all(proxy.done[kind] > 0 for kind in kinds), proxy.done


def test_stalled_connections_time_out(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, store: str) -> None:
    monkeypatch.setattr(objects, "READ_SECONDS", 0.3)
    monkeypatch.setattr(faults, "STALL_SECONDS", 30.0)
    expected = take_batches(loader(None), 4)
    proxy.plan = lambda number, method, target: "stall" if number % 5 == 3 and method == "GET" else None
    began = time.monotonic()
    for one, other in zip(expected, take_batches(loader(proxy.address), 4), strict=True):
        assert_batches_equal(one, other)
    assert proxy.done["stall"] > 0
    assert time.monotonic() - began < 15


def test_expired_keys_raise_an_error_without_secrets(proxy: FaultProxy) -> None:
    stream = loader(proxy.address, config=DataConfig(max_words=5, threads=2, prefetch_mib=1))
    next(stream)
    proxy.plan = lambda number, method, target: "refuse"
    with stream, pytest.raises(PermissionError) as caught:
        take_batches(stream, 200)
    message = str(caught.value)
    assert "s3://bucket/set/train-0" in message and "ExpiredToken" in message
    assert all(word in message for word in ("keys", "expired", "clock", "policy", "endpoint"))
    assert KEY not in message and SECRET not in message and caught.value.__cause__ is None


def test_wrong_keys_are_not_retried(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    began = time.monotonic()
    for request in (storage.read_bytes, storage.exists, storage.size, storage.list_dir):
        with pytest.raises(PermissionError, match=r"s3://bucket/set/dataset.json: the store refuses access .*the keys"):
            request(f"{URL}/dataset.json")
    assert time.monotonic() - began < 5


def test_requests_are_retried_until_the_store_responds(proxy: FaultProxy) -> None:
    proxy.plan = lambda number, method, target: "busy" if proxy.done["busy"] < 3 else None
    assert storage.exists(f"{URL}/dataset.json", endpoint_url=proxy.address)
    assert proxy.done["busy"] == 3
    for request, url in (
        (storage.size, f"{URL}/dataset.json"),
        (storage.list_dir, URL),
        (storage.read_json, f"{URL}/dataset.json"),
    ):
        proxy.plan = _first_only("busy", proxy)
        assert request(url, endpoint_url=proxy.address)
    assert proxy.done["busy"] == 6


def _first_only(kind: str, proxy: FaultProxy) -> faults.FaultPlan:
    first = proxy.requests
    return lambda number, method, target: kind if number == first else None


def test_an_unavailable_store_raises_after_the_time_limit(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = loader(proxy.address, config=DataConfig(max_words=5, threads=2, prefetch_mib=1))
    next(stream)
    monkeypatch.setattr(retry, "TOTAL_SECONDS", 1.0)
    proxy.plan = lambda number, method, target: "busy"
    message = r"s3://bucket/set/train-0000\d.tar: no response in \d s .*SlowDown"
    with stream, pytest.raises(ConnectionError, match=message):
        take_batches(stream, 200)


def test_close_does_not_wait_for_an_unavailable_store(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_SECONDS", 10.0)
    stream = loader(proxy.address)
    proxy.plan = lambda number, method, target: "busy"
    time.sleep(0.5)
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 2


def test_whole_objects_and_ranges_are_read_in_blocks(proxy: FaultProxy, store: str) -> None:
    data = bytes(range(256)) * 4000
    storage.write_bytes("s3://bucket/other/object", data)
    proxy.plan = random_faults(5, 0.4)
    read = [storage.read_bytes("s3://bucket/other/object", endpoint_url=proxy.address) for _ in range(5)]
    assert all(result == data for result in read)
    part = storage.read_bytes("s3://bucket/other/object", 100_001, 2_000_000, endpoint_url=proxy.address)
    assert part == data[100_001:]
    assert storage.read_bytes("s3://bucket/other/object", len(data) + 5, len(data) + 9) == b""
    storage.write_bytes("s3://bucket/other/empty", b"")
    assert storage.read_bytes("s3://bucket/other/empty") == b""


def test_missing_and_truncated_shards_raise_an_error_that_names_them(store: str) -> None:
    url = "s3://bucket/damaged"
    dataset = write_set(url, [make_sample(n) for n in range(17)])
    shard = f"{url}/train-00000.tar"
    data = storage.read_bytes(shard)
    for change, message in (
        (lambda: storage.write_bytes(shard, data[:-9000]), r"train-00000.tar: \d+ bytes from \d+ on"),
        (lambda: storage.remove(shard), "train-00000.tar: is missing"),
    ):
        change()
        spec = LoaderSpec(DataConfig(max_words=5), sizes=(8,), groups=[0], total_groups=1, group_size=5)
        stream = open_loader(dataset, spec, seed=0)
        with stream, pytest.raises(ValueError, match=message):
            take_batches(stream, 9)


@pytest.mark.whole
def test_processes_of_a_node_fetch_each_shard_once(proxy: FaultProxy, tmp_path: Path) -> None:
    requested: list[str] = []

    def plan(number: int, method: str, target: str) -> str | None:
        if ".tar" in target:
            requested.append(target)
        return None

    proxy.plan = plan
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=fetch_all, args=(URL, str(tmp_path), proxy.address)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    shards = Dataset.open(URL, check_sizes=False).split("train").shards
    blocks = sum(-(-shard.bytes // (4 << 20)) for shard in shards)  # the processes use the default block size
    assert len(requested) == blocks
    assert sum(path.is_file() and "." not in path.name for path in tmp_path.iterdir()) == len(shards)


def test_a_loader_with_a_cache_fetches_each_shard_once(proxy: FaultProxy, tmp_path: Path) -> None:
    expected = take_batches(loader(None), 17)
    config = DataConfig(max_words=5, threads=2, cache=str(tmp_path), cache_gib=0.1)
    proxy.plan = random_faults(3, 0.2)
    for one, other in zip(expected, take_batches(loader(proxy.address, config=config), 17), strict=True):
        assert_batches_equal(one, other)
    proxy.plan = lambda number, method, target: "refuse" if ".tar" in target else None
    dataset = Dataset.open(URL, check_sizes=False, endpoint_url=proxy.address)
    again = open_loader(dataset, LoaderSpec(config, (8, 16), groups=[0, 1], total_groups=2, group_size=6), seed=3)
    for one, other in zip(expected, take_batches(again, 17), strict=True):
        assert_batches_equal(one, other)
