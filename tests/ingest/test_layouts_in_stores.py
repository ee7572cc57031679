"""Layouts that people have, read from a bucket and from disk: the sets are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from t2idist.data.shards import Dataset
from tests.helpers.image_files import save_image
from tests.helpers.object_store import seaweedfs, store
from tools import shard_celeba, shard_folder

COUNT = 12


def write_captions(root: Path, extension: str) -> None:
    for number in range(COUNT):
        save_image(root / "sub" / f"{number}.jpg", number)
        (root / "sub" / f"{number}{extension}").write_text(f"thing number {number}\n")


def write_table(root: Path) -> None:
    rows = ["file;caption;Red;Big;size"]
    for number in range(COUNT):
        save_image(root / "sub" / f"{number}.jpg", number)
        name = (f"sub\\{number}.jpg", f"{root}/sub/{number}.jpg", f"sub/{number}")[number % 3]
        rows.append(f"{name};thing, number {number};{number % 2};{'yes' if number % 3 else 'no'};{number}")
    (root / "t.csv").write_bytes("\r".join(rows).encode())


def write_kaggle(root: Path) -> None:
    attributes, partition = ["image_id,Bald,Smiling"], ["image_id,partition"]
    for number in range(COUNT):
        save_image(root / "img_align_celeba" / "img_align_celeba" / f"{number:06d}.jpg", number)
        attributes.append(f"{number:06d}.jpg,{1 if number % 2 else -1},1")
        partition.append(f"{number:06d}.jpg,{number % 3}")
    (root / "list_attr_celeba.csv").write_text("\n".join(attributes))
    (root / "list_eval_partition.csv").write_text("\n".join(partition))


TABLE = ["--table", "{root}/t.csv", "--image-column", "file", "--attribute-columns", "all"]
LAYOUTS: dict[str, tuple[Callable[[Path], None], Callable[[list[str]], int], str, list[str]]] = {
    "caption": (lambda root: write_captions(root, ".caption"), shard_folder.main, "--folder", []),
    "upper case": (lambda root: write_captions(root, ".TXT"), shard_folder.main, "--folder", []),
    "two extensions": (lambda root: write_captions(root, ".jpg.txt"), shard_folder.main, "--folder", []),
    "any extension": (
        lambda root: write_captions(root, ".tags"), shard_folder.main, "--folder", ["--caption-extension", ".tags"],
    ),
    "table": (write_table, shard_folder.main, "--folder", TABLE),
    "kaggle": (write_kaggle, shard_celeba.main, "--celeba", []),
}  # fmt: skip


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with seaweedfs() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield environment["AWS_ENDPOINT_URL"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_in_a_bucket_gives_the_set_that_it_gives_on_disk(tmp_path: Path, address: str, layout: str):
    write, tool, option, more = LAYOUTS[layout]
    root = tmp_path / "mine"
    write(root)
    remote, place = store(address), f"bucket/{layout.replace(' ', '-')}/mine"
    remote.put(str(root) + "/", f"{place}/", recursive=True)
    for name in remote.find(place):
        if name.endswith(".csv"):
            remote.pipe_file(name, remote.cat_file(name).replace(str(root).encode(), f"s3://{place}".encode()))
    sets = []
    for source, out in ((str(root), str(tmp_path / "set")), (f"s3://{place}", f"s3://{place}-set")):
        arguments = [text.format(root=source) for text in more]
        assert tool([option, source, "--out", out, "--size", "16", "--processes", "1", *arguments]) == 0
        sets.append(Dataset.open(out))
    for name, split in sets[0].splits.items():
        other = sets[1].split(name)
        assert split.keys == other.keys and [s.sha256 for s in split.shards] == [s.sha256 for s in other.shards]
    assert sum(len(split.keys) for split in sets[0].splits.values()) == COUNT
