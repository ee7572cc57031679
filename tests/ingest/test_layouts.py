"""Layouts are recognised, said, and give the same bytes from disk and from an object store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from t2idist import storage
from t2idist.ingest import cli
from t2idist.ingest.files import PROGRESS
from tests.helpers.image_files import encode, make_image, read_rejects, save_image, write_jsonl
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


def run(folder: Path, out: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    status = shard_folder.main(["--folder", str(folder), "--out", str(out), *SMALL, *options])
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


ALL = ("--val", "0", "--test", "0")


@pytest.mark.parametrize("layout", ["tars", "parquet"])
def test_sets_inside_the_folder_are_not_read_as_input(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "mine"
    LAYOUTS[layout][0](root)
    shard(root, tmp_path / "elsewhere")
    shard(root, root / "set304")
    capsys.readouterr()
    assert captions(shard(root, root / "set76")) == EXPECTED
    assert "not read, because they are shard sets: set304/\n" in capsys.readouterr().out
    assert contents(root / "set76") == contents(tmp_path / "elsewhere")
    assert captions(shard(root / "set304", tmp_path / "again")) == EXPECTED  # a set that is named is input


@pytest.mark.parametrize("out", ["set", "."])
def test_a_run_with_its_output_inside_the_folder_resumes(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "mine"
    write_tar(root / "0.tar", img2dataset_members(0, 600))
    options = (*ALL, "--shard-samples", "256")
    shard(root, tmp_path / "whole", *options)

    def stop(self: object, done: int, total: int, shards: int = 0) -> None:
        if done == 400:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cli.ProgressBar, "update", stop)
        assert shard_folder.main(["--folder", str(root), "--out", str(root / out), *SMALL, *options]) == 130
    shard(root, root / out, *options)
    made = contents(root / out)
    made.pop("0.tar", None)
    assert made == contents(tmp_path / "whole")


def test_sets_inside_a_folder_of_a_store_are_not_read_as_input(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", img2dataset_members(0, 5))
    storage.write_bytes("memory://layouts/nested/0.tar", (tmp_path / "0.tar").read_bytes())
    expected = {"train": {f"picture number {n}" for n in range(5)}}
    for name in ("one", "two"):
        assert captions(shard("memory://layouts/nested", f"memory://layouts/nested/{name}", *ALL)) == expected


def test_images_that_need_no_captions_win_over_an_archive_beside_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "mine"
    for number in range(5):
        save_image(root / f"{number}.jpg", number, (16, 16))
    write_tar(root / "backup.tar", img2dataset_members(100, 3))
    found = shard(root, tmp_path / "set", *ALL, "--allow-no-captions")
    assert sorted(found.split("train").keys) == ["0", "1", "2", "3", "4"]
    assert "layout: images with captions beside them; not read: backup.tar" in capsys.readouterr().out


def test_a_column_without_a_name_holds_no_captions_if_there_are_none(tmp_path: Path) -> None:
    rows = pa.table({"": ["0", "1"], "image": [encode(make_image(16, 16, seed=n)) for n in range(2)]})
    pq.write_table(rows, tmp_path / "mine.parquet")
    options = (*ALL, "--caption-column", "", "--allow-no-captions")
    assert captions(shard(tmp_path / "mine.parquet", tmp_path / "set", *options)) == {"train": set()}


@pytest.mark.parametrize("layout", ["pairs", "captions.jsonl", "table", "tars"])
def test_a_file_whose_name_is_not_utf8_is_left_out_alone(layout: str, tmp_path: Path) -> None:
    root = tmp_path / "mine"
    if layout == "tars":
        write_tar(root / "0.tar", img2dataset_members(0, 10))
        name = b"gr\xfcn.tar"
    else:
        write_pairs(root)
        name = b"gr\xfcn.jpg"
    (Path(bytes(root).decode()) / name.decode("utf-8", "surrogateescape")).write_bytes(b"x")
    rows = [(f"{'test' if n < 3 else 'train'}/{n}.jpg", f"picture number {n}") for n in range(10)]
    options: tuple[str, ...] = ()
    if layout == "captions.jsonl":
        write_jsonl(root / "captions.jsonl", [{"image": name, "caption": text} for name, text in rows])
    elif layout == "table":
        (tmp_path / "t.csv").write_text("\n".join(",".join(row) for row in [("image", "caption"), *rows]))
        options = ("--table", str(tmp_path / "t.csv"))
    found = captions(shard(root, tmp_path / "set", *options))
    assert set().union(*found.values()) == {f"picture number {n}" for n in range(10)}
    escaped = name.decode("utf-8", "surrogateescape").encode("utf-8", "backslashreplace").decode()
    assert read_rejects(tmp_path / "set") == [(escaped, "invalid_utf8", "left out")]


def test_options_for_columns_are_used_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path / "pairs")
    status, _, error = run(tmp_path / "pairs", tmp_path / "set", capsys, "--class-column", "kind")
    assert status == 2 and "--class-column kind: text files beside the images have no columns" in error
    root = tmp_path / "mine"
    rows = []
    for number in range(3):
        save_image(root / f"{number}.jpg", number, (16, 16))
        rows.append(
            {"photo": f"{number}.jpg", "alt": f"number {number}", "kind": number, "tags": "Red; Big", "in": "dev"}
        )
    write_jsonl(root / "captions.jsonl", list(rows))
    options = ["--image-column", "photo", "--caption-column", "alt", "--class-column", "kind"]
    options += ["--attributes-column", "tags", "--split-column", "in"]
    found = shard(root, tmp_path / "set", *options)
    assert captions(found) == {"val": {"number 0", "number 1", "number 2"}}
    assert found.split("val").attributes(0) == ["Red", "Big"] and len(set(found.split("val").class_ids)) == 3
    status, _, error = run(root, tmp_path / "other", capsys, *options, "--class-column", "size")
    assert status == 2 and "captions.jsonl: no field 'size' (--class-column); fields: 'photo', 'alt'" in error
    write_tar(tmp_path / "tars" / "0.tar", img2dataset_members(0, 3))
    status, _, error = run(tmp_path / "tars", tmp_path / "other", capsys, "--class-column", "size")
    assert status == 2 and "the .json members of 0.tar: no field 'size' (--class-column)" in error


def write_flickr(root: Path, table: str, folder: str, header: str = "image,caption") -> None:
    """Write images and one table, as Kaggle has Flickr8k."""
    rows = [header]
    for number in range(4):
        save_image(root / folder / f"{number}.jpg", number, (16, 16))
        rows += [f'{number}.jpg,"picture, number {number}"', f"{number}.jpg,again {number}"]
    (root / table).write_text("\n".join(rows))


@pytest.mark.parametrize(
    ("table", "folder", "header"),
    [("captions.txt", "Images", "image,caption"), ("captions.csv", ".", "image,caption"),
     ("all.csv", "a/b", "file_name,text"), ("results.csv", "flickr", "image_name,caption")],
)  # fmt: skip
def test_one_table_beside_the_images_is_recognised(
    table: str, folder: str, header: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_flickr(tmp_path / "mine", table, folder, header)
    (tmp_path / "mine" / "sizes.csv").write_text("image,width\n0.jpg,16\n")
    write_tar(tmp_path / "mine" / "backup.tar", img2dataset_members(100, 3))
    expected = {f"{kind} {n}" for n in range(4) for kind in ("picture, number", "again")}
    assert captions(shard(tmp_path / "mine", tmp_path / "set", *ALL)) == {"train": expected}
    image, caption = header.split(",")
    said = f"layout: images with a table ({table}: images '{image}', captions '{caption}')"
    assert said in capsys.readouterr().out


def test_a_table_that_is_not_recognised_is_named_with_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "mine"
    write_flickr(root, "captions.csv", "Images", "photo,words")
    assert f"captions.csv may hold the captions: --table {root}/captions.csv" in run(root, tmp_path / "s", capsys)[2]
    (root / "captions.csv").unlink()
    write_flickr(root, "captions.csv", "Images")
    write_flickr(root, "captions_old.csv", "Images")
    status, out, error = run(root, tmp_path / "s", capsys)
    assert status == 2 and "with a table" not in out and f"--table {root}/captions_old.csv" in error


@pytest.mark.parametrize("name", ["a.tar.bz2", "a.tar.xz", "a.tar.zst"])
def test_archives_that_are_not_read_are_answered_with_the_way(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_bytes(b"x")
    code = shard_folder.main(["--folder", str(tmp_path / "mine"), "--out", str(tmp_path / "set")])
    assert code == 2 and "unpack them first; of archives, .tar and .tar.gz are read" in capsys.readouterr().err
