"""Data sets in the layouts that people have, and the tool that reads them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from t2idist.data.shards import Dataset
from tests.helpers.image_files import encode, make_image
from tools import shard_folder

SMALL = ("--size", "8", "--processes", "1")


def jpeg(seed: int = 0) -> bytes:
    return encode(make_image(24, 16, seed=seed))


def write_tar(path: Path, members: Mapping[str, bytes] | Sequence[tuple[str, bytes]], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))


def img2dataset_members(first: int, count: int) -> dict[str, bytes]:
    """Return the members of a tar of img2dataset."""
    members = {}
    for number in range(first, first + count):
        caption = f"picture number {number}"
        members[f"{number:09d}.jpg"] = jpeg(number)
        members[f"{number:09d}.txt"] = caption.encode()
        members[f"{number:09d}.json"] = json.dumps(
            {"caption": caption, "url": "https://x/y.jpg", "exif": "{}"}
        ).encode()
    return members


def write_parquet(path: Path, first: int, count: int, **more: list) -> None:
    """Write images as the package datasets does: struct<bytes, path>, text, in row groups of a few rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": jpeg(number), "path": f"{number}.jpg"} for number in range(first, first + count)]
    columns = {"image": images, "text": [f"picture number {number}" for number in range(first, first + count)], **more}
    pq.write_table(pa.table(columns), path, row_group_size=7)


def shard(folder: Path | str, out: Path | str, *options: str) -> Dataset:
    """Run tools/shard_folder.py in this process, and open the set."""
    assert shard_folder.main(["--folder", str(folder), "--out", str(out), *SMALL, *options]) == 0
    return Dataset.open(str(out))


def captions(dataset: Dataset) -> dict[str, set[str]]:
    """Return all captions by split."""
    return {
        name: {caption for index in range(len(split)) for caption in split.captions(index)}
        for name, split in dataset.splits.items()
    }


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
