"""Captions in text files beside the images."""

from __future__ import annotations

from pathlib import Path

import pytest

from t2idist import storage
from t2idist.ingest.caption_files import check_extension
from t2idist.ingest.folder import FolderOptions, list_folder
from t2idist.ingest.listing import Listing
from tests.helpers.image_files import make_set, read_rejects, save_image

ALL_TRAIN = FolderOptions(val=0, test=0)


def write_images(root: Path, extension: str, count: int = 4) -> None:
    for number in range(count):
        save_image(root / f"{number}.jpg", number)
        (root / f"{number}{extension}").write_text(f"thing number {number}")


def captions(root: Path, out: Path, options: FolderOptions = ALL_TRAIN) -> dict[str, list[str]]:
    with Listing() as listing:
        list_folder(str(root), listing, options)
        train = make_set(listing, out).split("train")
    return {key: train.captions(number) for number, key in enumerate(train.keys)}


@pytest.mark.parametrize("extension", [".txt", ".TXT", ".Txt", ".caption", ".CAPTION", ".jpg.txt", ".jpg.caption"])
def test_usual_extensions_are_recognised(tmp_path: Path, extension: str):
    write_images(tmp_path / "mine", extension)
    found = captions(tmp_path / "mine", tmp_path / "set")
    assert found == {str(number): [f"thing number {number}"] for number in range(4)}
    assert not read_rejects(tmp_path / "set")


@pytest.mark.parametrize("option", [".xyz", "xyz", ".XYZ"])
def test_the_option_names_any_other_extension(tmp_path: Path, option: str):
    write_images(tmp_path / "mine", ".xyz")
    (tmp_path / "mine" / "0.txt").write_text("not this")
    (tmp_path / "mine" / "captions.jsonl").write_text("not this")
    found = captions(tmp_path / "mine", tmp_path / "set", FolderOptions(0, 0, caption_extension=option))
    assert found["0"] == ["thing number 0"] and len(found) == 4


def test_the_first_of_two_files_counts_and_the_other_is_named(tmp_path: Path):
    write_images(tmp_path, ".caption")
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text("tags")
    with Listing() as listing:
        list_folder(str(tmp_path), listing, ALL_TRAIN)
        urls = {image.key: Path(image.text_url or "").name for image in listing.images("train")}
        assert urls == {"0": "0.txt", "1": "1.txt", "2": "2.caption", "3": "3.caption"}
        (note,) = listing.notes
        assert note == (
            "2 files end in .caption beside captions in another file and were not read: "
            "--caption-extension .caption reads those"
        )
        assert not list(listing.rejects())


def test_two_files_of_one_ending_are_told_apart(tmp_path: Path):
    write_images(tmp_path, ".txt")
    (tmp_path / "0.jpg.txt").write_text("tags")
    with Listing() as listing:
        list_folder(str(tmp_path), listing, ALL_TRAIN)
        assert listing.notes == [
            "1 file ends in .jpg.txt beside captions in another file and was not read: "
            "--caption-extension .jpg.txt reads those"
        ]
    with Listing() as listing:
        list_folder(str(tmp_path), listing, FolderOptions(0, 0, caption_extension=".jpg.txt"))
        texts = [image.text_url for image in listing.images("train") if image.text_url is not None]
        assert [Path(text).name for text in texts] == ["0.jpg.txt"]


def test_an_ending_that_is_read_already_is_not_offered(tmp_path: Path):
    write_images(tmp_path, ".txt")
    (tmp_path / "0.TXT").write_text("tags")
    with Listing() as listing:
        list_folder(str(tmp_path), listing, ALL_TRAIN)
        (note,) = listing.notes
        assert "1 file ends in .TXT" in note or "1 file ends in .txt" in note
        assert "was not read: an image has one caption file" in note


def test_metadata_without_names_is_answered_with_the_way_to_name_them(tmp_path: Path):
    write_images(tmp_path, ".no")
    for name in ("metadata.jsonl", "notes.jsonl"):
        (tmp_path / name).write_text('{"picture": "0.jpg", "text": "thing"}\n')
    with Listing() as listing:
        list_folder(str(tmp_path), listing, ALL_TRAIN)
        (note,) = listing.notes
        assert "metadata.jsonl may hold the captions: --image-column NAME, if NAME instead of 'file_name' holds" in note
        assert f"notes.jsonl may hold the captions: --captions {tmp_path}/notes.jsonl" in note


def test_a_stray_text_file_of_another_kind_is_no_problem(tmp_path: Path):
    write_images(tmp_path, ".txt")
    (tmp_path / "README.TXT").write_text("about")
    (tmp_path / "lonely.txt").write_text("no image")
    with Listing() as listing:
        list_folder(str(tmp_path), listing, ALL_TRAIN)
        assert [reject.name for reject in listing.rejects()] == ["lonely.txt"] and not listing.notes


def test_a_message_names_what_lies_there_and_the_option(tmp_path: Path):
    write_images(tmp_path / "mine", ".tags", 5)
    write_images(tmp_path / "mine" / "sub", ".json", 5)
    (tmp_path / "mine" / "labels.csv").write_text("file,text\n")
    with Listing() as listing:
        list_folder(str(tmp_path / "mine"), listing, ALL_TRAIN)
        (note,) = listing.notes
        assert "10 of 10 images have no caption file" in note
        assert "5 files end in .tags: --caption-extension .tags" in note
        assert "5 files end in .json, which is not read: write captions.jsonl" in note
        assert f"labels.csv may hold the captions: --table {tmp_path}/mine/labels.csv" in note
        assert "--allow-no-captions" in note
        with pytest.raises(ValueError, match="no images are listed: picture_without_captions 10; the first: 0.jpg"):
            make_set(listing, tmp_path / "set")
    assert len(read_rejects(tmp_path / "set")) == 10


def test_captions_in_a_folder_of_their_own_are_named(tmp_path: Path):
    for number in range(3):
        save_image(tmp_path / "images" / f"{number}.jpg")
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{number}.txt").write_text("thing")
    with Listing() as listing:
        list_folder(str(tmp_path), listing, ALL_TRAIN)
        assert "3 files end in .txt, none of them beside an image of its name" in listing.notes[0]


def test_a_folder_without_images_names_its_files(tmp_path: Path):
    (tmp_path / "a.heic").write_bytes(b"x")
    (tmp_path / "b.HEIC").write_bytes(b"x")
    with pytest.raises(ValueError, match="no images found; files below it: 2 .heic"), Listing() as listing:
        list_folder(str(tmp_path), listing, ALL_TRAIN)


@pytest.mark.parametrize("extension", [".jpg", ".json", ".csv", "", ".", "a/b"])
def test_extensions_that_are_not_of_caption_files_are_refused(extension: str):
    with pytest.raises(ValueError, match="--caption-extension .*must be the end of the names of text files"):
        check_extension(extension)


def test_few_images_without_captions_are_no_note(tmp_path: Path):
    write_images(tmp_path, ".txt", 8)
    for number in range(3):
        (tmp_path / f"{number}.txt").unlink()
    (tmp_path / "sharding.log").write_text("unrelated")
    with Listing() as listing:
        list_folder(str(tmp_path), listing, ALL_TRAIN)
        assert not listing.notes


def test_a_store_is_read_as_a_disk_is():
    for name, data in {"a/1.jpg": b"image", "a/1.TXT": b"x", "a/2.jpg": b"image", "a/2.xyz": b"y"}.items():
        storage.write_bytes(f"memory://captions/{name}", data)
    for extension, expected in ((None, {"a/1.jpg": "1.TXT"}), (".xyz", {"a/2.jpg": "2.xyz"})):
        with Listing() as listing:
            list_folder("memory://captions", listing, FolderOptions(0, 0, caption_extension=extension))
            found = {image.name: image.text_url for image in listing.images("train") if image.text_url is not None}
        assert found == {name: f"memory://captions/a/{text}" for name, text in expected.items()}
