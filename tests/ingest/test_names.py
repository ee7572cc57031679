"""Names of images in annotations, as people write them."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from t2idist import storage
from t2idist.ingest.listing import Listing
from t2idist.ingest.names import NameResolver, UnusableName
from t2idist.ingest.rejects import Reason
from tests.helpers.image_files import save_image


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    for name in ("a.jpg", "sub/b.JPG", "two.jpg", "two.png", "v1.2.jpg", "v1.jpg", "bare.jpg", "back\\slash.jpg"):
        save_image(folder / name)
    save_image(folder / unicodedata.normalize("NFD", "\u00fcber.jpg"))
    (folder / "noext").write_bytes((folder / "a.jpg").read_bytes())
    save_image(folder / "noext.jpg")
    return folder


def resolver(root: Path | str, listing: Listing) -> NameResolver:
    names = NameResolver(str(root), listing)
    names.add_files()
    return names


CASES = {
    "plain": ("sub/b.JPG", "sub/b.JPG"),
    "dot and doubled slash": (".//sub//b.JPG", "sub/b.JPG"),
    "backslash": ("sub\\b.JPG", "sub/b.JPG"),
    "backslash and dot": (".\\sub\\b.JPG", "sub/b.JPG"),
    "backslash in the file's own name": ("back\\slash.jpg", "back\\slash.jpg"),
    "absolute": ("{root}/sub/b.JPG", "sub/b.JPG"),
    "absolute, not there": ("{root}/none.jpg", "none.jpg"),
    "absolute, of another machine": ("/home/me/data/mine/sub/b.JPG", "sub/b.JPG"),
    "absolute, of Windows": ("C:\\Users\\me\\mine\\sub\\b.JPG", "sub/b.JPG"),
    "from above the folder": ("mine/a.jpg", "a.jpg"),
    "without extension": ("a", "a.jpg"),
    "without extension, absolute": ("{root}/sub/b", "sub/b.JPG"),
    "with a dot, without extension": ("v1.2", "v1.2.jpg"),
    "beginning of a longer name": ("v1", "v1.jpg"),
    "file without extension": ("noext", "noext"),
    "composed letter": ("\u00fcber.jpg", "u\u0308ber.jpg"),
    "missing": ("none.jpg", "none.jpg"),
    "missing, with backslash": ("sub\\none.jpg", "sub/none.jpg"),
}


@pytest.mark.parametrize(("name", "expected"), CASES.values(), ids=CASES.keys())
def test_names_lead_to_their_file(root: Path, name: str, expected: str):
    with Listing() as listing:
        assert resolver(root, listing).resolve(name.format(root=root)) == expected


@pytest.mark.parametrize(
    ("name", "reason"),
    [("/etc/passwd", Reason.UNSAFE_NAME), ("../a.jpg", Reason.UNSAFE_NAME), ("..\\a.jpg", Reason.UNSAFE_NAME),
     ("{root}/../x.jpg", Reason.UNSAFE_NAME), ("mine/../../x.jpg", Reason.UNSAFE_NAME),
     ("https://x/mine/../a.jpg", Reason.UNSAFE_NAME), ("", Reason.UNSAFE_NAME),
     ("two", Reason.NO_IMAGE), ("caf\udce9.jpg", Reason.INVALID_UTF8)],
)  # fmt: skip
def test_names_that_are_unsafe_or_fit_several_files_are_refused(root: Path, name: str, reason: Reason):
    with Listing() as listing, pytest.raises(UnusableName) as error:
        resolver(root, listing).resolve(name.format(root=root))
    assert error.value.reason is reason
    if name == "two":
        assert error.value.detail == "several images fit: two.jpg, two.png"


def test_a_relative_folder_and_a_link_to_it_are_the_same_folder(root: Path, monkeypatch: pytest.MonkeyPatch):
    (root.parent / "link").symlink_to(root)
    monkeypatch.chdir(root.parent)
    for folder in ("mine", "./mine/", "link"):
        with Listing() as listing:
            assert resolver(folder, listing).resolve(f"{root}/sub/b.JPG") == "sub/b.JPG"


def test_what_was_matched_is_counted(root: Path):
    with Listing() as listing:
        names = resolver(root, listing)
        for name in ("a.jpg", "sub\\b.JPG", "a", "bare", f"{root}/a.jpg"):
            names.resolve(name)
        assert names.notes() == [
            "image names matched by adding the extension: 2",
            "image names matched by reading backslashes as slashes: 1",
            "image names matched by removing the folder from the path: 1",
        ]


def test_names_in_a_store_lead_to_their_file():
    for name in ("a.jpg", "sub/b.jpg"):
        storage.write_bytes(f"memory://bucket/names/{name}", b"image")
    with Listing() as listing:
        names = resolver("memory://bucket/names/", listing)
        for name in ("sub/b.jpg", "sub\\b.jpg", "sub/b", "memory://bucket/names/sub/b.jpg", "/home/me/names/sub/b.jpg"):
            assert names.resolve(name) == "sub/b.jpg"
        with pytest.raises(UnusableName):
            names.resolve("memory://bucket/other/b.jpg")
