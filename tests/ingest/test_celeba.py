"""The reader for CelebA."""

from __future__ import annotations

from pathlib import Path

from t2idist.ingest.celeba import list_celeba
from t2idist.ingest.listing import Listing
from t2idist.ingest.rejects import Reason
from tests.helpers.image_files import make_set, read_rejects, save_image, write_jsonl


def test_celeba_attributes_captions_and_rejects(tmp_path: Path):
    for number in range(1, 7):
        save_image(tmp_path / "img_align_celeba" / f"00000{number}.jpg", number, (30, 40))
    rows = ["000001.jpg -1  1 -1", "000002.jpg  1  1 -1", "000003.jpg  1 -1", "000004.jpg -1 -1 -1", "../x.jpg 1 1 1"]
    (tmp_path / "list_attr_celeba.txt").write_text("\n".join(["6", "Bald Smiling Young ", *rows, "000005.jpg 1 1 1"]))
    partition = ["000001.jpg 0", "000002.jpg 1", "000003.jpg 0", "000004.jpg 2", "000004.jpg 1", "x 7", "../x.jpg 0"]
    (tmp_path / "list_eval_partition.txt").write_text("\n".join(partition))
    with Listing() as listing:
        list_celeba(str(tmp_path), listing)
        dataset = make_set(listing, tmp_path / "set")
    assert {name: split.keys for name, split in dataset.splits.items()} == {
        "test": ["000004"], "train": ["000001"], "val": ["000002"],
    }  # fmt: skip
    assert dataset.split("val").attributes(0) == ["Bald", "Smiling"] and dataset.split("test").attributes(0) == []
    assert {(name, reason) for name, reason, _ in read_rejects(tmp_path / "set")} == {
        ("000004.jpg", "duplicate"),
        ("list_eval_partition.txt, line 6", "malformed"),
        ("000003.jpg", "malformed"),
        ("../x.jpg", "unsafe_name"),
        ("000005.jpg", "no_split"),
        ("000006.jpg", "picture_without_captions"),
    }
    with Listing() as listing:
        write_jsonl(
            tmp_path / "c.jsonl", [{"image": "000001.jpg", "caption": "a face"}, {"image": "zz.jpg", "caption": "x"}]
        )
        list_celeba(str(tmp_path), listing, str(tmp_path / "c.jsonl"))
        assert [s.captions for s in listing.images("train")] == [("a face",)]
        assert ("zz.jpg", Reason.NO_IMAGE) in [(reject.name, reject.reason) for reject in listing.rejects()]
