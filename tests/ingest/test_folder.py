"""The reader for custom images: captions.jsonl, tables and text files."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from t2idist.ingest.folder import FolderOptions, list_folder
from t2idist.ingest.listing import Listing
from t2idist.ingest.tables import Columns
from tests.helpers.image_files import make_set, read_rejects, save_image, write_jsonl


def test_captions_jsonl_gives_annotations_and_rejects(tmp_path: Path):
    root = tmp_path / "mine"
    for name in ("a.jpg", "b c.jpg", "sub/d.jpg", "e.jpg", "alone.jpg", "f.jpg", "g.jpg"):
        save_image(root / name)
    (root / "g.jpg").write_bytes(b"")
    rows: list[object] = [
        {"image": "a.jpg", "caption": "one bird", "class": "jay", "split": "train", "attributes": ["Red"]},
        {"image": "./a.jpg", "captions": ["two birds", ""], "attributes": {"Small": True, "Big": False}},
        {"image": "b c.jpg", "caption": "three", "class": "crow", "split": "test"},
        {"image": "sub/d.jpg", "caption": "four", "split": "train"},
        {"image": "e.jpg", "split": "train"},
        {"image": "f.jpg", "caption": "x", "split": "train"},
        {"image": "f.jpg", "caption": "x", "split": "test"},
        {"image": "g.jpg", "caption": "empty file", "split": "test"},
        {"image": "none.jpg", "caption": "no file", "split": "test"},
        {"image": "../a.jpg", "caption": "up"},
        {"image": "https://example.com/a.jpg", "caption": "far"},
        {"caption": "no image"},
    ]
    write_jsonl(root / "captions.jsonl", rows)
    with open(root / "captions.jsonl", "ab") as file:
        file.write(b'{"image": "a.jpg", "caption": "caf\xe9"}\n{broken\n' + b"[" * 100_000 + b"\n")
    with Listing() as listing:
        list_folder(str(root), listing, FolderOptions())
        assert listing.classes == {0: "crow", 1: "jay"}
        dataset = make_set(listing, tmp_path / "set")
    train = dataset.split("train")
    a = train.keys.index("a")
    assert train.captions(a) == ["one bird", "two birds"] and train.attributes(a) == ["Red", "Small"]
    assert int(train.class_ids[a]) == 1 and sorted(train.keys)[1].startswith("sub-d-")
    assert set(read_rejects(tmp_path / "set")) == {
        ("../a.jpg", "unsafe_name", "left out"),
        ("https://example.com/a.jpg", "unsafe_name", "left out"),
        ("captions.jsonl, line 12", "malformed", "left out"),
        ("captions.jsonl, line 13", "invalid_utf8", "left out"),
        ("captions.jsonl, line 14", "malformed", "left out"),
        ("captions.jsonl, line 15", "malformed", "left out"),
        ("f.jpg", "duplicate", "left out"),
        ("alone.jpg", "picture_without_captions", "left out"),
        ("a.jpg", "empty_caption", "caption left out"),
        ("e.jpg", "picture_without_captions", "left out"),
        ("g.jpg", "zero_bytes", "left out"),
        ("none.jpg", "captions_without_picture", "left out"),
    }


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_tables_give_annotations_and_rejects(tmp_path: Path, kind: str):
    root = tmp_path / "mine"
    for number in range(4):
        save_image(root / f"{number}.jpg", number)
    names, texts = ["0.jpg", "1.jpg", "0.jpg", "2.jpg", "3.jpg"], ["a, b", "line\ntwo", "again", "caf\u00e9", ""]
    kinds, tags = ["9", "10", "9", "10", "9"], ["Red|Big", "", "Blue", "Red", "Red"]
    table = tmp_path / f"t.{kind}"
    if kind == "parquet":
        arrays = {"file": names, "text": texts, "kind": [int(k) for k in kinds], "tags": tags}
        pq.write_table(pa.table(arrays), table)
    else:
        separator = "," if kind == "csv" else "\t"
        rows = [["file", "text", "kind", "tags"], *map(list, zip(names, texts, kinds, tags, strict=True))]
        text = "\r\n".join(separator.join(f'"{value}"' for value in row) for row in rows)
        extra = f'\r\n"1.jpg"{separator}"{"x" * 200_000}"{separator}9{separator}\r\n3.jpg{separator}short\r\n'
        table.write_bytes((text + extra).encode().replace("\u00e9".encode(), b"\xe9"))
    columns = Columns("file", "text", "tags", "kind")
    with Listing() as listing:
        options = FolderOptions(val=0, test=0)
        list_folder(str(root), listing, options, table=str(table), columns=columns)
        assert listing.classes == {0: "9", 1: "10"}
        dataset = make_set(listing, tmp_path / "set")
    train = dataset.split("train")
    captions = {key: train.captions(i) for i, key in enumerate(train.keys)}
    attributes = {key: train.attributes(i) for i, key in enumerate(train.keys)}
    assert attributes["0"] == ["Red", "Big", "Blue"] and captions["0"] == ["a, b", "again"]
    assert captions["1"] == ["line two"]
    reasons = {(name, reason) for name, reason, _ in read_rejects(tmp_path / "set")}
    assert ("3.jpg", "picture_without_captions") in reasons
    if kind != "parquet":
        assert ("2.jpg", "invalid_utf8") in reasons
        assert sum(reason == "malformed" for _, reason in reasons) == 2
    wrong = Columns("file", "text", class_name="label")
    message = r"no column 'label' .--class-column.; columns: 'file', 'text'"
    with pytest.raises(ValueError, match=message), Listing() as listing:
        list_folder(str(root), listing, options, table=str(table), columns=wrong)


def test_invalid_tables_are_refused(tmp_path: Path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "y.csv").write_bytes(b"")
    pq.write_table(pa.table({"image": [b"\xff\xd8"], "caption": ["x"]}), tmp_path / "z.parquet")
    for name, message in (
        ("x.parquet", "not a readable parquet"),
        ("y.csv", "is empty"),
        ("z.parquet", "column 'image' has type binary; it must hold strings"),
        ("w.xlsx", "allowed are .csv, .tsv and .parquet"),
        ("gone.csv", "no such file"),
    ):
        with pytest.raises(ValueError, match=message), Listing() as listing:
            list_folder(str(tmp_path), listing, FolderOptions(), table=str(tmp_path / name))


def test_text_files_give_captions_and_shares_give_splits(tmp_path: Path):
    root = tmp_path / "mine"
    for number in range(300):
        save_image(root / f"{number % 7}" / f"{number}.png", number % 5, (8, 8))
        (root / f"{number % 7}" / f"{number}.txt").write_text(f"\ufeffa thing {number}\n\nsecond line\n", "utf-8")
    (root / "lonely.txt").write_text("no picture")
    save_image(root / "silent.jpg")
    with Listing() as listing:
        list_folder(str(root), listing, FolderOptions(val=0.1, test=0.2))
        sizes = listing.splits()
        dataset = make_set(listing, tmp_path / "set")
    assert 12 <= sizes["val"] <= 50 and 35 <= sizes["test"] <= 90 and sum(sizes.values()) == 301
    assert sorted(dataset.split("test").captions(0))[1] == "second line"
    reasons = read_rejects(tmp_path / "set")
    assert reasons.count(("lonely.txt", "captions_without_picture", "left out")) == 1
    assert reasons.count(("silent.jpg", "picture_without_captions", "left out")) == 1
    assert sum(reason == "empty_caption" for _, reason, _ in reasons) == 300
    with pytest.raises(ValueError, match="no images found"), Listing() as listing:
        list_folder(str(tmp_path / "nothing"), listing, FolderOptions())
    with pytest.raises(ValueError, match="shares must be at least 0, with a sum below 1"):
        FolderOptions(val=0.5, test=0.5)


def test_split_by_class_keeps_classes_whole(tmp_path: Path):
    rows = []
    for number in range(120):
        save_image(tmp_path / f"{number}.jpg", 0, (8, 8))
        rows.append({"image": f"{number}.jpg", "caption": "x", "class": number % 20})
    write_jsonl(tmp_path / "captions.jsonl", list(rows))
    with Listing() as listing:
        list_folder(str(tmp_path), listing, FolderOptions(val=0, test=0.3, by_class=True))
        classes = {split: {source.class_id for source in listing.images(split)} for split in listing.splits()}
        assert not classes["train"] & classes["test"] and 2 <= len(classes["test"]) <= 12
        assert listing.classes[10] == "10"
