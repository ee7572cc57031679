"""Temporary credentials that expire while a process reads and writes: new ones are taken from the credentials file."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

from t2idist import storage
from t2idist.config import DataConfig
from t2idist.data.loader import LoaderSpec, open_loader
from t2idist.data.shards import Dataset
from t2idist.storage import renewal
from tests.helpers.fault_proxy import FaultProxy, fault_proxy
from tests.helpers.object_store import KEY, NEW_KEY, NEW_SECRET, SECRET, seaweedfs, store
from tests.helpers.runs import ROOT, command_environment, command_line, write_recipe
from tests.helpers.shard_sets import assert_batches_equal, make_sample, png_image, take_batches, write_set

pytestmark = pytest.mark.whole

OBJECT = "s3://bucket/object"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with seaweedfs() as environment:
        yield environment["AWS_ENDPOINT_URL"]


@pytest.fixture
def credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A credentials file, the only source of keys."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "credentials"
    write_keys(file, KEY, SECRET)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(renewal, "RENEWAL_SECONDS", 20.0)
    monkeypatch.setattr(renewal, "_SECONDS_BETWEEN_CLIENTS", 0.1)
    return file


@pytest.fixture
def proxy(address: str, credentials: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with fault_proxy(address, lambda number, method, target: None) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        yield proxy


def write_keys(file: Path, key: str, secret: str) -> None:
    file.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")


def test_every_request_goes_on_with_new_keys(proxy: FaultProxy, credentials: Path) -> None:
    keys = [(KEY, SECRET), (NEW_KEY, NEW_SECRET)]
    requests = [
        lambda: storage.read_bytes(OBJECT), lambda: storage.write_bytes(OBJECT, b"x"), lambda: storage.exists(OBJECT),
        lambda: storage.size(OBJECT), lambda: storage.list_dir("s3://bucket"), lambda: storage.remove(f"{OBJECT}2"),
    ]  # fmt: skip
    storage.write_bytes(OBJECT, b"x")
    for number, request in enumerate(requests):
        request()
        old, new = keys[number % 2], keys[(number + 1) % 2]
        write_keys(credentials, *new)
        proxy.expired_keys = {old[0]}
        refused = proxy.done["refuse"]
        request()
        assert proxy.done["refuse"] > refused


def test_keys_that_come_late_are_waited_for(proxy: FaultProxy, credentials: Path) -> None:
    storage.write_bytes(OBJECT, b"data")
    proxy.expired_keys = {KEY}
    timer = threading.Timer(1.5, write_keys, (credentials, NEW_KEY, NEW_SECRET))
    timer.start()
    assert storage.read_bytes(OBJECT) == b"data" and storage.size(OBJECT) == 4
    timer.join()


def test_a_loader_goes_on_with_new_keys(proxy: FaultProxy, credentials: Path) -> None:
    url = "s3://bucket/set"
    write_set(url, [make_sample(n, image=png_image(n, (50, 60))) for n in range(60)])

    def spec() -> LoaderSpec:
        config = DataConfig(max_words=5, threads=2, prefetch_mib=1)
        return LoaderSpec(config=config, groups=[0, 1], total_groups=2, group_size=6, sizes=(8, 16))

    expected = take_batches(open_loader(Dataset.open(url), spec(), seed=3), 30)
    with open_loader(Dataset.open(url), spec(), seed=3) as stream:
        for number, batch in enumerate(expected):
            if number == 5:
                proxy.expired_keys = {KEY}
                write_keys(credentials, NEW_KEY, NEW_SECRET)
            assert_batches_equal(next(stream), batch)
    assert proxy.done["refuse"] > 0


def test_a_store_that_removed_the_old_key_gets_the_new_one(address: str, credentials: Path, tmp_path: Path) -> None:
    storage.write_bytes(OBJECT, b"data", endpoint_url=address)
    write_keys(credentials, "removed-key", "removed-secret")
    renewal._CLIENTS.replace(renewal.generation())  # the process has made its clients with keys that are gone now
    timer = threading.Timer(1.0, write_keys, (credentials, NEW_KEY, NEW_SECRET))
    timer.start()
    assert storage.exists(OBJECT, endpoint_url=address)
    assert storage.read_bytes(OBJECT, endpoint_url=address) == b"data"
    timer.join()


def test_a_store_that_refuses_from_the_beginning_is_an_error_at_once(proxy: FaultProxy) -> None:
    proxy.expired_keys = {KEY}
    for request in (storage.read_bytes, storage.exists, storage.size, storage.list_dir):
        began, before = time.monotonic(), proxy.requests
        with pytest.raises(PermissionError, match="s3://bucket/object: the store refuses access"):
            request(OBJECT)
        assert time.monotonic() - began < 5 and proxy.requests - before <= 2


def test_keys_that_stay_expired_end_in_an_error(
    proxy: FaultProxy, credentials: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(OBJECT, b"data")
    monkeypatch.setattr(renewal, "RENEWAL_SECONDS", 1.0)
    proxy.expired_keys = {KEY}
    began = time.monotonic()
    with pytest.raises(PermissionError, match="ExpiredToken"):
        storage.read_bytes(OBJECT)
    assert 1.0 < time.monotonic() - began < 12


@pytest.mark.parametrize("name", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_run_whose_keys_expire_twice_ends_well(name: str, proxy: FaultProxy, credentials: Path, address: str) -> None:
    """In one process, and on two workers of Ray, where the driver needs new keys too."""
    remote = store(address)
    remote.put(str(files("t2idist.data.embedded").joinpath("emoji")) + "/", "bucket/emoji/", recursive=True)
    recipe = write_recipe(credentials.parent, storage="s3://bucket/runs", cluster={"workers": 2, "cpus_per_worker": 1})
    line = command_line(str(recipe), f"name={name}", "data.source=s3://bucket/emoji")
    line += ["--local"] if name == "local" else []
    with subprocess.Popen(
        line, cwd=ROOT, env=command_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        for old, new, sign in (
            (KEY, (NEW_KEY, NEW_SECRET), f"bucket/runs/{name}/damsm/checkpoints"),
            (NEW_KEY, (KEY, SECRET), f"bucket/runs/{name}/attngan/checkpoints"),
        ):
            while run.poll() is None and not remote.exists(sign):
                time.sleep(0.2)
                remote.invalidate_cache()
            refused = proxy.done["refuse"]
            proxy.expired_keys = {old}
            time.sleep(0.5)
            write_keys(credentials, *new)
            while run.poll() is None and proxy.done["refuse"] == refused:
                time.sleep(0.1)
        output, _ = run.communicate(timeout=240)
    assert run.returncode == 0, output
    assert proxy.done["refuse"] >= 2 and SECRET not in output and NEW_SECRET not in output
    remote.invalidate_cache()
    assert remote.exists(f"bucket/runs/{name}/attngan/export/generator.safetensors")
