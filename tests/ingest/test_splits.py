"""Splits that names of folders and files state."""

from __future__ import annotations

from pathlib import Path

import pytest

from t2idist.ingest.splits import NamedSplits
from tests.helpers.image_files import read_rejects, save_image, write_jsonl
from tests.ingest.layout_sets import captions, shard


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
