"""The reader for CelebA."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from t2idist.data.shards import Dataset
from t2idist.ingest.attribute_captions import captions_from_attributes
from t2idist.ingest.celeba import list_celeba
from t2idist.ingest.listing import Listing
from t2idist.ingest.rejects import Reason
from tests.helpers.image_files import make_set, read_rejects, save_image, write_jsonl
from tools import shard_celeba


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


def write_kaggle(root: Path, delimiter: str = ",", end: str = "\n") -> None:
    for number in range(1, 6):
        save_image(root / "img_align_celeba" / "img_align_celeba" / f"00000{number}.jpg", number, (30, 40))
    attributes = ["image_id,Bald,Smiling", "000001.jpg,-1,1", "000002.jpg,1,1", "000003.jpg,1,maybe", "000004.jpg,0,1"]
    partition = ["image_id,partition", *(f"00000{number}.jpg,{number % 3}" for number in range(1, 6))]
    for name, lines in (("list_attr_celeba.csv", attributes), ("list_eval_partition.csv", partition)):
        (root / name).write_bytes(end.join(lines).replace(",", delimiter).encode())


@pytest.mark.parametrize(("delimiter", "end"), [(",", "\n"), (",", "\r\n"), (";", "\r")])
def test_celeba_as_kaggle_has_it(tmp_path: Path, delimiter: str, end: str):
    write_kaggle(tmp_path, delimiter, end)
    with Listing() as listing:
        list_celeba(str(tmp_path), listing)
        images = {image.key: (split, image.attributes) for split in listing.splits() for image in listing.images(split)}
        rejects = {(reject.name, reject.reason): reject.detail for reject in listing.rejects()}
    assert images == {
        "000001": ("val", ("Smiling",)), "000002": ("test", ("Bald", "Smiling")), "000004": ("val", ("Smiling",)),
    }  # fmt: skip
    assert rejects == {
        ("000003.jpg", Reason.MALFORMED): "list_attr_celeba.csv, line 4: expected a name and 2 values, each 1 or -1",
        ("000005.jpg", Reason.NO_CAPTIONS): "no annotation for this image",
    }


def test_the_tool_shards_celeba_as_kaggle_has_it(tmp_path: Path):
    write_kaggle(tmp_path / "celeba")
    arguments = ["--celeba", str(tmp_path / "celeba"), "--out", str(tmp_path / "set"), "--processes", "1"]
    assert shard_celeba.main([*arguments, "--size", "16"]) == 0
    assert Dataset.open(str(tmp_path / "set")).split("val").attributes(0) == ["Smiling"]


def test_the_authors_lists_count_if_both_are_there(tmp_path: Path):
    write_kaggle(tmp_path)
    (tmp_path / "list_attr_celeba.txt").write_text("1\nYoung\n000001.jpg 1")
    with Listing() as listing:
        list_celeba(str(tmp_path), listing)
        assert [image.attributes for image in listing.images("val")] == [("Young",)]


def test_what_is_missing_and_what_is_there_is_named(tmp_path: Path):
    write_kaggle(tmp_path)
    (tmp_path / "list_eval_partition.csv").rename(tmp_path / "partition.csv")
    message = "list_eval_partition.txt or .csv was not found; tried .*; .* holds img_align_celeba, list_attr_celeba.csv"
    with pytest.raises(ValueError, match=message), Listing() as listing:
        list_celeba(str(tmp_path), listing)
    (tmp_path / "partition.csv").rename(tmp_path / "list_eval_partition.csv")
    (tmp_path / "list_attr_celeba.csv").write_text("000001.jpg,1,-1\n")
    with pytest.raises(ValueError, match="the first line must be image_id and the names"), Listing() as listing:
        list_celeba(str(tmp_path), listing)
    message = "the folder img_align_celeba was not found.*is empty or missing"
    with pytest.raises(ValueError, match=message), Listing() as listing:
        list_celeba(str(tmp_path / "nowhere"), listing)


def test_the_lossless_edition_of_the_authors(tmp_path: Path):
    write_kaggle(tmp_path)
    folder = tmp_path / "Img" / "img_align_celeba_png"
    folder.parent.mkdir()
    (tmp_path / "img_align_celeba" / "img_align_celeba").rename(folder)
    (tmp_path / "img_align_celeba").rmdir()
    for path in folder.iterdir():
        path.rename(path.with_suffix(".png"))
    with Listing() as listing:
        list_celeba(str(tmp_path), listing)
        assert sorted(Path(image.url).name for image in listing.images("val")) == ["000001.png", "000004.png"]
        assert [reject.name for reject in listing.rejects()] == ["000003.jpg", "000005.png"]


CELEBA_NAMES = [
    "5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips", "Big_Nose",
    "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin", "Eyeglasses",
    "Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache",
    "Narrow_Eyes", "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks",
    "Sideburns", "Smiling", "Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat", "Wearing_Lipstick",
    "Wearing_Necklace", "Wearing_Necktie", "Young",
]  # fmt: skip


def test_captions_say_what_is_present_and_nothing_else():
    present = {"Young", "Male", "Black_Hair", "Wavy_Hair", "Eyeglasses", "Smiling"}
    captions = captions_from_attributes("000001.jpg", CELEBA_NAMES, present)
    assert captions == captions_from_attributes("000001.jpg", CELEBA_NAMES, present)
    assert captions != captions_from_attributes("000002.jpg", CELEBA_NAMES, present)
    words = {word for caption in captions for word in caption.split()}
    assert all("young man" in caption and "wavy black hair" in caption for caption in captions)
    grammar = {"a", "the", "has", "with", "and", "wears", "wearing"}
    assert words <= grammar | {"smiling", "young", "man", "wavy", "black", "hair", "glasses"}
    assert {"glasses", "smiling"} <= words


def test_each_attribute_of_celeba_but_two_is_said_in_some_caption():
    nothing = {caption for key in range(40) for caption in captions_from_attributes(str(key), CELEBA_NAMES, ())}
    for name in CELEBA_NAMES:
        present = {name, "Male"} if name == "No_Beard" else {name}
        said = {caption for key in range(40) for caption in captions_from_attributes(str(key), CELEBA_NAMES, present)}
        assert (said == nothing) == (name in ("Attractive", "Blurry")), name
        assert not any("_" in caption for caption in said)


def test_captions_do_not_contradict_themselves():
    captions = [
        caption for key in range(40) for caption in captions_from_attributes(str(key), CELEBA_NAMES, CELEBA_NAMES)
    ]
    assert not any(re.search(r"\bhair\b|no beard", caption) for caption in captions)
    assert any("bald" in caption for caption in captions) and any("goatee" in caption for caption in captions)
    hair = {"Straight_Hair", "Wavy_Hair", "Brown_Hair"}
    assert all("straight brown hair" in caption for caption in captions_from_attributes("x", CELEBA_NAMES, hair))
    assert "no beard" in " ".join(
        caption for key in range(40) for caption in captions_from_attributes(str(key), ("No_Beard",), {"No_Beard"})
    )


def test_other_attributes_are_said_as_they_are_named():
    captions = captions_from_attributes("x", ("Red_Hat",), {"Red_Hat"})
    assert {"a person", "a person with red hat"} >= {
        caption.replace("the", "a", 1) for caption in captions if "has" not in caption
    }
    assert captions_from_attributes("x", (), ()) == ("a person",) * 5


def test_the_tool_makes_captions_from_attributes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_kaggle(tmp_path / "celeba")
    arguments = [
        "--celeba",
        str(tmp_path / "celeba"),
        "--out",
        str(tmp_path / "set"),
        "--processes",
        "1",
        "--size",
        "16",
    ]
    assert shard_celeba.main([*arguments, "--captions-from-attributes"]) == 0
    dataset = Dataset.open(str(tmp_path / "set"))
    assert set(dataset.split("val").captions(0)) <= {"a person", "a smiling person"}
    with pytest.raises(SystemExit):
        shard_celeba.main([*arguments, "--captions-from-attributes", "--captions", "c.jsonl"])
    assert "not allowed with argument" in capsys.readouterr().err
