"""The reader for COCO."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from t2idist.ingest.coco import find_splits, list_coco, parse_split
from t2idist.ingest.listing import Listing
from tests.helpers.image_files import make_set, read_rejects, save_image


def write_coco(root: Path) -> None:
    for number in range(6):
        save_image(root / "train2014" / f"COCO_{number}.jpg", number)
    for number in (10, 11):
        save_image(root / "images" / "test2014" / f"t{number}.jpg", number)
    images = [{"id": n, "file_name": f"COCO_{n}.jpg"} for n in range(5)]
    images += [{"id": 3, "file_name": "COCO_3b.jpg"}, {"id": 7, "file_name": "gone.jpg"}, {"id": 8}]
    images += [{"id": 9, "file_name": "../x.jpg"}]
    annotations: list[object] = [{"id": 10 * n, "image_id": n, "caption": f"a bird number {n}"} for n in range(4)]
    annotations += [{"id": 5, "image_id": 0, "caption": " "}, {"id": 6, "image_id": 99, "caption": "nobody"}]
    annotations += [{"id": 10, "image_id": 2, "caption": "twice"}, {"id": 7, "image_id": 7, "caption": "gone"}, "x"]
    (root / "annotations").mkdir()
    whole = {"licenses": [{"name": "CC BY"}], "images": images, "annotations": annotations}
    (root / "annotations" / "captions_train2014.json").write_text(json.dumps(whole))
    test = {"images": [{"id": n, "file_name": f"t{n}.jpg"} for n in (10, 11)]}
    (root / "annotations" / "image_info_test2014.json").write_text(json.dumps(test))


def test_coco_images_captions_and_rejects(tmp_path: Path):
    write_coco(tmp_path / "coco")
    with Listing() as listing:
        list_coco(find_splits(str(tmp_path / "coco"), ["train", "test2014"]), listing)
        assert listing.licence == "CC BY"
        dataset = make_set(listing, tmp_path / "set")
    train, test = dataset.split("train"), dataset.split("test")
    assert {key: train.captions(i) for i, key in enumerate(train.keys)} == {
        f"COCO_{n}": [f"a bird number {n}"] for n in range(4)
    }
    assert sorted(test.keys) == ["t10", "t11"] and test.captions(0) == []
    assert sorted((name, reason) for name, reason, _ in read_rejects(tmp_path / "set")) == [
        ("../x.jpg", "unsafe_name"),
        ("COCO_0.jpg", "empty_caption"),
        ("COCO_3b.jpg", "duplicate"),
        ("COCO_4.jpg", "picture_without_captions"),
        ("COCO_5.jpg", "picture_without_captions"),
        ("captions_train2014.json", "captions_without_picture"),
        ("captions_train2014.json, annotations[6]", "duplicate"),
        ("captions_train2014.json, annotations[8]", "malformed"),
        ("captions_train2014.json, images[7]", "malformed"),
        ("gone.jpg", "captions_without_picture"),
    ]


def test_find_splits_reports_missing_and_ambiguous_splits(tmp_path: Path):
    write_coco(tmp_path)
    assert [split.name for split in find_splits(str(tmp_path))] == ["train"]
    with pytest.raises(ValueError, match="--splits val: not among .*test2014, train2014"):
        find_splits(str(tmp_path), ["val"])
    (tmp_path / "annotations" / "captions_train2017.json").write_text("{}")
    (tmp_path / "train2017").mkdir()
    (of_2014,) = find_splits(str(tmp_path))  # what the papers train on and score
    assert of_2014.annotations_url.endswith("captions_train2014.json")
    for year in ("2015", "2017"):
        (tmp_path / "annotations" / f"captions_val{year}.json").write_text("{}")
        (tmp_path / f"val{year}").mkdir()
    (tmp_path / "annotations" / "captions_mine.json").write_text("{}")
    (tmp_path / "mine").mkdir()
    notes: list[str] = []
    assert [split.name for split in find_splits(str(tmp_path), notes=notes)] == ["mine", "train"]
    assert notes == ["year 2014 of 2014, 2015, 2017; --splits names others"]
    with pytest.raises(ValueError, match="more than one year for split val.*--splits val2017"):
        find_splits(str(tmp_path), ["val"])
    assert [split.name for split in find_splits(str(tmp_path), ["train2014"])] == ["train"]
    assert parse_split("val=s3://b/i,s3://b/a.json").images_url == "s3://b/i"
    with pytest.raises(ValueError, match="NAME=IMAGES_URL,ANNOTATIONS_URL"):
        parse_split("val")
    with pytest.raises(ValueError, match="no list of images"), Listing() as listing:
        list_coco([parse_split(f"x={tmp_path},{tmp_path}/annotations/captions_train2017.json")], listing)
