"""Own pictures: what goes wrong with them, and the layouts they come in."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from t2idist.data.reader import Encoded
from t2idist.data.sample_format import KEY_PATTERN
from t2idist.data.shards import Dataset
from t2idist.data.transforms import decode
from t2idist.ingest.captions import clean
from t2idist.ingest.celeba import list_celeba
from t2idist.ingest.coco import find_splits, list_coco, parse_split
from t2idist.ingest.cub import list_cub, read_names
from t2idist.ingest.files import is_unsafe, lines, walk
from t2idist.ingest.folder import FolderOptions, list_folder
from t2idist.ingest.image import PictureOptions, Unusable, prepare, square_around
from t2idist.ingest.listing import Listing, hashed_key, make_key
from t2idist.ingest.rejects import Reason
from t2idist.ingest.tables import Columns
from t2idist.ingest.writer import IngestOptions, write_set


def encoded(image: Image.Image, of_format: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, of_format, **options)
    return out.getvalue()


def picture(width: int = 60, height: int = 40, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth colours that differ by seed."""
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def save(path: Path, seed: int = 0, size: tuple[int, int] = (60, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(picture(*size, seed=seed)))


def jsonl(path: Path, rows: list[object]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def made(listing: Listing, out: Path, **options: object) -> Dataset:
    settings: dict = {"min_count": 1, **options}
    write_set(listing, str(out), IngestOptions(**settings), source="test", licence="none", processes=1)
    return Dataset.open(str(out))


def rejected(out: Path) -> list[tuple[str, str, str]]:
    rows = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    return [(row["name"], row["reason"], row["effect"]) for row in rows]


# ------------------------------------------------------------------------------------------------ pictures
def with_orientation(number: int) -> bytes:
    image = picture(60, 40)
    exif = Image.Exif()
    exif[0x0112] = number
    return encoded(image, exif=exif)


def sixteen_bits() -> Image.Image:
    return Image.fromarray((np.arange(40 * 60, dtype=np.uint16) * 27).reshape(40, 60))


GOOD = encoded(picture())
REPAIRED: list[tuple[str, Callable[[], bytes], set[Reason]]] = [
    ("grey", lambda: encoded(picture(mode="L")), {Reason.GREY}),
    ("cmyk", lambda: encoded(picture(mode="CMYK")), {Reason.CMYK}),
    ("16 bit", lambda: encoded(sixteen_bits(), "PNG"), {Reason.SIXTEEN_BIT, Reason.GREY}),
    ("16 bit tiff", lambda: encoded(sixteen_bits(), "TIFF"), {Reason.SIXTEEN_BIT, Reason.GREY}),
    ("palette", lambda: encoded(picture(mode="P"), "PNG"), {Reason.PALETTE}),
    ("gif", lambda: encoded(picture(mode="P"), "GIF"), {Reason.PALETTE}),
    ("alpha", lambda: encoded(picture(mode="RGBA"), "PNG"), {Reason.ALPHA}),
    ("grey alpha", lambda: encoded(picture(mode="LA"), "PNG"), {Reason.GREY, Reason.ALPHA}),
    ("lab", lambda: encoded(picture().convert("YCbCr"), "TIFF"), {Reason.OTHER_COLOURS}),
    ("rotated", lambda: with_orientation(6), {Reason.EXIF_ROTATION}),
]
LEFT_OUT: list[tuple[str, Callable[[], bytes], Reason]] = [
    ("empty", lambda: b"", Reason.ZERO_BYTES),
    ("text", lambda: b"<html>not found</html>", Reason.NOT_A_PICTURE),
    ("cut jpeg", lambda: GOOD[: len(GOOD) // 2], Reason.TRUNCATED),
    ("cut png", lambda: encoded(picture(), "PNG")[:-60], Reason.TRUNCATED),
    ("rotten png", lambda: encoded(picture(), "PNG")[:60] + bytes(200), Reason.DAMAGED),
    ("bomb", lambda: encoded(Image.new("1", (10_000, 10_000)), "PNG"), Reason.TOO_MANY_PIXELS),
    ("big bomb", lambda: encoded(Image.new("1", (20_000, 20_000)), "PNG"), Reason.TOO_MANY_PIXELS),
]


@pytest.mark.parametrize(("make", "reasons"), [row[1:] for row in REPAIRED], ids=[row[0] for row in REPAIRED])
def test_odd_pictures_are_put_right_and_named(make: Callable[[], bytes], reasons: set[Reason]):
    for options in (PictureOptions(size=20), PictureOptions(keep_original=True)):
        done = prepare(make(), options)
        assert {reason for reason, _ in done.repairs} == reasons
        image = Image.open(io.BytesIO(done.data))
        assert image.mode == "RGB" and image.size == (done.width, done.height)
        assert image.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize(("make", "reason"), [row[1:] for row in LEFT_OUT], ids=[row[0] for row in LEFT_OUT])
def test_unusable_pictures_are_left_out_by_name(make: Callable[[], bytes], reason: Reason):
    with pytest.raises(Unusable) as caught:
        prepare(make(), PictureOptions())
    assert caught.value.reason is reason


def test_repairs_keep_what_is_seen():
    turned = np.asarray(Image.open(io.BytesIO(prepare(with_orientation(6), PictureOptions()).data)).convert("RGB"))
    straight = np.asarray(picture(60, 40))
    assert turned.shape == (60, 40, 3)
    assert np.abs(np.rot90(straight, -1).astype(int) - turned).mean() < 4  # orientation 6: turn clockwise to view
    red = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    seen = Image.open(io.BytesIO(prepare(encoded(red, "PNG"), PictureOptions()).data))
    assert seen.getpixel((4, 4)) == (255, 255, 255)
    deep = Image.open(io.BytesIO(prepare(encoded(sixteen_bits(), "PNG"), PictureOptions(keep_original=True)).data))
    expected = np.asarray(sixteen_bits()) >> 8
    assert np.array_equal(np.asarray(deep)[..., 1], expected)


def test_sizes_and_which_bytes_are_kept():
    def size(data: bytes, **options: object) -> tuple[int, int]:
        done = prepare(data, PictureOptions(**options))  # type: ignore[arg-type]
        return done.width, done.height

    large = encoded(picture(700, 467))
    assert size(large, size=304) == (455, 304)
    assert size(encoded(picture(467, 700)), size=304) == (304, 455)
    assert size(large, size=0) == (700, 467)
    assert size(encoded(picture(200, 100)), size=304) == (200, 100)  # never up
    huge = picture(2400, 1600)
    drafted = Image.open(io.BytesIO(prepare(encoded(huge, quality=95), PictureOptions(size=304)).data))
    exact = huge.resize((456, 304), Image.Resampling.BILINEAR)
    assert drafted.size == (456, 304)
    assert np.abs(np.asarray(drafted).astype(int) - np.asarray(exact)).mean() < 2
    small = encoded(picture(200, 100))
    assert prepare(small, PictureOptions(size=304)).data == small
    assert prepare(large, PictureOptions(size=304)).data != large
    for of_format in ("PNG", "WEBP"):
        data = encoded(picture(200, 100), of_format)
        assert prepare(data, PictureOptions(size=304)).extension == "jpg"
        assert prepare(data, PictureOptions(keep_original=True)).data == data
    assert prepare(encoded(picture(200, 100), "BMP"), PictureOptions(keep_original=True)).extension == "png"


def test_an_animation_gives_its_first_frame():
    frames = [picture(seed=seed) for seed in (1, 2)]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], duration=100, lossless=True)
    done = prepare(data, PictureOptions(keep_original=True))
    assert done.data != data and done.extension == "jpg"
    seen = np.asarray(Image.open(io.BytesIO(done.data))).astype(int)
    assert np.abs(seen - np.asarray(frames[0])).mean() < 4


@pytest.mark.parametrize(
    ("box", "size", "crop"),
    [
        ((60, 27, 325, 304), (500, 335), (0, 0, 465, 335)),
        ((139, 30, 153, 264), (300, 400), (17, 0, 300, 360)),
        ((5, 5, 20, 10), (64, 48), (0, 0, 30, 25)),
    ],
)
def test_crops_are_those_of_the_papers(
    box: tuple[float, float, float, float], size: tuple[int, int], crop: tuple[int, int, int, int]
):
    assert square_around(box, *size) == crop
    done = prepare(encoded(picture(*size)), PictureOptions(size=0), box)
    assert (done.width, done.height) == (crop[2] - crop[0], crop[3] - crop[1])
    with pytest.raises(Unusable, match="bad_box"):
        prepare(encoded(picture(*size)), PictureOptions(), (900, 900, 10, 10))


def test_any_damage_ends_in_a_reason():
    rng = np.random.default_rng(0)
    sources = [encoded(picture(), f) for f in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]
    unusable = 0
    for number in range(300):
        data = bytearray(sources[number % len(sources)])
        for place in rng.integers(0, len(data), 1 + number % 9):
            data[place] = rng.integers(256)
        try:
            done = prepare(bytes(data), PictureOptions(size=20, keep_original=number % 2 == 0))
            decode(Encoded(done.data, done.extension))  # what is stored, the reader can decode
        except Unusable:
            unusable += 1
    assert 30 < unusable < 270


# ------------------------------------------------------------------------------------------------ captions, keys, files
def test_captions_are_cleaned_and_counted():
    raw = ["  a red\n bird ", "", " \t", "\u9e1f", "x" * 10_001, b"caf\xe9", b"one two", "bad \udce9", "y" * 50_000]
    done = clean(raw, None)
    assert done.captions == ("a red bird", "one two")
    assert [reason for reason, _ in done.left_out] == [
        Reason.EMPTY_CAPTION, Reason.EMPTY_CAPTION, Reason.CAPTION_WITHOUT_WORDS, Reason.CAPTION_TOO_LONG,
        Reason.INVALID_UTF8, Reason.INVALID_UTF8, Reason.CAPTION_TOO_LONG,
    ]  # fmt: skip
    cut = clean(["one two, three four.", "one \u9e1f two three.", "one two."], 3)
    assert cut.captions == ("one two, three", "one \u9e1f two three.", "one two.") and cut.cut == 1


def test_keys_are_plain_and_tell_names_apart():
    assert make_key("a_b-1.jpg") == "a_b-1"
    names = ["a b.jpg", "a-b .jpg", "a/b.jpg", "b/a.jpg", "\u00e9.png", "x" * 100 + ".jpg", "a.b.jpg", "....jpg"]
    keys = [make_key(name) for name in names]
    assert len(set(keys)) == len(names)
    assert all(KEY_PATTERN.fullmatch(key) for key in keys)
    with Listing() as listing:
        for name in ("a.jpg", "a.png", "a.webp"):
            listing.add("train", name, f"/x/{name}")
        listing.add("val", "a.jpg", "/y/a.jpg")
        listing.add("val", "a.jpg", "/x/a.jpg")
        keys = [source.key for split in ("train", "val") for source in listing.sources(split)]
        assert len(set(keys)) == 4 and "a" in keys and hashed_key("a.png") in keys
        assert [reject.reason for reject in listing.rejects()] == [Reason.DUPLICATE]


@pytest.mark.parametrize(
    "name",
    ["../a.jpg", "a/../../b.jpg", "/etc/passwd", "\\\\host\\a.jpg", "C:\\a.jpg", "https://x/a.jpg", "file:/etc/x", "",
     "pipe:cat x", "a\0.jpg", "a\n.jpg"],
)  # fmt: skip
def test_names_that_leave_the_folder_are_unsafe(name: str):
    assert is_unsafe(name)


def test_usual_names_are_safe():
    assert not any(map(is_unsafe, ["a.jpg", "b/c d.jpg", "..a.jpg", "a..b/x.png", "\u00e9.jpg"]))


def test_lines_of_any_length_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("t2idist.ingest.files.MAX_LINE_BYTES", 40)
    for block in (1, 7, 1000):
        monkeypatch.setattr("t2idist.ingest.files._BLOCK_BYTES", block)
        (tmp_path / "x").write_bytes(b"\xef\xbb\xbfone\r\n\n" + b"y" * 95 + b"\nlast")
        found = [line for _, line in lines(str(tmp_path / "x"))]
        assert found == [b"one\r\n", b"\n", b"y" * 40 + b"\0\n", b"last"]
    with pytest.raises(ValueError, match="no such file"):
        list(lines(str(tmp_path / "nothing")))


def test_walk_is_sorted_and_passes_over_hidden_names(tmp_path: Path):
    for name in ("b/z.jpg", "a.jpg", "b/.x.jpg", ".git/y.jpg", "c.txt", "b/c/d.png"):
        save(tmp_path / name)
    assert list(walk(str(tmp_path))) == ["a.jpg", "c.txt", "b/z.jpg", "b/c/d.png"]


# ------------------------------------------------------------------------------------------------ layouts
def coco(root: Path) -> None:
    for number in range(6):
        save(root / "train2014" / f"COCO_{number}.jpg", number)
    for number in (10, 11):
        save(root / "images" / "test2014" / f"t{number}.jpg", number)
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


def test_coco(tmp_path: Path):
    coco(tmp_path / "coco")
    with Listing() as listing:
        list_coco(find_splits(str(tmp_path / "coco"), ["train", "test2014"]), listing)
        assert listing.licence == "CC BY"
        dataset = made(listing, tmp_path / "set")
    train, test = dataset.split("train"), dataset.split("test")
    assert {key: train.captions(i) for i, key in enumerate(train.keys)} == {
        f"COCO_{n}": [f"a bird number {n}"] for n in range(4)
    }
    assert sorted(test.keys) == ["t10", "t11"] and test.captions(0) == []
    assert sorted((name, reason) for name, reason, _ in rejected(tmp_path / "set")) == [
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


def test_coco_splits_are_found_or_named(tmp_path: Path):
    coco(tmp_path)
    assert [split.name for split in find_splits(str(tmp_path))] == ["train"]
    with pytest.raises(ValueError, match="--splits val: not among .*test2014, train2014"):
        find_splits(str(tmp_path), ["val"])
    (tmp_path / "annotations" / "captions_train2017.json").write_text("{}")
    (tmp_path / "train2017").mkdir()
    with pytest.raises(ValueError, match="more than one year for split train.*--splits train2017"):
        find_splits(str(tmp_path))
    assert [split.name for split in find_splits(str(tmp_path), ["train2014"])] == ["train"]
    assert parse_split("val=s3://b/i,s3://b/a.json").images_url == "s3://b/i"
    with pytest.raises(ValueError, match="NAME=IMAGES_URL,ANNOTATIONS_URL"):
        parse_split("val")
    with pytest.raises(ValueError, match="no list of images"), Listing() as listing:
        list_coco([parse_split(f"x={tmp_path},{tmp_path}/annotations/captions_train2017.json")], listing)


def test_celeba(tmp_path: Path):
    for number in range(1, 7):
        save(tmp_path / "img_align_celeba" / f"00000{number}.jpg", number, (30, 40))
    rows = ["000001.jpg -1  1 -1", "000002.jpg  1  1 -1", "000003.jpg  1 -1", "000004.jpg -1 -1 -1", "../x.jpg 1 1 1"]
    (tmp_path / "list_attr_celeba.txt").write_text("\n".join(["6", "Bald Smiling Young ", *rows, "000005.jpg 1 1 1"]))
    partition = ["000001.jpg 0", "000002.jpg 1", "000003.jpg 0", "000004.jpg 2", "000004.jpg 1", "x 7", "../x.jpg 0"]
    (tmp_path / "list_eval_partition.txt").write_text("\n".join(partition))
    with Listing() as listing:
        list_celeba(str(tmp_path), listing)
        dataset = made(listing, tmp_path / "set")
    assert {name: split.keys for name, split in dataset.splits.items()} == {
        "test": ["000004"], "train": ["000001"], "val": ["000002"],
    }  # fmt: skip
    assert dataset.split("val").attributes(0) == ["Bald", "Smiling"] and dataset.split("test").attributes(0) == []
    assert {(name, reason) for name, reason, _ in rejected(tmp_path / "set")} == {
        ("000004.jpg", "duplicate"),
        ("list_eval_partition.txt, line 6", "malformed"),
        ("000003.jpg", "malformed"),
        ("../x.jpg", "unsafe_name"),
        ("000005.jpg", "no_split"),
        ("000006.jpg", "picture_without_captions"),
    }
    with Listing() as listing:
        jsonl(tmp_path / "c.jsonl", [{"image": "000001.jpg", "caption": "a face"}, {"image": "zz.jpg", "caption": "x"}])
        list_celeba(str(tmp_path), listing, str(tmp_path / "c.jsonl"))
        assert [s.captions for s in listing.sources("train")] == [("a face",)]
        assert ("zz.jpg", Reason.NO_PICTURE) in [(reject.name, reject.reason) for reject in listing.rejects()]


def cub(root: Path) -> Path:
    birds = root / "CUB_200_2011"
    names = ["001.Crow/a.jpg", "001.Crow/b.jpg", "002.Jay bird/c.jpg", "002.Jay bird/d.jpg", "002.Jay bird/e.jpg"]
    for number, name in enumerate(names):
        save(birds / "images" / name, number, (64, 48))
        text = root / "text" / name.replace(".jpg", ".txt")
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_bytes(f"a bird {number}\nsecond\n".encode() + (b"caf\xe9\n" if number == 1 else b""))
    numbered = list(enumerate(names, start=1))
    (birds / "images.txt").write_text("".join(f"{n} {name}\n" for n, name in numbered))
    (birds / "image_class_labels.txt").write_text("".join(f"{n} {int(name[:3])}\n" for n, name in numbered))
    (birds / "classes.txt").write_text("1 001.Crow\n2 002.Jay bird\n")
    (birds / "bounding_boxes.txt").write_text("".join(f"{n} 5.0 5.0 20.0 10.0\n" for n, _ in numbered[:4]))
    for split, of_split in (("train", names[:2]), ("test", names[2:])):
        (root / split).mkdir()
        data = pickle.dumps([name.removesuffix(".jpg") for name in of_split], protocol=2)
        (root / split / "filenames.pickle").write_bytes(data)
    return root


def test_cub(tmp_path: Path):
    root = cub(tmp_path / "birds")
    (root / "text" / "001.Crow" / "zz.txt").write_text("nobody")
    with Listing() as listing:
        list_cub(str(root), listing)
        dataset = made(listing, tmp_path / "set", picture=PictureOptions(size=0))
    train, test = dataset.split("train"), dataset.split("test")
    assert sorted(key.rsplit("-", 1)[0] for key in train.keys) == ["001-Crow-a", "001-Crow-b"]
    assert len(test) == 2 and set(test.class_ids.tolist()) == {2} and set(train.class_ids.tolist()) == {1}
    assert sorted(train.captions(0) + train.captions(1)) == ["a bird 0", "a bird 1", "second", "second"]
    assert {split.picture_size(0) for split in (train, test)} == {(30, 25)}
    assert set(rejected(tmp_path / "set")) == {
        ("002.Jay bird/e.jpg", "bad_box", "left out"),
        ("001.Crow/zz.txt", "captions_without_picture", "left out"),
        ("001.Crow/b.jpg", "invalid_utf8", "caption left out"),
    }


def test_cub_by_test_classes_and_text_lists(tmp_path: Path):
    root = cub(tmp_path)
    (root / "tests.txt").write_text("001.Crow\n")
    with Listing() as listing:
        list_cub(str(root), listing, test_classes_url=str(root / "tests.txt"), crop=False)
        assert listing.splits() == {"test": 2, "train": 3}
        assert next(listing.sources("train")).box is None
    (root / "tests.txt").write_text("001.Raven\n")
    with pytest.raises(ValueError, match="tests.txt, line 1: '001.Raven' is no class"), Listing() as listing:
        list_cub(str(root), listing, test_classes_url=str(root / "tests.txt"))
    for split in ("train", "test"):
        names = read_names(str(root / split / "filenames.pickle"))
        (root / split / "filenames.pickle").unlink()
        (root / f"{split}.txt").write_text("\n".join(names))
    with Listing() as listing:
        list_cub(str(root), listing, crop=False)
        assert listing.splits() == {"test": 3, "train": 2}


class _Runs:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return (Path.touch, (Path("pickle-ran"),))  # type: ignore[return-value]


@pytest.mark.parametrize("protocol", range(6))
def test_pickled_names_are_read_and_nothing_runs(tmp_path: Path, protocol: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names = ["001.Crow/a", "b", "001.Crow/a", "caf\u00e9"] + [str(n) for n in range(2000)]
    file = tmp_path / "names.pickle"
    file.write_bytes(pickle.dumps(names, protocol=protocol))
    assert read_names(str(file)) == names
    for hostile in ([_Runs()], {"a": 1}, [["a"], 1], "text"):
        file.write_bytes(pickle.dumps(hostile, protocol=protocol))
        with pytest.raises(ValueError, match="names.pickle: holds more than a list of names"):
            read_names(str(file))
    assert not (tmp_path / "pickle-ran").exists()
    for cut in (b"", b"garbage", pickle.dumps(names, protocol=protocol)[:-3]):
        file.write_bytes(cut)
        with pytest.raises(ValueError, match="not a pickled list of names|holds more"):
            read_names(str(file))


def test_own_pictures_by_jsonl(tmp_path: Path):
    root = tmp_path / "mine"
    for name in ("a.jpg", "b c.jpg", "sub/d.jpg", "e.jpg", "alone.jpg", "f.jpg", "g.jpg"):
        save(root / name)
    (root / "g.jpg").write_bytes(b"")
    rows: list[object] = [
        {"image": "a.jpg", "caption": "one bird", "class": "jay", "split": "train", "attributes": ["Red"]},
        {"image": "./a.jpg", "captions": ["two birds", ""], "attributes": {"Small": True, "Big": False}},
        {"image": "b c.jpg", "caption": "three", "class": "crow", "split": "test"},
        {"image": "sub/d.jpg", "caption": "four", "split": "train"},
        {"image": "e.jpg", "split": "train"},
        {"image": "f.jpg", "caption": "x", "split": "train"},
        {"image": "f.jpg", "caption": "x", "split": "test"},
        {"image": "g.jpg", "caption": "empty file", "split": "test"},
        {"image": "none.jpg", "caption": "no file", "split": "test"},
        {"image": "../a.jpg", "caption": "up"},
        {"image": "https://example.com/a.jpg", "caption": "far"},
        {"caption": "no image"},
    ]
    jsonl(root / "captions.jsonl", rows)
    with open(root / "captions.jsonl", "ab") as file:
        file.write(b'{"image": "a.jpg", "caption": "caf\xe9"}\n{broken\n' + b"[" * 100_000 + b"\n")
    with Listing() as listing:
        list_folder(str(root), listing, FolderOptions())
        assert listing.classes == {0: "crow", 1: "jay"}
        dataset = made(listing, tmp_path / "set")
    train = dataset.split("train")
    a = train.keys.index("a")
    assert train.captions(a) == ["one bird", "two birds"] and train.attributes(a) == ["Red", "Small"]
    assert int(train.class_ids[a]) == 1 and sorted(train.keys)[1].startswith("sub-d-")
    assert set(rejected(tmp_path / "set")) == {
        ("../a.jpg", "unsafe_name", "left out"),
        ("https://example.com/a.jpg", "unsafe_name", "left out"),
        ("captions.jsonl, line 12", "malformed", "left out"),
        ("captions.jsonl, line 13", "invalid_utf8", "left out"),
        ("captions.jsonl, line 14", "malformed", "left out"),
        ("captions.jsonl, line 15", "malformed", "left out"),
        ("f.jpg", "duplicate", "left out"),
        ("alone.jpg", "picture_without_captions", "left out"),
        ("a.jpg", "empty_caption", "caption left out"),
        ("e.jpg", "picture_without_captions", "left out"),
        ("g.jpg", "zero_bytes", "left out"),
        ("none.jpg", "captions_without_picture", "left out"),
    }


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_own_pictures_by_table(tmp_path: Path, kind: str):
    root = tmp_path / "mine"
    for number in range(4):
        save(root / f"{number}.jpg", number)
    names, texts = ["0.jpg", "1.jpg", "0.jpg", "2.jpg", "3.jpg"], ["a, b", "line\ntwo", "again", "caf\u00e9", ""]
    kinds, tags = ["9", "10", "9", "10", "9"], ["Red|Big", "", "Blue", "Red", "Red"]
    table = tmp_path / f"t.{kind}"
    if kind == "parquet":
        columns = {"file": names, "text": texts, "kind": [int(k) for k in kinds], "tags": tags}
        pq.write_table(pa.table(columns), table)
    else:
        separator = "," if kind == "csv" else "\t"
        rows = [["file", "text", "kind", "tags"], *map(list, zip(names, texts, kinds, tags, strict=True))]
        text = "\r\n".join(separator.join(f'"{value}"' for value in row) for row in rows)
        extra = f'\r\n"1.jpg"{separator}"{"x" * 200_000}"{separator}9{separator}\r\n3.jpg{separator}short\r\n'
        table.write_bytes((text + extra).encode().replace("\u00e9".encode(), b"\xe9"))
    columns_of = Columns("file", "text", "tags", "kind")
    with Listing() as listing:
        options = FolderOptions(val=0, test=0)
        list_folder(str(root), listing, options, table=str(table), columns=columns_of)
        assert listing.classes == {0: "9", 1: "10"}
        dataset = made(listing, tmp_path / "set")
    train = dataset.split("train")
    captions = {key: train.captions(i) for i, key in enumerate(train.keys)}
    attributes = {key: train.attributes(i) for i, key in enumerate(train.keys)}
    assert attributes["0"] == ["Red", "Big", "Blue"] and captions["0"] == ["a, b", "again"]
    assert captions["1"] == ["line two"]
    reasons = {(name, reason) for name, reason, _ in rejected(tmp_path / "set")}
    assert ("3.jpg", "picture_without_captions") in reasons
    if kind != "parquet":
        assert ("2.jpg", "invalid_utf8") in reasons
        assert sum(reason == "malformed" for _, reason in reasons) == 2
    wrong = Columns("file", "text", class_name="label")
    says = r"no column 'label' .--class-column.; there are 'file', 'text'"
    with pytest.raises(ValueError, match=says), Listing() as listing:
        list_folder(str(root), listing, options, table=str(table), columns=wrong)


def test_tables_that_are_none_give_a_sentence(tmp_path: Path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "y.csv").write_bytes(b"")
    pq.write_table(pa.table({"image": [b"\xff\xd8"], "caption": ["x"]}), tmp_path / "z.parquet")
    for name, says in (
        ("x.parquet", "not a readable parquet"),
        ("y.csv", "is empty"),
        ("z.parquet", "column 'image' holds binary; it must hold texts"),
        ("w.xlsx", "allowed are .csv, .tsv and .parquet"),
        ("gone.csv", "no such file"),
    ):
        with pytest.raises(ValueError, match=says), Listing() as listing:
            list_folder(str(tmp_path), listing, FolderOptions(), table=str(tmp_path / name))


def test_own_pictures_by_text_files_and_by_share(tmp_path: Path):
    root = tmp_path / "mine"
    for number in range(300):
        save(root / f"{number % 7}" / f"{number}.png", number % 5, (8, 8))
        (root / f"{number % 7}" / f"{number}.txt").write_text(f"\ufeffa thing {number}\n\nsecond line\n", "utf-8")
    (root / "lonely.txt").write_text("no picture")
    save(root / "silent.jpg")
    with Listing() as listing:
        list_folder(str(root), listing, FolderOptions(val=0.1, test=0.2))
        sizes = listing.splits()
        dataset = made(listing, tmp_path / "set")
    assert 12 <= sizes["val"] <= 50 and 35 <= sizes["test"] <= 90 and sum(sizes.values()) == 301
    assert sorted(dataset.split("test").captions(0))[1] == "second line"
    reasons = rejected(tmp_path / "set")
    assert reasons.count(("lonely.txt", "captions_without_picture", "left out")) == 1
    assert reasons.count(("silent.jpg", "picture_without_captions", "left out")) == 1
    assert sum(reason == "empty_caption" for _, reason, _ in reasons) == 300
    with pytest.raises(ValueError, match="no picture there"), Listing() as listing:
        list_folder(str(tmp_path / "nothing"), listing, FolderOptions())
    with pytest.raises(ValueError, match="leave some to train on"):
        FolderOptions(val=0.5, test=0.5)


def test_whole_classes_are_held_out(tmp_path: Path):
    rows = []
    for number in range(120):
        save(tmp_path / f"{number}.jpg", 0, (8, 8))
        rows.append({"image": f"{number}.jpg", "caption": "x", "class": number % 20})
    jsonl(tmp_path / "captions.jsonl", list(rows))
    with Listing() as listing:
        list_folder(str(tmp_path), listing, FolderOptions(val=0, test=0.3, by_class=True))
        classes = {split: {source.class_id for source in listing.sources(split)} for split in listing.splits()}
        assert not classes["train"] & classes["test"] and 2 <= len(classes["test"]) <= 12
        assert listing.classes[10] == "10"
