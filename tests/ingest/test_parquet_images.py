"""The reader for Parquet files with embedded images."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from t2idist.ingest.fields import Fields
from t2idist.ingest.listing import Listing
from t2idist.ingest.parquet_images import files_with_images, image_column
from tests.helpers.image_files import encode, make_image, read_rejects
from tests.ingest.layout_sets import SMALL, captions, contents, jpeg, shard, write_parquet
from tools import shard_folder

ALL = ("--val", "0", "--test", "0")


def test_many_files_of_several_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "mine" / "data"
    write_parquet(data / "train-00000-of-00002.parquet", 0, 20)
    write_parquet(data / "train-00001-of-00002.parquet", 20, 20)
    write_parquet(data / "test-00000-of-00001.parquet", 40, 10)
    found = captions(shard(tmp_path / "mine", tmp_path / "set"))
    assert found["train"] == {f"picture number {n}" for n in range(40)}
    assert found["test"] == {f"picture number {n}" for n in range(40, 50)} and len(found) == 2
    printed = capsys.readouterr().out
    assert "layout: Parquet with embedded images (data/test-00000-of-00001.parquet, " in printed
    assert "splits: from the names of folders and files: test 1, train 2 files" in printed
    assert read_rejects(tmp_path / "set") == []


def test_the_bytes_are_those_of_the_images_and_do_not_depend_on_the_processes(tmp_path: Path) -> None:
    write_parquet(tmp_path / "mine.parquet", 0, 30)
    found = shard(tmp_path / "mine.parquet", tmp_path / "one", *ALL, "--keep-original")
    train = found.split("train")
    shards = contents(tmp_path / "one")
    for index in range(len(train)):
        number = int(train.captions(index)[0].rsplit(" ", 1)[1])
        start, size = int(train.offsets[index]), int(train.lengths[index])
        assert jpeg(number) in shards["train-00000.tar"][start : start + size]
    shard(tmp_path / "mine.parquet", tmp_path / "three", *ALL, "--keep-original", "--processes", "3")
    assert contents(tmp_path / "three") == shards


@pytest.mark.parametrize("name", ["image", "jpg", "picture"])
@pytest.mark.parametrize("binary", [pa.binary(), pa.large_binary()])
def test_binary_columns(tmp_path: Path, name: str, binary: pa.DataType) -> None:
    columns = {name: pa.array([jpeg(n) for n in range(5)], binary), "caption": [f"picture {n}" for n in range(5)]}
    pq.write_table(pa.table(columns), tmp_path / "mine.parquet")
    assert captions(shard(tmp_path, tmp_path / "set", *ALL)) == {"train": {f"picture {n}" for n in range(5)}}


def test_several_captions_classes_attributes_and_unusable_rows(tmp_path: Path) -> None:
    images = [{"bytes": jpeg(n), "path": None} for n in range(4)]
    images += [
        {"bytes": None, "path": "far.jpg"},
        None,
        {"bytes": b"", "path": None},
        {"bytes": jpeg(1)[:-90], "path": ""},
    ]
    text = pa.array([["one", "two"], ["x"], None, [], ["x"], ["x"], ["x"], ["x"]], pa.list_(pa.string()))
    table = pa.table({
        "image": images, "text": text, "label": [0, 1, 0, -1, 0, 0, 0, 0], "tags": [["Red", "Big"]] + [None] * 7,
        "part": ["validation"] + ["train"] * 7,
    })  # fmt: skip
    features = {"info": {"features": {"label": {"names": ["jay", "crow"], "_type": "ClassLabel"}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "mine.parquet")
    options = ["--class-column", "label", "--attributes-column", "tags", "--split-column", "part"]
    found = shard(tmp_path, tmp_path / "set", *options)
    val = found.split("val")
    assert val.captions(0) == ["one", "two"] and val.attributes(0) == ["Red", "Big"]
    description = json.loads((tmp_path / "set" / "dataset.json").read_text())
    assert description["classes"] == {"0": "crow", "1": "jay"} and int(val.class_ids[0]) == 1
    assert len(found.split("train")) == 1
    assert set(read_rejects(tmp_path / "set")) == {
        ("mine.parquet/row 3", "picture_without_captions", "left out"),
        ("mine.parquet/row 4", "picture_without_captions", "left out"),
        ("mine.parquet/row 5", "captions_without_picture", "left out"),
        ("mine.parquet/row 6", "captions_without_picture", "left out"),
        ("mine.parquet/row 7", "zero_bytes", "left out"),
        ("mine.parquet/row 8", "truncated", "left out"),
    }


def test_texts_that_are_not_utf8_are_listed(tmp_path: Path) -> None:
    text = pa.array([b"fine", b"caf\xe9"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"image": [jpeg(0), jpeg(1)], "text": text}), tmp_path / "mine.parquet")
    assert captions(shard(tmp_path, tmp_path / "set", *ALL)) == {"train": {"fine"}}
    assert ("mine.parquet/row 2", "invalid_utf8", "caption left out") in read_rejects(tmp_path / "set")


def test_invalid_files_and_unclear_columns_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(name: str, *options: str) -> str:
        source = ["--folder", str(tmp_path / name), "--out", str(tmp_path / "set")]
        assert shard_folder.main([*source, *SMALL, *options]) == 2
        return capsys.readouterr().err

    write_parquet(tmp_path / "mine.parquet", 0, 3)
    assert "no field 'words'; name the one with the captions" in error("mine.parquet", "--caption-column", "words")
    assert "no field 'kind' (--class-column); fields: 'image', 'text'" in error(
        "mine.parquet", "--class-column", "kind"
    )
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    assert "bad.parquet: not a readable parquet file" in error("bad.parquet")
    (tmp_path / "lfs.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "lfs.parquet: is a pointer of Git LFS" in error("lfs.parquet")
    pq.write_table(pa.table({"a": [b"x"], "b": [b"y"], "text": ["z"]}), tmp_path / "two.parquet")
    assert "--image-column" in error("two.parquet") and "--table" in error("two.parquet")
    pq.write_table(pa.table({"url": ["https://x"], "text": ["z"]}), tmp_path / "urls.parquet")
    assert "urls.parquet has no column with images" in error("urls.parquet")


def test_the_column_is_chosen() -> None:
    binary, struct = pa.binary(), pa.struct({"bytes": pa.binary(), "path": pa.string()})
    assert image_column(pa.schema({"image": struct, "mask": struct}), Fields()) == "image"
    assert image_column(pa.schema({"a": struct, "b": binary}), Fields()) is None
    assert image_column(pa.schema({"a": struct, "b": binary}), Fields("b")) == "b"
    assert image_column(pa.schema({"image": pa.string()}), Fields()) is None


def test_too_little_temporary_space_is_said_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "mine.parquet", 0, 3)
    assert files_with_images(str(tmp_path), ["mine.parquet"], Fields())["mine.parquet"] > 3 * len(jpeg())
    monkeypatch.setattr(Listing, "spool_bytes_free", lambda self: 100)
    assert shard_folder.main(["--folder", str(tmp_path), "--out", str(tmp_path / "set"), *SMALL]) == 2
    assert "MiB of temporary disk space; 0 MiB are free; TMPDIR names" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_row_groups(tmp_path: Path) -> None:
    image = encode(make_image(600, 600, seed=1), "BMP")  # 1 MB
    peaks = []
    for count in (150, 600):
        path = tmp_path / f"{count}.parquet"
        with pq.ParquetWriter(path, pa.schema({"image": pa.binary(), "text": pa.string()}), compression="none") as out:
            images = [image[:-4] + n.to_bytes(4) for n in range(count)]
            out.write_table(pa.table({"image": images, "text": ["x"] * count}), row_group_size=25)
        code = (  # VmHWM, because ru_maxrss of a child begins with the memory of its parent
            "import sys; from tools import shard_folder; shard_folder.main(sys.argv[1:]); "
            "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        )
        command = [sys.executable, "-c", code, "--folder", str(path), "--out", str(tmp_path / f"s{count}"), *SMALL]
        ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
        peaks.append(int(ended.stdout.splitlines()[-1]))
    assert peaks[1] < 1.2 * peaks[0], peaks
