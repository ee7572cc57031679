"""check_shards: what is right passes, and everything that can be wrong with a set is named."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from t2idist import storage
from t2idist.data import sample_format
from t2idist.data.sample_format import SampleRecord
from t2idist.data.shard_writer import write_shards
from t2idist.data.shards import Dataset, Shard
from t2idist.ingest.check import Expected, ShardReport, check_set, check_shard
from t2idist.ingest.contact_sheet import choose, draw_sheet
from t2idist.ingest.duplicates import find_duplicates, fingerprint
from tests.ingest.test_readers import encoded, picture
from tools import check_shards

COUNT = 12


def record(number: int, image: bytes | None = None, **changed: object) -> SampleRecord:
    data = image or encoded(picture(40, 30, seed=number))
    facts: dict = {"captions": (f"a thing {number}",), "width": 40, "height": 30, "attributes": ("Red",), **changed}
    return SampleRecord("train" if number % 4 else "test", f"s{number:03d}", data, "jpg", **facts)


def make(folder: Path, **odd: SampleRecord) -> Dataset:
    records = [odd.get(f"s{n}", record(n)) for n in range(COUNT)]
    write_shards(str(folder), records, source="test", licence="none", shard_samples=5)
    return Dataset.open(str(folder))


def problems(dataset: Dataset) -> list[str]:
    description = storage.read_json(storage.join(dataset.url, "dataset.json"))
    found = check_set(dataset, description, processes=1, fingerprints=False)
    assert found.problems.count == len(found.problems.sentences)
    return found.problems.sentences


def checked(dataset: Dataset, shard: Shard, first: int = 0) -> ShardReport:
    split = dataset.split("train")
    rows = []
    for i in range(first, first + shard.samples):
        facts = {"captions": split.captions(i), "attributes": split.attributes(i), "class_id": None}
        place = (int(split.offsets[i]), int(split.lengths[i]))
        rows.append(Expected(split.keys[i], *place, split.sha256(i), facts, *split.picture_size(i), False))
    return check_shard(storage.join(dataset.url, shard.name), shard, rows, fingerprints=False, vectors=dataset.vectors)


@pytest.mark.whole
def test_a_sound_set_has_no_problems_and_its_page_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    again = record(9, encoded(picture(40, 30, seed=8)))
    make(tmp_path / "set", s9=again)
    sheet = tmp_path / "sheet.png"
    words = [str(tmp_path / "set"), "--duplicates", "--sheet", str(sheet), "--processes", "2"]
    assert check_shards.main(words) == 0
    said = capsys.readouterr().out
    assert "problems: none" in said and "train" in said and "most frequent: a 12, thing 12" in said
    assert "1 groups across splits\n  test/s008, train/s009" in said
    assert Image.open(sheet).size[0] > 1000


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def describe(folder: Path, change: Callable[[dict], None]) -> None:
    description = json.loads((folder / "dataset.json").read_text())
    change(description)
    (folder / "dataset.json").write_text(json.dumps(description))


def test_a_flipped_byte_is_found_with_its_sample(tmp_path: Path):
    dataset = make(tmp_path)
    split = dataset.split("train")
    flip(tmp_path / "train-00000.tar", int(split.offsets[2]) + 700)
    found = checked(dataset, split.shards[0]).problems.sentences
    assert "train-00000.tar: its" in found[0] and "differ from the SHA-256" in found[0]
    assert f"train-00000.tar, sample {split.keys[2]}: its bytes differ" in found[1]


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        (record(3, width=41), "s003: its picture is 40 x 30 pixels; the manifest says 41 x 30"),
        (record(3, encoded(picture(40, 30))[:300]), "s003: its picture does not decode: truncated"),
        (record(3, encoded(picture(40, 30), "PNG")), "s003: its picture does not decode: not_a_picture: not JPEG"),
        (record(3, encoded(Image.new("1", (10_000, 10_000)), "PNG")), "does not decode"),
    ],
)
def test_a_wrong_picture_is_found(tmp_path: Path, odd: SampleRecord, says: str):
    dataset = make(tmp_path, s3=odd)
    (found,) = checked(dataset, dataset.split("train").shards[0]).problems.sentences
    assert says in found


def test_a_picture_of_100_megapixels_is_refused_by_its_header(tmp_path: Path):
    bomb = encoded(Image.new("1", (10_000, 10_000)), "PNG")
    large = SampleRecord("train", "s003", bomb, "png", ("x",), 10_000, 10_000)
    dataset = make(tmp_path, s3=large)
    (found,) = checked(dataset, dataset.split("train").shards[0]).problems.sentences
    assert "too_many_pixels: 10000 x 10000" in found


def odd_member(kind: bytes, name: str, link: str = "") -> Callable[[str, bytes], bytes]:
    def member(own: str, data: bytes) -> bytes:
        info = tarfile.TarInfo(name.format(own))
        info.type = kind
        info.linkname = link
        info.size = len(data) if kind == tarfile.REGTYPE else 0
        body = data + bytes(-len(data) % 512) if kind == tarfile.REGTYPE else b""
        return info.tobuf(tarfile.USTAR_FORMAT) + body

    return member


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        (odd_member(tarfile.REGTYPE, "../../etc/x.jpg"), "has a name that leaves its folder"),
        (odd_member(tarfile.REGTYPE, "/etc/x.jpg"), "has a name that leaves its folder"),
        (odd_member(tarfile.REGTYPE, "s003.pkl"), "could run code"),
        (odd_member(tarfile.REGTYPE, "s003.pyd"), "could run code"),
        (odd_member(tarfile.REGTYPE, "s003.txt"), "of a kind that is not allowed"),
        (odd_member(tarfile.REGTYPE, "other.jpg"), "its members are 'other.jpg' and 's003.json'"),
        (odd_member(tarfile.SYMTYPE, "s003.jpg", "/etc/passwd"), "is a link"),
        (odd_member(tarfile.LNKTYPE, "s003.jpg", "s001.jpg"), "is a link"),
        (odd_member(tarfile.CHRTYPE, "s003.jpg"), "is a device"),
        (odd_member(tarfile.FIFOTYPE, "s003.jpg"), "is a device"),
        (odd_member(tarfile.DIRTYPE, "s003"), "is a folder"),
    ],
)
def test_hostile_members_are_refused_by_name(
    tmp_path: Path, odd: Callable[[str, bytes], bytes], says: str, monkeypatch: pytest.MonkeyPatch
):
    real = sample_format.member
    monkeypatch.setattr(
        sample_format, "member", lambda name, data: odd(name, data) if name == "s003.jpg" else real(name, data)
    )
    dataset = make(tmp_path)
    found = checked(dataset, dataset.split("train").shards[0]).problems.sentences
    assert len(found) == 1 and "train-00000.tar, sample s003" in found[0] and says in found[0]


def test_members_beyond_the_manifest_and_cut_tars_are_found(tmp_path: Path):
    dataset = make(tmp_path)
    shard = dataset.split("train").shards[0]
    data = (tmp_path / shard.name).read_bytes()
    extra = sample_format.member("x.pickle", b"boom")
    (tmp_path / shard.name).write_bytes(data[:-1024] + extra + bytes(1024))
    found = checked(dataset, shard).problems.sentences
    assert any("holds 11 members; the manifest needs 10" in sentence for sentence in found)
    assert any("'x.pickle' could run code" in sentence for sentence in found)
    for cut in (0, 100, 3000, len(data) - 2000):
        (tmp_path / shard.name).write_bytes(data[:cut])
        assert checked(dataset, shard).problems.count >= 2
    (tmp_path / shard.name).unlink()
    assert checked(dataset, shard).problems.sentences == ["train-00000.tar: is missing"]


def test_json_that_differs_from_the_manifest_is_found(tmp_path: Path):
    dataset = make(tmp_path)
    split = dataset.split("train")
    shard = tmp_path / "train-00000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"a thing 3", b"a thong 3"))
    found = checked(dataset, split.shards[0]).problems.sentences
    assert any("s003: its JSON differs from the manifest" in sentence for sentence in found)


@pytest.mark.whole
def test_counts_strangers_and_rejects_are_checked(tmp_path: Path):
    dataset = make(tmp_path)
    (tmp_path / "train-00009.tar").write_bytes(b"stale")
    assert problems(dataset) == ["train-00009.tar: lies in the folder, but is not of the set"]
    (tmp_path / "train-00009.tar").unlink()

    def change(description: dict) -> None:
        description["vocabulary"]["thing"] = 13
        description["attributes"] = ["Blue", "Red"]
        description["splits"]["train"]["samples"] = 10
        description["rejected"] = {"grey": {"repaired": 2}}

    describe(tmp_path, change)
    (tmp_path / "rejected.jsonl").write_text('{"a": 1}\n')
    found = problems(Dataset.open(str(tmp_path)))
    assert len(found) == 4
    assert "rejected.jsonl: has 1 lines; dataset.json counts 2" in found
    assert any("says 10 samples of split train; its shards hold 9" in sentence for sentence in found)
    assert any("'thing': 13; the captions have 12" in sentence for sentence in found)
    assert any("not those of the samples, such as 'Blue'" in sentence for sentence in found)


@pytest.mark.whole
def test_the_tool_says_what_is_wrong_and_its_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    dataset = make(tmp_path)
    flip(tmp_path / "test-00000.tar", 600)
    assert check_shards.main([str(tmp_path), "--processes", "1"]) == 1
    assert "problems: 2\n  test-00000.tar: its" in capsys.readouterr().out
    (tmp_path / dataset.split("test").shards[0].name).unlink()
    assert check_shards.main([str(tmp_path)]) == 1
    assert "test-00000.tar: is missing" in capsys.readouterr().out
    assert check_shards.main([str(tmp_path / "none")]) == 1
    assert check_shards.main(["pipe:cat /etc/passwd"]) == 1


def replace_manifest(folder: Path, column: str, values: list) -> None:
    table = pq.read_table(folder / "manifest.parquet")
    place = table.schema.get_field_index(column)
    changed = table.set_column(place, table.schema.field(column), pa.array(values, table.schema.field(column).type))
    pq.write_table(changed, folder / "manifest.parquet")
    data = (folder / "manifest.parquet").read_bytes()
    describe(folder, lambda d: d.update(manifest={"bytes": len(data), "sha256": storage.sha256(data)}))


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("key", "../../etc/x", "sample key '../../etc/x' is not allowed"),
        ("key", "pipe:cat", "sample key 'pipe:cat' is not allowed"),
        ("shard", "file:///etc/passwd", "do not fit the shards"),
        ("captions", ["x" * 20_000], "a caption has 20000 characters; at most 10000"),
        ("captions", ["x" * 200_000_000], "unpacks to .* bytes, too many for 12 samples|has 200000000 characters"),
        ("offset", None, "column offset has 1 values that are missing"),
        ("offset", -512, "do not fit its size"),
        ("size", 2**50, "do not fit its size"),
    ],
)
def test_hostile_manifests_are_refused_by_name(tmp_path: Path, column: str, value: object, says: str):
    make(tmp_path)
    values = pq.read_table(tmp_path / "manifest.parquet")[column].to_pylist()
    replace_manifest(tmp_path, column, [value, *values[1:]])
    with pytest.raises(ValueError, match=says):
        Dataset.open(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d["splits"]["train"]["shards"][0].update(samples=10**12), "dataset.json counts 10000000000"),
        (lambda d: d["splits"]["train"]["shards"][0].update(samples="5"), "samples of shard train-00000.tar is '5'"),
        (lambda d: d["splits"]["train"]["shards"][0].update(name="file:///etc/passwd"), "allowed are plain file names"),
        (lambda d: d["splits"]["train"]["shards"][0].update(name="pipe:cat x"), "allowed are plain file names"),
        (lambda d: d["splits"]["train"]["shards"][0].update(extra=1), "not a shard set's description"),
        (lambda d: d.update(splits=[]), "not a shard set's description"),
        (lambda d: d.update(options=None), "no options"),
        (lambda d: d["vocabulary"].update({"<end>": 1}), "more than once"),
        (lambda d: d["vocabulary"].update({"x": 1e999}), "not a shard set's description"),
    ],
)
def test_hostile_descriptions_are_refused_by_name(tmp_path: Path, change: Callable[[dict], None], says: str):
    make(tmp_path)
    describe(tmp_path, change)
    with pytest.raises(ValueError, match=says):
        Dataset.open(str(tmp_path))


def test_duplicates_survive_resizing_and_compression_and_nothing_else_matches():
    def detailed(seed: int) -> Image.Image:
        coarse = np.random.default_rng(seed).integers(0, 255, (12, 16, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((200, 150), Image.Resampling.BICUBIC)

    different = {f"d{n}": fingerprint(detailed(n)) for n in range(40)}
    same = detailed(1)
    again = Image.open(io.BytesIO(encoded(same.resize((96, 72), Image.Resampling.BILINEAR), quality=60)))
    red = Image.blend(same, Image.new("RGB", same.size, "red"), 0.3)  # the structure is the same, the colours are not
    shifted = {"d1b": fingerprint(again.convert("RGB")), "red": fingerprint(red)}
    assert find_duplicates({**different, **shifted}) == [["d1", "d1b"]]
    flat = {f"f{n}": fingerprint(Image.new("RGB", (50, 50), (n, n, n))) for n in (0, 1, 200, 201)}
    assert find_duplicates(flat) == [["f0", "f1"], ["f200", "f201"]]


def test_a_sheet_takes_pictures_of_every_split(tmp_path: Path):
    dataset = make(tmp_path)
    chosen = choose(dataset, 6)
    assert chosen == ["s000", "s004", "s008", "s001", "s005", "s009"]
    empty = draw_sheet(dataset, {})
    assert Image.open(io.BytesIO(empty)).size[1] > 0
