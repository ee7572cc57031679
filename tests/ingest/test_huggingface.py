"""The reader for image folders of Hugging Face."""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.image_files import read_rejects, save_image, write_jsonl
from tests.ingest.layout_sets import SMALL, captions, shard
from tools import shard_folder


def rows_of(split: str, prefix: str = "", field: str = "text") -> list[dict[str, str]]:
    return [{"file_name": f"{prefix}{number}.jpg", field: f"{split} picture {number}"} for number in range(6)]


def write_metadata(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        write_jsonl(path, list(rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("field", ["text", "caption", "description"])
def test_a_metadata_file_in_each_split(
    tmp_path: Path, kind: str, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "mine"
    for split, folder in (("train", "train"), ("val", "validation"), ("test", "test")):
        for number in range(6):
            save_image(root / folder / f"{number}.jpg", number, (16, 16))
        write_metadata(root / folder / f"metadata.{kind}", rows_of(split, field=field))
    save_image(root / "test" / "alone.jpg")
    option = ["--caption-column", field] if field == "description" else []
    found = captions(shard(root, tmp_path / "set", *option))
    assert found == {split: {f"{split} picture {n}" for n in range(6)} for split in ("train", "val", "test")}
    assert read_rejects(tmp_path / "set") == [("test/alone.jpg", "picture_without_captions", "left out")]
    printed = capsys.readouterr().out
    assert f"layout: image folder of Hugging Face (test/metadata.{kind}, train/metadata.{kind}" in printed
    assert "splits: from the folders: test 6, train 6, val 6 files" in printed


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_one_metadata_file_names_images_of_all_splits(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "mine"
    for folder in ("train", "test"):
        for number in range(6):
            save_image(root / "data" / folder / f"{number}.jpg", number, (16, 16))
    rows = [row for split in ("train", "test") for row in rows_of(split, f"data/{split}/")]
    rows += [{"file_name": "../secret.jpg", "text": "up"}, {"file_name": "data/train/none.jpg", "text": "no file"}]
    write_metadata(root / f"metadata.{kind}", rows)
    found = captions(shard(root, tmp_path / "set"))
    assert found == {split: {f"{split} picture {n}" for n in range(6)} for split in ("train", "test")}
    assert {(name, reason) for name, reason, _ in read_rejects(tmp_path / "set")} == {
        ("../secret.jpg", "unsafe_name"), ("data/train/none.jpg", "captions_without_picture"),
    }  # fmt: skip


def test_classes_attributes_several_captions_and_malformed_lines(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    for number in range(4):
        save_image(root / f"{number}.jpg", number, (16, 16))
    rows: list[object] = [
        {"file_name": "0.jpg", "text": ["one", "two"], "label": 7, "tags": ["Red"], "split": "validation"},
        {"file_name": "1.jpg", "text": "three", "label": "x", "split": "train"},
        {"file_name": "2.jpg", "text": 5, "split": "train"},
        {"text": "no name"},
    ]
    write_jsonl(root / "metadata.jsonl", rows)
    with open(root / "metadata.jsonl", "ab") as file:
        file.write(b'{"file_name": "3.jpg", "text": "caf\xe9"}\n{broken\n')
    found = shard(root, tmp_path / "set", "--class-column", "label", "--attributes-column", "tags")
    val = found.split("val")
    assert val.captions(0) == ["one", "two"] and val.attributes(0) == ["Red"] and int(val.class_ids[0]) == 0
    assert len(found.split("train")) == 1
    reasons = {(name, reason) for name, reason, _ in read_rejects(tmp_path / "set")}
    assert {
        ("metadata.jsonl, line 3", "malformed"), ("metadata.jsonl, line 4", "malformed"),
        ("metadata.jsonl, line 5", "invalid_utf8"), ("metadata.jsonl, line 6", "malformed"),
    } <= reasons  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_the_fields_are_named_if_none_holds_captions(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "mine"
    save_image(root / "0.jpg")
    write_metadata(root / f"metadata.{kind}", [{"file_name": "0.jpg", "title": "x"}])
    arguments = ["--folder", str(root), "--out", str(tmp_path / "set"), *SMALL]
    assert shard_folder.main(arguments) == 2
    error = capsys.readouterr().err
    assert f"metadata.{kind}: no field 'text' or 'caption' or 'captions'" in error
    assert "--caption-column" in error and "fields: 'file_name', 'title'" in error
    assert shard_folder.main([*arguments, "--caption-column", "name"]) == 2
    assert "no field 'name'" in capsys.readouterr().err
    assert len(shard(root, tmp_path / "set", "--allow-no-captions", "--val", "0", "--test", "0").split("train")) == 1
    write_metadata(root / "metadata.csv", [{"file_name": "0.jpg", "text": "x"}])
    write_metadata(root / "metadata.jsonl", [{"file_name": "0.jpg", "text": "x"}])
    assert shard_folder.main([*arguments[:3], str(tmp_path / "other"), *SMALL]) == 2
    assert "several metadata files" in capsys.readouterr().err


@pytest.mark.parametrize("first", ["{broken", "[]", "5", '{"comment": "x"}'])
def test_a_malformed_first_line_hides_no_metadata(tmp_path: Path, first: str) -> None:
    root = tmp_path / "mine"
    for number in range(6):
        save_image(root / f"{number}.jpg", number, (16, 16))
    write_metadata(root / "metadata.jsonl", rows_of("train"))
    (root / "metadata.jsonl").write_text(f"{first}\n{(root / 'metadata.jsonl').read_text()}")
    assert captions(shard(root, tmp_path / "set", "--val", "0", "--test", "0")) == {
        "train": {f"train picture {n}" for n in range(6)}
    }
    assert read_rejects(tmp_path / "set") == [("metadata.jsonl, line 1", "malformed", "left out")]
