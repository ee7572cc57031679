"""Splits that names of folders and files state."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from t2idist.ingest.splits import NamedSplits
from tests.helpers.image_files import read_rejects, save_image, write_jsonl
from tests.ingest.layout_sets import SMALL, captions, img2dataset_members, jpeg, shard, write_tar
from tools import shard_folder


@pytest.mark.parametrize(
    ("names", "counts"),
    [
        (["train/a.jpg", "validation/b.jpg", "test/c/d.jpg"], {"train": 1, "val": 1, "test": 1}),
        (["Training/a.jpg", "dev/b.jpg", "EVAL/c.jpg"], {"train": 1, "val": 1, "test": 1}),
        (["data/train/a.jpg", "data/test/b.jpg", "data/test/c.jpg"], {"train": 1, "test": 2}),
        (["train/a.jpg", "test/b.jpg", "extra/c.jpg", "d.jpg"], {"train": 1, "test": 1, "": 2}),
        (["test/a.jpg", "test/b.jpg"], {"test": 2}),
        (["train/a.jpg", "bus/b.jpg", "boat/c.jpg"], {}),  # a class
        (["a/train/b.jpg", "c/test/d.jpg"], {}),
        (["a.jpg", "train.jpg"], {}),
        ([], {}),
    ],
)
def test_folders_state_splits(names: list[str], counts: dict[str, int]) -> None:
    splits = NamedSplits(names)
    assert splits.counts == counts and bool(splits) == bool(counts)
    assert not NamedSplits(names, ignore=True)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("birds-validation_000001.tar", "val"),
        ("test/00000.tar", "test"),
        ("train/test-00000.tar", "train"),
        ("trainable-00000.tar", None),
        ("00000.tar", None),
    ],
)
def test_names_of_files_that_hold_images_state_splits(name: str, split: str | None) -> None:
    assert NamedSplits([name, "train/x.tar"], file_names=True).split(name) == split


def write_pairs(root: Path) -> None:
    for number in range(20):
        for folder in ("train", "test"):
            save_image(root / folder / f"{number}.jpg", number, (16, 16))
            (root / folder / f"{number}.txt").write_text(f"{folder} picture {number}")


def test_no_image_of_a_test_folder_is_in_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path / "mine")
    save_image(tmp_path / "mine" / "loose.jpg")
    (tmp_path / "mine" / "loose.txt").write_text("in no split")
    found = captions(shard(tmp_path / "mine", tmp_path / "set"))
    assert found == {split: {f"{split} picture {n}" for n in range(20)} for split in ("train", "test")}
    assert read_rejects(tmp_path / "set") == [("loose.jpg", "no_split", "left out")]
    printed = capsys.readouterr().out
    assert "layout: images with captions beside them" in printed
    assert "splits: from the folders: test 20, train 20 files; 1 files in none of them are left out" in printed
    mixed = captions(shard(tmp_path / "mine", tmp_path / "mixed", "--split-by-hash", "--test", "0.4"))
    assert any(caption.startswith("test") for caption in mixed["train"])


def test_captions_jsonl_and_tables_take_the_splits_of_folders(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    write_pairs(root)
    names = [f"{folder}/{number}.jpg" for folder in ("train", "test") for number in range(20)]
    rows: list[object] = [{"image": name, "caption": f"{name.split('/')[0]} picture"} for name in names]
    (tmp_path / "t.csv").write_text(
        "image,caption\n" + "".join(f"{name},{name.split('/')[0]} picture\n" for name in names)
    )
    expected = {"train": {"train picture"}, "test": {"test picture"}}
    assert captions(shard(root, tmp_path / "table", "--table", str(tmp_path / "t.csv"))) == expected
    write_jsonl(root / "captions.jsonl", rows)
    assert captions(shard(root, tmp_path / "lines")) == expected
    write_jsonl(root / "captions.jsonl", [{**row, "split": "val"} for row in rows if isinstance(row, dict)])
    assert set(captions(shard(root, tmp_path / "stated"))) == {"val"}


def test_val_and_test_are_taken_from_train_if_no_other_split_is_named(tmp_path: Path) -> None:
    for number in range(60):
        save_image(tmp_path / "mine" / "train" / f"{number}.jpg", number, (16, 16))
        (tmp_path / "mine" / "train" / f"{number}.txt").write_text("a picture")
    found = shard(tmp_path / "mine", tmp_path / "set", "--val", "0.2", "--test", "0.2")
    assert set(found.splits) == {"train", "val", "test"}


@pytest.mark.parametrize(
    ("named", "counts", "splits"),
    [
        (["00000.tar", "00001.tar", "val.tar"], {"train": 2, "val": 1}, ["train", "train", "val"]),
        (["00000.tar", "test/0.tar", "val/0.tar"], {"train": 1, "test": 1, "val": 1}, ["train", "test", "val"]),
        (["train-0.tar", "test-0.tar", "extra.tar"], {"train": 1, "test": 1, "": 1}, ["train", "test", None]),
    ],
)
def test_files_without_a_split_are_train_if_no_other_is(
    named: list[str], counts: dict[str, int], splits: list[str | None]
) -> None:
    found = NamedSplits(named, file_names=True)
    assert found.counts == counts and [found.split(name) for name in named] == splits and not found.only_train


def test_images_outside_the_folders_are_train_if_no_folder_is() -> None:
    splits = NamedSplits(["a.jpg", "test/b.jpg", "val/c.jpg"])
    assert splits.split("a.jpg") == "train" and splits.split("val/c.jpg") == "val"
    assert "those without a split in their name are train" in splits.describe()


def test_one_file_named_train_beside_others_is_no_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "mine" / "train-0.tar", img2dataset_members(0, 8))
    write_tar(tmp_path / "mine" / "extra.tar", img2dataset_members(8, 8))
    found = captions(shard(tmp_path / "mine", tmp_path / "set", "--val", "0.3", "--test", "0.3"))
    assert set().union(*found.values()) == {f"picture number {n}" for n in range(16)} and len(found) == 3
    assert "(the names of folders and files name only train)" in capsys.readouterr().out


STATED = ["validation", "Train", "TEST", "train", "own"]
EXPECTED = {"val": {"0"}, "train": {"1", "3"}, "test": {"2"}, "own": {"4"}}


def write_stated(root: Path, layout: str) -> list[str]:
    """Write five images whose annotations state their splits. Returns options."""
    rows: list[object] = [{"image": f"{n}.jpg", "caption": str(n), "split": split} for n, split in enumerate(STATED)]
    if layout == "parquet":
        root.mkdir()
        columns = {"image": [jpeg(n) for n in range(5)], "text": [str(n) for n in range(5)], "split": STATED}
        pq.write_table(pa.table(columns), root / "all.parquet")
        return []
    if layout == "tar":
        members = {f"{n}.jpg": jpeg(n) for n in range(5)}
        members |= {f"{n}.json": json.dumps(row).encode() for n, row in enumerate(rows)}
        write_tar(root / "0.tar", members)
        return []
    for number in range(5):
        save_image(root / f"{number}.jpg", number, (16, 16))
    if layout == "captions":
        write_jsonl(root / "captions.jsonl", rows)
    elif layout == "metadata":
        write_jsonl(
            root / "metadata.jsonl", [{**row, "file_name": row["image"]} for row in rows if isinstance(row, dict)]
        )
    elif layout == "csv":
        lines = ["image,caption,split", *(f"{n}.jpg,{n},{split}" for n, split in enumerate(STATED))]
        (root.parent / "t.csv").write_text("\n".join(lines))
        return ["--table", str(root.parent / "t.csv")]
    else:
        columns = {"image": [f"{n}.jpg" for n in range(5)], "caption": [str(n) for n in range(5)], "split": STATED}
        pq.write_table(pa.table(columns), root.parent / "t.parquet")
        return ["--table", str(root.parent / "t.parquet")]
    return []


@pytest.mark.parametrize("layout", ["captions", "metadata", "csv", "parquet table", "parquet", "tar"])
def test_the_field_split_states_splits_by_any_of_their_names_in_every_layout(
    tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = write_stated(tmp_path / "mine", layout)
    assert captions(shard(tmp_path / "mine", tmp_path / "set", *options)) == EXPECTED
    assert "splits: 5 as stated\n" in capsys.readouterr().out
    none = ["--val", "0", "--test", "0"]
    by_hash = captions(shard(tmp_path / "mine", tmp_path / "hashed", *options, *none, "--split-by-hash"))
    assert by_hash == {"train": {"0", "1", "2", "3", "4"}}
    assert "splits: by --val and --test (the names of folders and files are not used)" in capsys.readouterr().out


def test_the_sentence_counts_what_is_stated_and_what_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "mine"
    rows: list[object] = []
    for number in range(5):
        save_image(root / f"{number}.jpg", number, (16, 16))
        rows.append({"image": f"{number}.jpg", "caption": "x", "split": "train" if number == 0 else None})
    write_jsonl(root / "captions.jsonl", rows)
    shard(root, tmp_path / "set", "--val", "0", "--test", "0")
    assert "splits: 1 as stated, 4 by hash\n" in capsys.readouterr().out


def test_a_field_split_of_another_kind_is_no_split_unless_it_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {"image": [jpeg(n) for n in range(3)], "text": ["x", "y", "z"], "split": [0, 1, 2]}
    pq.write_table(pa.table(columns), tmp_path / "mine.parquet")
    found = shard(tmp_path / "mine.parquet", tmp_path / "set", "--val", "0", "--test", "0")
    assert captions(found) == {"train": {"x", "y", "z"}}
    arguments = ["--folder", str(tmp_path / "mine.parquet"), "--out", str(tmp_path / "named"), *SMALL]
    assert shard_folder.main([*arguments, "--split-column", "split"]) == 2
    assert "'split' must be a string" in capsys.readouterr().err
