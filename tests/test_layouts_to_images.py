"""The README's five commands, from each layout that people have to a drawn image, on disk and in an object store.

``pytest -m slow -s tests/test_layouts_to_images.py`` prints the seconds of each command.
"""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from t2idist.data.embedded.avatars import Face, face, face_renderer
from tests.helpers.object_store import seaweedfs, store
from tests.helpers.runs import ROOT
from tests.ingest.layout_sets import write_tar

FACES, PIXELS = 320, 96
HAIR = ["Black_Hair", "Brown_Hair", "Blond_Hair", "Red_Hair", "Gray_Hair"]
pytestmark = pytest.mark.slow  # two minutes for each layout and place


@dataclass(frozen=True)
class Picture:
    face: Face
    jpg: bytes

    @property
    def name(self) -> str:
        return f"{self.face.number:04d}"

    @property
    def caption(self) -> str:
        return self.face.captions[0]


Write = Callable[[Path, list[Picture]], None]


def write(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def table_of(rows: list[list[str]], delimiter: str = ",", line_end: str = "\n") -> str:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator=line_end).writerows(rows)
    return text.getvalue()


def image_folder(root: Path, pictures: list[Picture]) -> None:
    """Write an image folder of Hugging Face with splits and metadata.jsonl."""
    for split in ("train", "validation", "test"):
        lines = []
        for picture in pictures:
            if picture.face.split == {"validation": "val"}.get(split, split):
                write(root / split / f"{picture.name}.jpg", picture.jpg)
                lines.append(json.dumps({"file_name": f"{picture.name}.jpg", "text": picture.caption}))
        write(root / split / "metadata.jsonl", "\n".join(lines))


def image_folder_csv(root: Path, pictures: list[Picture]) -> None:
    rows = [["file_name", "prompt"]]
    for picture in pictures:
        write(root / "images" / f"{picture.name}.jpg", picture.jpg)
        rows.append([f"images/{picture.name}.jpg", picture.caption])
    write(root / "metadata.csv", table_of(rows))


def parquet(path: Path, pictures: list[Picture], as_struct: bool) -> None:
    images = [{"bytes": each.jpg, "path": f"{each.name}.jpg"} if as_struct else each.jpg for each in pictures]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images, "caption": [each.caption for each in pictures]}), path, row_group_size=50)


def parquet_files(root: Path, pictures: list[Picture]) -> None:
    for i in range(4):
        parquet(root / "data" / f"train-{i:05d}-of-00004.parquet", pictures[i::4], as_struct=False)


def tars(root: Path, pictures: list[Picture]) -> None:
    """Write tars of img2dataset; one member of a sample is missing, and one name has several dots."""
    for i in range(2):
        members: dict[str, bytes] = {}
        for picture in pictures[i::2]:
            key = f"{picture.face.number:09d}" + (".crop.v2" if picture.face.number == 7 else "")
            members[f"{key}.jpg"] = picture.jpg
            members[f"{key}.json"] = json.dumps({"caption": picture.caption, "url": "https://x/y.jpg"}).encode()
            if picture.face.number != 8:
                members[f"{key}.txt"] = picture.caption.encode()
        write_tar(root / f"{i:05d}.tar", members)


def kaggle(root: Path, pictures: list[Picture]) -> None:
    names = [*HAIR, "Eyeglasses", "Wearing_Hat"]
    attributes, parts = [["image_id", *names]], [["image_id", "partition"]]
    for picture in pictures:
        file = f"{picture.face.number + 1:06d}.jpg"
        write(root / "img_align_celeba" / "img_align_celeba" / file, picture.jpg)
        attributes.append([file, *("1" if name in picture.face.attributes else "-1" for name in names)])
        parts.append([file, str(("train", "val", "test").index(picture.face.split))])
    write(root / "list_attr_celeba.csv", table_of(attributes))
    write(root / "list_eval_partition.csv", table_of(parts))


def one_hot(root: Path, pictures: list[Picture]) -> None:
    rows = [["image", "caption", *HAIR]]
    for picture in pictures:
        write(root / f"{picture.name}.jpg", picture.jpg)
        flags = ("1" if name in picture.face.attributes else "0" for name in HAIR)
        rows.append([f"{picture.name}.jpg", picture.caption, *flags])
    write(root / "attributes.csv", table_of(rows))


def odd_table(root: Path, pictures: list[Picture]) -> None:
    """Write a table with semicolons, CR line ends, backslashes, absolute paths and names without extension."""
    rows = [["image", "caption"]]
    for picture in pictures:
        write(root / "faces" / f"{picture.name}.jpg", picture.jpg)
        path = f"{root}/faces/{picture.name}.jpg", f"faces\\{picture.name}.jpg", f"faces/{picture.name}"
        rows.append([path[picture.face.number % 3], picture.caption])
    write(root / "table.csv", table_of(rows, ";", "\r"))


def beside(ending: str) -> Write:
    def write_all(root: Path, pictures: list[Picture]) -> None:
        for picture in pictures:
            write(root / f"{picture.name}.jpg", picture.jpg)
            write(root / f"{picture.name}{ending}", "\n".join(picture.face.captions))

    return write_all


@dataclass(frozen=True)
class Layout:
    write: Write
    options: list[str] = field(default_factory=list)
    """Of tools/shard_folder.py; {root} is the folder."""


LAYOUTS = {
    "image folder, metadata.jsonl, splits": Layout(image_folder),
    "image folder, metadata.csv": Layout(image_folder_csv, ["--caption-column", "prompt"]),
    "one Parquet file, struct": Layout(lambda root, pictures: parquet(root / "faces.parquet", pictures, True)),
    "Parquet files, binary": Layout(parquet_files),
    "tars of img2dataset": Layout(tars),
    "one-hot attributes": Layout(one_hot, ["--table", "{root}/attributes.csv", "--attribute-columns", "all"]),
    "a.txt": Layout(beside(".txt")),
    "a.caption": Layout(beside(".caption")),
    "a.TXT": Layout(beside(".TXT")),
    "a.jpg.txt": Layout(beside(".jpg.txt")),
    "table: ; CR backslash absolute": Layout(odd_table, ["--table", "{root}/table.csv"]),
    "CelebA of Kaggle": Layout(kaggle),
}


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    render, result = face_renderer(PIXELS), []
    for number in range(FACES):
        jpg = io.BytesIO()
        Image.open(io.BytesIO(render(number))).save(jpg, "JPEG", quality=95)
        result.append(Picture(face(number), jpg.getvalue()))
    return result


@pytest.fixture(params=["disk", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "disk":
        yield str(tmp_path / "results")
        return
    with seaweedfs() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield "s3://bucket"


def commands(layout: str, root: str, out: str, image: Path) -> list[list[str]]:
    """Return the five commands: shard, check, dry run, train, draw.

    They differ from the README's by a budget of seconds, and by one thread, which other processes do not slow down.
    """
    python, t2idist = [sys.executable], [sys.executable, "-m", "t2idist.cli"]
    options = [option.format(root=root) for option in LAYOUTS[layout].options]
    shards, runs = f"{out}/mine", f"{out}/runs"
    check = [*python, "tools/check_shards.py", shards, "--sheet", str(image.parent / "sheet.png")]
    budget = ["images=320", "pictures_every_images=320"]
    if layout == "CelebA of Kaggle":
        train = [*t2idist, "train", "stargan", "name=mine", f"data.source={shards}", "data.crop=1.1875"]
        train += [f"stages.stargan.{each}" for each in [*budget, "model.decay_start_images=320"]]
        train += ["stages.stargan.model.decay_end_images=640"]
        shard = [*python, "tools/shard_celeba.py", "--celeba", root, "--out", shards, "--size", "76"]
        draw = [*t2idist, "translate", "--export", f"{runs}/mine/stargan/export", "--image", str(image)]
        draw += ["--set", "Blond_Hair"]
    else:
        train = [*t2idist, "train", "attngan", "name=mine", f"data.source={shards}", "data.crop=1.1875"]
        train += [f"stages.{stage}.{each}" for stage in ("damsm", "judge", "attngan") for each in budget]
        shard = [*python, "tools/shard_folder.py", "--folder", root, "--out", shards, "--size", "76", *options]
        draw = [*t2idist, "sample", "--export", f"{runs}/mine/attngan/export", "--text", "a person with red hair"]
    train.append("cluster.cpus_per_worker=1")
    return [shard, check, [*train, "--dry-run"], [*train, f"storage={runs}"], [*draw, "--out", str(image.parent)]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_five_commands_lead_to_a_drawn_image(place: str, layout: str, pictures: list[Picture], tmp_path: Path) -> None:
    local = tmp_path / "own"
    LAYOUTS[layout].write(local, pictures)
    root = str(local)
    if "://" in place:  # the user's files are in the bucket too
        root = f"{place}/own"
        for table in local.glob("*.csv"):
            table.write_bytes(table.read_bytes().replace(str(local).encode(), root.encode()))
        store(os.environ["AWS_ENDPOINT_URL"]).put(str(local), root.removeprefix("s3://"), recursive=True)
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    (drawn / "input.jpg").write_bytes(pictures[0].jpg)
    seconds = []
    for command in commands(layout, root, place, drawn / "input.jpg"):
        started = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
        seconds.append(time.monotonic() - started)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
    images = [path for path in drawn.glob("*.png") if path.name not in ("sheet.png", "input.jpg")]
    assert images
    for image in images:
        with Image.open(image) as opened:
            assert min(opened.size) >= 64
    place_name = "bucket" if "://" in place else "disk"
    times = " | ".join(f"{each:.0f}" for each in [*seconds, sum(seconds)])
    print(f"\n| {layout} | {place_name} | {times} |")
