"""Layouts are recognised, said, and give the same bytes from disk and from an object store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from t2idist import storage
from t2idist.ingest import cli
from t2idist.ingest.writer import PROGRESS
from tests.helpers.image_files import encode, make_image, save_image, write_jsonl
from tests.helpers.object_store import seaweedfs, store
from tests.ingest.layout_sets import SMALL, captions, contents, img2dataset_members, shard, write_parquet, write_tar
from tools import shard_folder


def write_pairs(root: Path) -> None:
    for number in range(10):
        split = "test" if number < 3 else "train"
        save_image(root / split / f"{number}.jpg", number, (16, 16))
        (root / split / f"{number}.txt").write_text(f"picture number {number}")


def write_image_folder(root: Path) -> None:
    for split, numbers in (("test", range(3)), ("train", range(3, 10))):
        rows: list[object] = []
        for number in numbers:
            save_image(root / split / f"{number}.jpg", number, (16, 16))
            rows.append({"file_name": f"{number}.jpg", "text": f"picture number {number}"})
        write_jsonl(root / split / "metadata.jsonl", rows)


def write_parquets(root: Path) -> None:
    write_parquet(root / "data" / "test-00000-of-00001.parquet", 0, 3)
    write_parquet(root / "data" / "train-00000-of-00002.parquet", 3, 4)
    write_parquet(root / "data" / "train-00001-of-00002.parquet", 7, 3)


def write_tars(root: Path) -> None:
    write_tar(root / "test" / "00000.tar", img2dataset_members(0, 3))
    write_tar(root / "train" / "00000.tar", img2dataset_members(3, 4))
    write_tar(root / "train" / "00001.tar.gz", img2dataset_members(7, 3), "w:gz")


LAYOUTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "pairs": (write_pairs, "images with captions beside them"),
    "image_folder": (write_image_folder, "image folder of Hugging Face"),
    "parquet": (write_parquets, "Parquet with embedded images"),
    "tars": (write_tars, "webdataset"),
}
EXPECTED = {
    "test": {f"picture number {n}" for n in range(3)},
    "train": {f"picture number {n}" for n in range(3, 10)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_recognised_and_keeps_its_splits(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write, name = LAYOUTS[layout]
    write(tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text("about")
    assert captions(shard(tmp_path / "mine", tmp_path / "set")) == EXPECTED
    assert f"layout: {name}" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["parquet", "tar", "tar.gz"])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"mine.{kind}"
    if kind == "parquet":
        write_parquet(path, 0, 600)
    else:
        write_tar(path, img2dataset_members(0, 600), "w" if kind == "tar" else "w:gz")
    options = ("--shard-samples", "256", "--val", "0", "--test", "0")
    shard(path, tmp_path / "whole", *options)

    def stop(self: object, done: int, total: int, shards: int = 0) -> None:
        if done == 400:
            raise KeyboardInterrupt

    arguments = ["--folder", str(path), "--out", str(tmp_path / "set"), *SMALL, *options]
    with monkeypatch.context() as patch:
        patch.setattr(cli.ProgressBar, "update", stop)
        assert shard_folder.main(arguments) == 130
    assert [record.name for record in (tmp_path / "set" / PROGRESS).iterdir()] == ["train-00000.tar.json"]
    shard(path, tmp_path / "set", *options)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


@pytest.fixture(scope="module")
def object_store() -> Iterator[dict[str, str]]:
    with seaweedfs() as environment:
        yield environment


@pytest.mark.whole
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bucket_and_a_disk_with_the_same_files_give_the_same_bytes(
    layout: str, tmp_path: Path, object_store: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, _ = LAYOUTS[layout]
    write(tmp_path / "mine")
    shard(tmp_path / "mine", tmp_path / "from_disk")
    for name, value in object_store.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    remote = store(object_store["AWS_ENDPOINT_URL"])
    remote.put(f"{tmp_path / 'mine'}/", f"bucket/{layout}/", recursive=True)
    shard(f"s3://bucket/{layout}", tmp_path / "from_store", "--processes", "2" if layout == "tars" else "1")
    assert contents(tmp_path / "from_store") == contents(tmp_path / "from_disk")


@pytest.mark.whole
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_files_of_many_blocks_are_read_from_a_bucket(
    kind: str, tmp_path: Path, object_store: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = encode(make_image(700, 700, seed=1), "BMP")  # 1.5 MB; a block has 4 MiB
    images = [image[:-4] + number.to_bytes(4) for number in range(20)]
    path = tmp_path / f"mine.{kind}"
    if kind == "tar":
        write_tar(path, {f"{n}.{e}": d for n, i in enumerate(images) for e, d in (("bmp", i), ("txt", b"big %d" % n))})
    else:
        pq.write_table(pa.table({"image": images, "text": [f"big {n}" for n in range(20)]}), path, compression="none")
    assert path.stat().st_size > 6 * storage.BLOCK_BYTES
    options = ("--val", "0", "--test", "0")
    found = shard(path, tmp_path / "from_disk", *options)
    assert captions(found) == {"train": {f"big {n}" for n in range(20)}}
    for name, value in object_store.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    store(object_store["AWS_ENDPOINT_URL"]).put_file(str(path), f"bucket/many/{path.name}")
    shard(f"s3://bucket/many/{path.name}", tmp_path / "from_store", *options)
    assert contents(tmp_path / "from_store") == contents(tmp_path / "from_disk")


def test_any_store_is_read(tmp_path: Path) -> None:
    for name, data in img2dataset_members(0, 5).items():
        storage.write_bytes(f"memory://layouts/pairs/{name}", data)
    write_tar(tmp_path / "mine.tar", img2dataset_members(0, 5))
    storage.write_bytes("memory://layouts/tars/0.tar", (tmp_path / "mine.tar").read_bytes())
    expected = {"train": {f"picture number {n}" for n in range(5)}}
    for name in ("tars", "pairs"):
        found = shard(f"memory://layouts/{name}", tmp_path / name, "--val", "0", "--test", "0")
        assert captions(found) == expected


def run(folder: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = shard_folder.main(["--folder", str(folder), "--out", str(out), *SMALL])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_what_lies_there_is_said_if_there_is_no_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "mine"
    assert "no images found; the folder is missing or empty" in run(root, tmp_path / "set", capsys)[2]
    root.mkdir()
    for number in range(3):
        (root / f"{number}.zip").write_bytes(b"PK")
    (root / "data.arrow").write_bytes(b"")
    status, _, error = run(root, tmp_path / "set", capsys)
    assert (
        status == 2
        and "no images found; the folder has 3 .zip, 1 .arrow: unzip them first; write them as Parquet" in error
    )


def test_archives_beside_images_with_captions_are_not_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "mine"
    write_pairs(root)
    write_tar(root / "backup.tar", img2dataset_members(100, 3))
    write_parquet(root / "backup.parquet", 100, 3)
    assert "layout: images with captions beside them" in run(root, tmp_path / "set", capsys)[1]


def test_single_images_beside_archives_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "mine"
    write_parquets(root)
    save_image(root / "assets" / "preview.jpg")
    found = run(root, tmp_path / "set", capsys)[1]
    assert "Parquet with embedded images" in found and "1 image files beside them are not read" in found


def test_captions_jsonl_is_taken_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "mine"
    write_image_folder(root)
    write_jsonl(root / "captions.jsonl", [{"image": f"train/{n}.jpg", "caption": "own"} for n in range(3, 10)])
    assert "layout: images with captions.jsonl" in run(root, tmp_path / "set", capsys)[1]
