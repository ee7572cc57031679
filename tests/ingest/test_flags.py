"""Values that say whether an attribute is present."""

from __future__ import annotations

from pathlib import Path

import pytest

from t2idist.ingest.flags import is_present
from t2idist.ingest.folder import FolderOptions, list_folder
from t2idist.ingest.listing import Listing
from t2idist.ingest.rejects import Reason
from tests.helpers.image_files import save_image, write_jsonl


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
