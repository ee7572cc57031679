"""Values that say whether an attribute is present."""

from __future__ import annotations

from pathlib import Path

import pytest

from t2idist.ingest.flags import is_present, parse_attributes
from t2idist.ingest.folder import FolderOptions, list_folder
from t2idist.ingest.listing import Listing
from t2idist.ingest.rejects import Reason
from tests.helpers.image_files import save_image, write_jsonl
from tools import shard_folder


@pytest.mark.parametrize("value", [1, True, 1.0, "1", "1.0", "true", "TRUE", " yes "])
def test_values_that_mean_present(value: object):
    assert is_present("Smiling", value)


@pytest.mark.parametrize("value", [0, False, -1, 0.0, "0", "-1", "-1.0", "False", "no"])
def test_values_that_mean_absent(value: object):
    assert not is_present("Smiling", value)


@pytest.mark.parametrize("value", [2, "", "maybe", None, float("nan"), [1], "10"])
def test_other_values_are_refused(value: object):
    with pytest.raises(ValueError, match="attribute 'Smiling' is .*; allowed are 1, 0, -1, true, false, yes and no"):
        is_present("Smiling", value)


def test_text_values_in_captions_jsonl_count_and_others_are_malformed_by_line(tmp_path: Path):
    rows: list[object] = []
    for name, attributes in (
        ("a.jpg", {"Smiling": "1", "Bald": "yes", "Young": "true", "Male": "no"}),
        ("b.jpg", {"Smiling": "maybe"}),
        ("c.jpg", {"Smiling": None}),
    ):
        save_image(tmp_path / name)
        rows.append({"image": name, "caption": "a face", "attributes": attributes})
    write_jsonl(tmp_path / "captions.jsonl", rows)
    with Listing() as listing:
        list_folder(str(tmp_path), listing, FolderOptions(val=0, test=0))
        assert [image.attributes for image in listing.images("train")] == [("Smiling", "Bald", "Young")]
        malformed = {r.name: r.detail for r in listing.rejects() if r.reason is Reason.MALFORMED}
    assert set(malformed) == {"captions.jsonl, line 2", "captions.jsonl, line 3"}
    assert "attribute 'Smiling' is 'maybe'" in malformed["captions.jsonl, line 2"]


def test_attributes_that_no_image_has_are_said_at_sharding(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows: list[object] = []
    for number in range(8):
        save_image(tmp_path / "in" / f"{number}.jpg", seed=number)
        rows.append({"image": f"{number}.jpg", "caption": f"face {number}", "attributes": {"Bald": "0", "Young": 1}})
    write_jsonl(tmp_path / "in" / "captions.jsonl", rows)
    arguments = ["--folder", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--val", "0", "--test", "0"]
    assert shard_folder.main([*arguments, "--processes", "1"]) == 0
    said = capsys.readouterr().err
    assert "warning: no image has the attribute Bald" in said
    assert "warning: split train: all of its 8 images have Young" in said


def test_a_mapping_of_flags_or_a_list_of_names():
    seen: dict[str, bool] = {}
    assert parse_attributes({"a": "yes", "b": -1}, "tags", seen) == ["a"] and seen == {"a": True, "b": False}
    assert parse_attributes({"a": 0, "b": "true"}, "tags", seen) == ["b"] and seen == {"a": True, "b": True}
    assert parse_attributes(["c"], "tags", seen) == ["c"]
    assert parse_attributes(" c, d;e |,f", "tags", seen) == ["c", "d", "e", "f"]
    assert parse_attributes(None, "tags", seen) == [] and parse_attributes(["", None, "c"], "tags", seen) == ["c"]
    for value in (7, [1], 0.5):
        with pytest.raises(ValueError, match="'tags' must be a list of names, or an object"):
            parse_attributes(value, "tags", seen)
