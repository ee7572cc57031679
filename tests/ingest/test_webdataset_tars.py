"""The reader for webdataset tars."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest

from tests.helpers.image_files import read_rejects
from tests.ingest.layout_sets import (
    SMALL,
    captions,
    contents,
    img2dataset_members,
    jpeg,
    shard,
    write_parquet,
    write_tar,
)
from tools import shard_folder

ALL = ("--val", "0", "--test", "0")


def one_tar(tmp_path: Path, members: dict[str, bytes], *options: str, name: str = "00000.tar") -> dict[str, set[str]]:
    write_tar(tmp_path / "mine" / name, members)
    return captions(shard(tmp_path / "mine", tmp_path / "set", *ALL, *options))


def test_tars_of_img2dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "mine"
    for number in range(3):
        write_tar(root / f"{number:05d}.tar", img2dataset_members(20 * number, 20))
        write_parquet(root / f"{number:05d}.parquet", 0, 1)  # img2dataset puts tables and statistics beside the tars
        (root / f"{number:05d}_stats.json").write_text("{}")
    found = captions(shard(root, tmp_path / "set", *ALL))
    assert found == {"train": {f"picture number {n}" for n in range(60)}}
    assert "layout: webdataset (00000.tar, 00001.tar, 00002.tar)" in capsys.readouterr().out
    assert read_rejects(tmp_path / "set") == []


def test_the_bytes_are_those_of_the_members_and_do_not_depend_on_the_processes(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    write_tar(root / "train-0.tar", img2dataset_members(0, 20))
    write_tar(root / "test-0.tar", img2dataset_members(0, 10))
    found = shard(root, tmp_path / "one", "--keep-original")
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 20, "test": 10}
    stored = contents(tmp_path / "one")
    train = found.split("train")
    for index in range(20):
        number = int(train.captions(index)[0].rsplit(" ", 1)[1])
        start, size = int(train.offsets[index]), int(train.lengths[index])
        assert jpeg(number) in stored["train-00000.tar"][start : start + size]
    shard(root, tmp_path / "three", "--keep-original", "--processes", "3")
    assert contents(tmp_path / "three") == stored


@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_compressed_tars_give_the_same_images(tmp_path: Path, mode: str) -> None:
    write_tar(tmp_path / "mine" / ("a.tar.gz" if mode == "w:gz" else "a.tar"), img2dataset_members(0, 10), mode)
    write_tar(tmp_path / "mine" / "b.tgz", img2dataset_members(10, 5), "w:gz")
    found = captions(shard(tmp_path / "mine", tmp_path / "set", *ALL))
    assert found == {"train": {f"picture number {n}" for n in range(15)}}


def test_missing_members_are_listed(tmp_path: Path) -> None:
    members = {
        "a.jpg": jpeg(0), "a.txt": b"one\ntwo\n",
        "b.jpg": jpeg(1),
        "c.txt": b"no image", "c.json": b"{}",
        "d.json": b'{"caption": "from json"}', "d.JPG": jpeg(2),
        "e.jpg": jpeg(3)[:-90], "e.txt": b"cut",
        "f.jpg": b"", "f.txt": b"nothing",
        "g.jpg": jpeg(4), "g.json": b"{broken", "g.npy": b"\0\1",
    }  # fmt: skip
    assert one_tar(tmp_path, members) == {"train": {"one", "two", "from json"}}
    assert set(read_rejects(tmp_path / "set")) == {
        ("00000.tar/b.jpg", "picture_without_captions", "left out"),
        ("00000.tar/c.txt", "captions_without_picture", "left out"),
        ("00000.tar/e.jpg", "truncated", "left out"),
        ("00000.tar/f.jpg", "zero_bytes", "left out"),
        ("00000.tar/g.json", "malformed", "left out"),
        ("00000.tar/g.jpg", "picture_without_captions", "left out"),
    }


def test_names_with_several_dots_folders_and_any_order(tmp_path: Path) -> None:
    members = {
        "x/photo.v1.jpg": jpeg(0), "x/photo.v2.jpg": jpeg(1), "x/photo.v1.txt": b"first", "x/photo.v2.txt": b"second",
        "y/photo.v1.txt": b"third", "./z/1.jpg": jpeg(3),
        "0001.jpg": jpeg(4), "0001.caption.txt": b"fourth", "0001.mask.png": jpeg(5),
        "y/photo.v1.jpg": jpeg(2), "z/1.txt": b"fifth",
        "two.jpg": jpeg(6), "two.jpg.json": b'{"captions": ["sixth"]}',
    }  # fmt: skip
    found = one_tar(tmp_path, members)
    assert found == {"train": {"first", "second", "third", "fourth", "fifth", "sixth"}}
    assert read_rejects(tmp_path / "set") == [("00000.tar/0001.mask.png", "picture_without_captions", "left out")]


@pytest.mark.parametrize("name", ["a.tar", "a.tgz"])
def test_members_without_extension_are_read_by_their_content(tmp_path: Path, name: str) -> None:
    write_tar(
        tmp_path / "mine" / name,
        {
            "0001": jpeg(0),
            "0001.txt": b"first",
            "0002.jpg": jpeg(1),
            "0002": b"second",
            "0003": b"\0\0",
            "LICENSE": b"",
        },
        "w:gz" if name == "a.tgz" else "w",
    )
    assert captions(shard(tmp_path / "mine", tmp_path / "set", *ALL)) == {"train": {"first", "second"}}
    assert read_rejects(tmp_path / "set") == []


def test_fields_of_json_and_classes(tmp_path: Path) -> None:
    members = {
        "1.jpg": jpeg(0), "1.json": json.dumps({"alt": "one", "tags": ["Red"], "kind": 4, "part": "test"}).encode(),
        "2.jpg": jpeg(1), "2.json": json.dumps({"alt": "two", "tags": [], "kind": 3, "part": "test"}).encode(),
        "3.jpg": jpeg(2), "3.txt": b"three", "3.cls": b"7\n",
    }  # fmt: skip
    write_tar(tmp_path / "mine" / "0.tar", members)
    options = [
        "--caption-column",
        "alt",
        "--attributes-column",
        "tags",
        "--class-column",
        "kind",
        "--split-column",
        "part",
    ]
    found = shard(tmp_path / "mine", tmp_path / "set", *ALL, *options)
    test = found.split("test")
    one = next(index for index in range(2) if test.captions(index) == ["one"])
    assert test.attributes(one) == ["Red"] and int(test.class_ids[one]) == 1
    assert captions(found) == {"test": {"one", "two"}, "train": {"three"}}
    assert int(found.split("train").class_ids[0]) == 2


def test_the_fields_are_named_if_none_holds_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "mine" / "0.tar", {"1.jpg": jpeg(0), "1.json": b'{"alt": "x", "url": "y"}'})
    assert shard_folder.main(["--folder", str(tmp_path / "mine"), "--out", str(tmp_path / "set"), *SMALL]) == 2
    error = capsys.readouterr().err
    assert "no field 'text' or 'caption' or 'captions'" in error and "fields: 'alt', 'url'" in error


def test_links_and_unsafe_names_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "mine" / "0.tar"
    write_tar(path, [("a.jpg", jpeg(0)), ("a.txt", b"fine"), ("../b.jpg", jpeg(1)), ("/c.jpg", jpeg(2))])
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("d.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("caf\udce9.txt"))
    assert captions(shard(tmp_path / "mine", tmp_path / "set", *ALL)) == {"train": {"fine"}}
    assert {(name, reason) for name, reason, _ in read_rejects(tmp_path / "set")} == {
        ("0.tar/../b.jpg", "unsafe_name"), ("0.tar//c.jpg", "unsafe_name"), ("0.tar/d.jpg", "unsafe_name"),
        ("0.tar/caf\\udce9.txt", "captions_without_picture"),
    }  # fmt: skip


def test_damaged_tars_are_listed_and_what_comes_before_is_used(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    root.mkdir()
    whole = io.BytesIO()
    write_tar(root / "whole.tar", img2dataset_members(0, 4))
    data = (root / "whole.tar").read_bytes()
    header = next(at for at in range(0, len(data), 512) if data[at:].startswith(b"000000002.jpg"))
    (root / "cut.tar").write_bytes(data[: header + 512 + 100])
    (root / "damaged.tar").write_bytes(data[:header] + b"\xff" * 512 + data[header + 512 :])
    (root / "nothing.tar").write_bytes(b"")
    (root / "other.tar").write_bytes(b"<html>" * 200)
    (root / "cut.tgz").write_bytes(gzip.compress(data)[:-200])
    found = shard(root, tmp_path / "set", *ALL)
    assert whole.getvalue() == b"" and {len(split) for split in found.splits.values()} == {4 + 2 + 2 + 3}
    reasons = read_rejects(tmp_path / "set")
    for name in ("cut.tar", "damaged.tar", "nothing.tar", "other.tar", "cut.tgz"):
        assert (name, "truncated", "left out") in reasons
    assert ("cut.tar/000000002.jpg", "captions_without_picture", "left out") not in reasons


def test_equal_keys_in_several_tars_are_different_images(tmp_path: Path) -> None:
    for number in range(4):
        write_tar(tmp_path / "mine" / f"{number}.tar", {"0.jpg": jpeg(number), "0.txt": f"tar {number}".encode()})
    found = shard(tmp_path / "mine", tmp_path / "set", *ALL)
    assert captions(found) == {"train": {f"tar {n}" for n in range(4)}} and len(set(found.split("train").keys)) == 4


def test_shards_of_this_package_are_read_with_captions_and_attributes(tmp_path: Path) -> None:
    members = {"1.jpg": jpeg(0), "1.json": b'{"attributes": ["Red"], "captions": ["one", "two"], "class_id": null}'}
    write_tar(tmp_path / "mine" / "train-00000.tar", members)
    found = shard(tmp_path / "mine", tmp_path / "set", *ALL).split("train")
    assert found.captions(0) == ["one", "two"] and found.attributes(0) == ["Red"]


def test_only_names_between_underscores_are_those_of_webdataset(tmp_path: Path) -> None:
    members = {"__1.jpg": jpeg(0), "__1.txt": b"one", "__key__": b"x", "__meta__": jpeg(1)}
    assert one_tar(tmp_path, members) == {"train": {"one"}}
    assert read_rejects(tmp_path / "set") == []


def test_an_empty_class_is_none(tmp_path: Path) -> None:
    members = {"1.jpg": jpeg(0), "1.txt": b"one", "1.cls": b"\n", "2.jpg": jpeg(1), "2.txt": b"two", "2.cls": b"jay"}
    one_tar(tmp_path, members)
    assert json.loads((tmp_path / "set" / "dataset.json").read_text())["classes"] == {"0": "jay"}
