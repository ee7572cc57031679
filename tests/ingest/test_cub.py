"""The reader for CUB-200-2011, and names from pickles."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from t2idist.ingest.cub import list_cub, read_names
from t2idist.ingest.image import ImageOptions
from t2idist.ingest.listing import Listing
from tests.helpers.image_files import make_set, read_rejects, save_image


def write_cub(root: Path) -> Path:
    birds = root / "CUB_200_2011"
    names = ["001.Crow/a.jpg", "001.Crow/b.jpg", "002.Jay bird/c.jpg", "002.Jay bird/d.jpg", "002.Jay bird/e.jpg"]
    for number, name in enumerate(names):
        save_image(birds / "images" / name, number, (64, 48))
        text = root / "text" / name.replace(".jpg", ".txt")
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_bytes(f"a bird {number}\nsecond\n".encode() + (b"caf\xe9\n" if number == 1 else b""))
    numbered = list(enumerate(names, start=1))
    (birds / "images.txt").write_text("".join(f"{n} {name}\n" for n, name in numbered))
    (birds / "image_class_labels.txt").write_text("".join(f"{n} {int(name[:3])}\n" for n, name in numbered))
    (birds / "classes.txt").write_text("1 001.Crow\n2 002.Jay bird\n")
    (birds / "bounding_boxes.txt").write_text("".join(f"{n} 5.0 5.0 20.0 10.0\n" for n, _ in numbered[:4]))
    for split, split_names in (("train", names[:2]), ("test", names[2:])):
        (root / split).mkdir()
        data = pickle.dumps([name.removesuffix(".jpg") for name in split_names], protocol=2)
        (root / split / "filenames.pickle").write_bytes(data)
    return root


def test_cub_classes_captions_crops_and_rejects(tmp_path: Path):
    root = write_cub(tmp_path / "birds")
    (root / "text" / "001.Crow" / "zz.txt").write_text("nobody")
    with Listing() as listing:
        list_cub(str(root), listing)
        dataset = make_set(listing, tmp_path / "set", image=ImageOptions(size=0))
    train, test = dataset.split("train"), dataset.split("test")
    assert sorted(key.rsplit("-", 1)[0] for key in train.keys) == ["001-Crow-a", "001-Crow-b"]
    assert len(test) == 2 and set(test.class_ids.tolist()) == {2} and set(train.class_ids.tolist()) == {1}
    assert sorted(train.captions(0) + train.captions(1)) == ["a bird 0", "a bird 1", "second", "second"]
    assert {split.image_size(0) for split in (train, test)} == {(30, 25)}
    assert set(read_rejects(tmp_path / "set")) == {
        ("002.Jay bird/e.jpg", "bad_box", "left out"),
        ("001.Crow/zz.txt", "captions_without_picture", "left out"),
        ("001.Crow/b.jpg", "invalid_utf8", "caption left out"),
    }


def test_cub_splits_by_test_classes_or_by_text_lists(tmp_path: Path):
    root = write_cub(tmp_path)
    (root / "tests.txt").write_text("001.Crow\n")
    with Listing() as listing:
        list_cub(str(root), listing, test_classes_url=str(root / "tests.txt"), crop=False)
        assert listing.splits() == {"test": 2, "train": 3}
        assert next(listing.images("train")).box is None
    (root / "tests.txt").write_text("001.Raven\n")
    with pytest.raises(ValueError, match="tests.txt, line 1: '001.Raven' is not a class"), Listing() as listing:
        list_cub(str(root), listing, test_classes_url=str(root / "tests.txt"))
    for split in ("train", "test"):
        names = read_names(str(root / split / "filenames.pickle"))
        (root / split / "filenames.pickle").unlink()
        (root / f"{split}.txt").write_text("\n".join(names))
    with Listing() as listing:
        list_cub(str(root), listing, crop=False)
        assert listing.splits() == {"test": 3, "train": 2}


class RunsCode:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return (Path.touch, (Path("pickle-ran"),))  # type: ignore[return-value]


@pytest.mark.parametrize("protocol", range(6))
def test_read_names_reads_pickles_without_running_code(tmp_path: Path, protocol: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names = ["001.Crow/a", "b", "001.Crow/a", "caf\u00e9"] + [str(n) for n in range(2000)]
    file = tmp_path / "names.pickle"
    file.write_bytes(pickle.dumps(names, protocol=protocol))
    assert read_names(str(file)) == names
    for hostile in ([RunsCode()], {"a": 1}, [["a"], 1], "text"):
        file.write_bytes(pickle.dumps(hostile, protocol=protocol))
        with pytest.raises(ValueError, match="names.pickle: holds more than a list of names"):
            read_names(str(file))
    assert not (tmp_path / "pickle-ran").exists()
    for cut in (b"", b"garbage", pickle.dumps(names, protocol=protocol)[:-3]):
        file.write_bytes(cut)
        with pytest.raises(ValueError, match="not a pickled list of names|holds more"):
            read_names(str(file))
