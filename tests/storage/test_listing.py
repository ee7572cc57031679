"""A tree of files is listed, read and sharded alike on disk and in an object store."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import botocore.session
import pytest

from t2idist import storage
from t2idist.ingest.files import walk
from tests.helpers.image_files import save_image
from tests.helpers.object_store import seaweedfs, store
from tools import shard_folder

pytestmark = pytest.mark.whole

NAMES = (
    "birds", "a", "a b", "a+b", "100%", "%20", "#1", "x#y", "grün", "gru\u0308n", "鳥", "a&b=c", "[1]", "a*", "q?x",
    "it's", "x.jpg", "~t", "a;b", "comma,", "@", "=", "(1)", "{0}", "..a", ".hidden", "A",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def address() -> Iterator[str]:
    with seaweedfs() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            if name.startswith("AWS"):
                patch.setenv(name, value)
        yield environment["AWS_ENDPOINT_URL"]


def upload(folder: Path, url: str) -> None:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            storage.write_bytes(f"{url}/{file.relative_to(folder).as_posix()}", file.read_bytes())


def write_tree(folder: Path, generator: random.Random, depth: int = 0) -> None:
    folder.mkdir()
    names = generator.sample(NAMES, 7)
    for name in {*names, folder.name}:  # a child may be called like its parent
        if depth < 2 and generator.random() < 0.4:
            write_tree(folder / name, generator, depth + 1)
        else:
            (folder / name).write_bytes(f"{name} {generator.random()}".encode())


def check_folder(local: Path, remote: str) -> None:
    assert storage.list_dir(remote) == storage.list_dir(str(local))
    assert storage.list_files_and_folders(remote) == storage.list_files_and_folders(str(local))
    for name in storage.list_files_and_folders(str(local))[1]:
        check_folder(local / name, f"{remote}/{name}")


def without_empty_folders(folder: Path) -> None:
    for child in folder.iterdir():
        if child.is_dir():
            without_empty_folders(child)
    if not any(folder.iterdir()):
        folder.rmdir()


@pytest.mark.parametrize("seed", range(4))
def test_a_generated_tree_is_the_same_on_disk_and_in_a_store(tmp_path: Path, seed: int) -> None:
    local, remote = tmp_path / "birds", f"s3://bucket/tree{seed}/birds"
    write_tree(local, random.Random(seed))
    without_empty_folders(local)
    upload(local, remote)
    files = list(walk(str(local)))
    assert files and list(walk(remote)) == files
    check_folder(local, remote)
    for name in files:
        assert storage.read_bytes(f"{remote}/{name}") == (local / name).read_bytes(), name
        assert storage.size(f"{remote}/{name}") == (local / name).stat().st_size and storage.exists(f"{remote}/{name}")
        assert storage.list_dir(f"{remote}/{name}") == storage.list_dir(str(local / name)) == []


def test_markers_of_folders_are_no_files(address: str, tmp_path: Path) -> None:
    client = store(address)
    for key in ("marked/", "marked/birds/", "marked/birds/birds/", "marked/empty/"):
        client.call_s3("put_object", Bucket="bucket", Key=key, Body=b"")
    storage.write_bytes("s3://bucket/marked/birds/birds/a.jpg", b"x")
    assert list(walk("s3://bucket/marked")) == ["birds/birds/a.jpg"]
    assert storage.list_dir("s3://bucket/marked") == ["birds", "empty"]
    assert storage.list_dir("s3://bucket/marked/birds") == ["birds"]
    assert storage.list_dir("s3://bucket/marked/empty") == storage.list_dir("s3://bucket/marked/nothing") == []


def test_names_are_not_patterns_when_removed() -> None:
    for name in ("a1", "a[1]", "b*/x", "bc/x", "c", "cd"):
        storage.write_bytes(f"s3://bucket/removed/{name}", b"x")
    for name in ("a[1]", "b*", "c"):
        storage.remove(f"s3://bucket/removed/{name}")
    assert list(walk("s3://bucket/removed")) == ["a1", "cd", "bc/x"]


def test_a_tree_is_sharded_to_the_same_bytes_from_disk_and_from_a_store(tmp_path: Path) -> None:
    local, remote = tmp_path / "birds", "s3://bucket/sharded/birds"
    names = ("birds/birds/a", "birds/b", "b+c/d e", "100%/#1", "grün/鳥", "z", "x.jpg/y")
    for number, name in enumerate(names):
        save_image(local / f"{name}.png")
        (local / f"{name}.txt").write_text(f"bird number {number} of the tree\n")
    upload(local, remote)
    for source, out in ((str(local), tmp_path / "disk"), (remote, tmp_path / "store")):
        assert not shard_folder.main(["--folder", source, "--out", str(out), "--size", "24"])
    shards = [file.name for file in sorted((tmp_path / "disk").glob("*.tar"))]
    assert shards == [file.name for file in sorted((tmp_path / "store").glob("*.tar"))] and shards
    for name in (*shards, "dataset.json"):
        assert (tmp_path / "disk" / name).read_bytes() == (tmp_path / "store" / name).read_bytes(), name


def test_clients_that_were_started_serve_the_first_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # another environment, which has no clients yet
    storage.start_clients("s3://bucket/any")
    monkeypatch.setattr(botocore.session, "get_session", lambda: pytest.fail("another client"))
    storage.write_bytes("s3://bucket/started", b"1")
    assert storage.exists("s3://bucket/started") and storage.read_bytes("s3://bucket/started") == b"1"
    assert storage.read_json_if_present("s3://bucket/missing") is None
