"""The check of shard sets, and tools/check_shards.py."""

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
from PIL import Image, ImageFont

from t2idist import storage
from t2idist.data import sample_format
from t2idist.data.sample_format import SampleRecord
from t2idist.data.shard_writer import write_shards
from t2idist.data.shards import Dataset, Shard
from t2idist.ingest import contact_sheet
from t2idist.ingest.check import ExpectedSample, ShardReport, check_set, check_shard
from t2idist.ingest.contact_sheet import choose_keys, draw_sheet
from t2idist.ingest.duplicates import find_duplicates, fingerprint
from tests.helpers.image_files import encode, make_image
from tools import check_shards

COUNT = 12


def record(number: int, image: bytes | None = None, **changed: object) -> SampleRecord:
    data = image or encode(make_image(40, 30, seed=number))
    facts: dict = {"captions": (f"a thing {number}",), "width": 40, "height": 30, "attributes": ("Red",), **changed}
    return SampleRecord("train" if number % 4 else "test", f"s{number:03d}", data, "jpg", **facts)


def write_set(folder: Path, **changed: SampleRecord) -> Dataset:
    records = [changed.get(f"s{n}", record(n)) for n in range(COUNT)]
    write_shards(str(folder), records, source="test", licence="none", shard_samples=5)
    return Dataset.open(str(folder))


def find_problems(dataset: Dataset) -> list[str]:
    description = storage.read_json(storage.join(dataset.url, "dataset.json"))
    result = check_set(dataset, description, processes=1, fingerprints=False)
    assert result.problems.count == len(result.problems.sentences)
    return result.problems.sentences


def check_one_shard(dataset: Dataset, shard: Shard, first: int = 0) -> ShardReport:
    split = dataset.split("train")
    rows = []
    for i in range(first, first + shard.samples):
        facts = {"captions": split.captions(i), "attributes": split.attributes(i), "class_id": None}
        location = (int(split.offsets[i]), int(split.lengths[i]))
        rows.append(ExpectedSample(split.keys[i], *location, split.sha256(i), facts, *split.image_size(i), False))
    return check_shard(
        storage.join(dataset.url, shard.name), shard, rows, fingerprints=False, vectors=dataset.vector_info
    )


@pytest.mark.whole
def test_check_shards_prints_a_summary_of_a_valid_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    duplicate = record(9, encode(make_image(40, 30, seed=8)))
    write_set(tmp_path / "set", s9=duplicate)
    sheet = tmp_path / "sheet.png"
    arguments = [str(tmp_path / "set"), "--duplicates", "--sheet", str(sheet), "--processes", "2"]
    assert check_shards.main(arguments) == 0
    output = capsys.readouterr().out
    assert "problems: none" in output and "train" in output and "most frequent: a 12, thing 12" in output
    assert "1 groups across splits\n  test/s008, train/s009" in output
    assert Image.open(sheet).size[0] > 1000


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def change_description(folder: Path, change: Callable[[dict], None]) -> None:
    description = json.loads((folder / "dataset.json").read_text())
    change(description)
    (folder / "dataset.json").write_text(json.dumps(description))


def test_a_flipped_bit_is_reported_with_its_sample(tmp_path: Path):
    dataset = write_set(tmp_path)
    split = dataset.split("train")
    flip_bit(tmp_path / "train-00000.tar", int(split.offsets[2]) + 700)
    problems = check_one_shard(dataset, split.shards[0]).problems.sentences
    assert "train-00000.tar: its" in problems[0] and "differ from the SHA-256" in problems[0]
    assert f"train-00000.tar, sample {split.keys[2]}: its bytes differ" in problems[1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (record(3, width=41), "s003: its image is 40 x 30 pixels; the manifest states 41 x 30"),
        (record(3, encode(make_image(40, 30))[:300]), "s003: its image does not decode: truncated"),
        (record(3, encode(make_image(40, 30), "PNG")), "s003: its image does not decode: not_a_picture: not JPEG"),
        (record(3, encode(Image.new("1", (10_000, 10_000)), "PNG")), "does not decode"),
    ],
)
def test_wrong_images_are_reported(tmp_path: Path, changed: SampleRecord, message: str):
    dataset = write_set(tmp_path, s3=changed)
    (problem,) = check_one_shard(dataset, dataset.split("train").shards[0]).problems.sentences
    assert message in problem


def test_an_image_of_100_megapixels_is_refused_by_its_header(tmp_path: Path):
    bomb = encode(Image.new("1", (10_000, 10_000)), "PNG")
    large = SampleRecord("train", "s003", bomb, "png", ("x",), 10_000, 10_000)
    dataset = write_set(tmp_path, s3=large)
    (problem,) = check_one_shard(dataset, dataset.split("train").shards[0]).problems.sentences
    assert "too_many_pixels: 10000 x 10000" in problem


def member_of_type(kind: bytes, name: str, link: str = "") -> Callable[[str, bytes], bytes]:
    def member(name_in_set: str, data: bytes) -> bytes:
        info = tarfile.TarInfo(name.format(name_in_set))
        info.type = kind
        info.linkname = link
        info.size = len(data) if kind == tarfile.REGTYPE else 0
        body = data + bytes(-len(data) % 512) if kind == tarfile.REGTYPE else b""
        return info.tobuf(tarfile.USTAR_FORMAT) + body

    return member


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (member_of_type(tarfile.REGTYPE, "../../etc/x.jpg"), "has a name outside its folder"),
        (member_of_type(tarfile.REGTYPE, "/etc/x.jpg"), "has a name outside its folder"),
        (member_of_type(tarfile.REGTYPE, "s003.pkl"), "could run code"),
        (member_of_type(tarfile.REGTYPE, "s003.pyd"), "could run code"),
        (member_of_type(tarfile.REGTYPE, "s003.txt"), "has an extension that is not allowed"),
        (member_of_type(tarfile.REGTYPE, "other.jpg"), "its members are 'other.jpg' and 's003.json'"),
        (member_of_type(tarfile.SYMTYPE, "s003.jpg", "/etc/passwd"), "is a link"),
        (member_of_type(tarfile.LNKTYPE, "s003.jpg", "s001.jpg"), "is a link"),
        (member_of_type(tarfile.CHRTYPE, "s003.jpg"), "is a device"),
        (member_of_type(tarfile.FIFOTYPE, "s003.jpg"), "is a device"),
        (member_of_type(tarfile.DIRTYPE, "s003"), "is a folder"),
    ],
)
def test_dangerous_members_are_reported(
    tmp_path: Path, changed: Callable[[str, bytes], bytes], message: str, monkeypatch: pytest.MonkeyPatch
):
    real = sample_format.member
    monkeypatch.setattr(
        sample_format, "member", lambda name, data: changed(name, data) if name == "s003.jpg" else real(name, data)
    )
    dataset = write_set(tmp_path)
    problems = check_one_shard(dataset, dataset.split("train").shards[0]).problems.sentences
    assert len(problems) == 1 and "train-00000.tar, sample s003" in problems[0] and message in problems[0]


def test_extra_members_and_truncated_tars_are_reported(tmp_path: Path):
    dataset = write_set(tmp_path)
    shard = dataset.split("train").shards[0]
    data = (tmp_path / shard.name).read_bytes()
    extra = sample_format.member("x.pickle", b"boom")
    (tmp_path / shard.name).write_bytes(data[:-1024] + extra + bytes(1024))
    problems = check_one_shard(dataset, shard).problems.sentences
    assert any("holds 11 members; the manifest needs 10" in sentence for sentence in problems)
    assert any("'x.pickle' could run code" in sentence for sentence in problems)
    for size in (0, 100, 3000, len(data) - 2000):
        (tmp_path / shard.name).write_bytes(data[:size])
        assert check_one_shard(dataset, shard).problems.count >= 2
    (tmp_path / shard.name).unlink()
    assert check_one_shard(dataset, shard).problems.sentences == ["train-00000.tar: is missing"]


def test_json_that_differs_from_the_manifest_is_reported(tmp_path: Path):
    dataset = write_set(tmp_path)
    split = dataset.split("train")
    shard = tmp_path / "train-00000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"a thing 3", b"a thong 3"))
    problems = check_one_shard(dataset, split.shards[0]).problems.sentences
    assert any("s003: its JSON differs from the manifest" in sentence for sentence in problems)


@pytest.mark.whole
def test_counts_foreign_files_and_rejects_are_checked(tmp_path: Path):
    dataset = write_set(tmp_path)
    (tmp_path / "train-00009.tar").write_bytes(b"stale")
    assert find_problems(dataset) == ["train-00009.tar: is in the folder, but not part of the set"]
    (tmp_path / "train-00009.tar").unlink()

    def change(description: dict) -> None:
        description["vocabulary"]["thing"] = 13
        description["attributes"] = ["Blue", "Red"]
        description["splits"]["train"]["samples"] = 10
        description["rejected"] = {"grey": {"repaired": 2}}

    change_description(tmp_path, change)
    (tmp_path / "rejected.jsonl").write_text('{"a": 1}\n')
    problems = find_problems(Dataset.open(str(tmp_path)))
    assert len(problems) == 4
    assert "rejected.jsonl: has 1 lines; dataset.json counts 2" in problems
    assert any("states 10 samples of split train; its shards hold 9" in sentence for sentence in problems)
    assert any("'thing': 13; the captions have 12" in sentence for sentence in problems)
    assert any("not those of the samples, for example 'Blue'" in sentence for sentence in problems)


@pytest.mark.whole
def test_check_shards_prints_problems_and_returns_the_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    dataset = write_set(tmp_path)
    flip_bit(tmp_path / "test-00000.tar", 600)
    assert check_shards.main([str(tmp_path), "--processes", "1"]) == 1
    assert "problems: 2\n  test-00000.tar: its" in capsys.readouterr().out
    (tmp_path / dataset.split("test").shards[0].name).unlink()
    assert check_shards.main([str(tmp_path)]) == 1
    assert "test-00000.tar: is missing" in capsys.readouterr().out
    assert check_shards.main([str(tmp_path / "none")]) == 1
    assert check_shards.main(["pipe:cat /etc/passwd"]) == 1


def replace_manifest(folder: Path, column: str, values: list) -> None:
    table = pq.read_table(folder / "manifest.parquet")
    index = table.schema.get_field_index(column)
    changed = table.set_column(index, table.schema.field(column), pa.array(values, table.schema.field(column).type))
    pq.write_table(changed, folder / "manifest.parquet")
    data = (folder / "manifest.parquet").read_bytes()
    change_description(folder, lambda d: d.update(manifest={"bytes": len(data), "sha256": storage.sha256(data)}))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("key", "../../etc/x", "sample key '../../etc/x' is not allowed"),
        ("key", "pipe:cat", "sample key 'pipe:cat' is not allowed"),
        ("shard", "file:///etc/passwd", "do not match the shards"),
        ("captions", ["x" * 20_000], "a caption has 20000 characters; at most 10000"),
        ("captions", ["x" * 200_000_000], "unpacks to .* bytes, too many for 12 samples|has 200000000 characters"),
        ("offset", None, "column offset has 1 missing values"),
        ("offset", -512, "do not match its size"),
        ("size", 2**50, "do not match its size"),
    ],
)
def test_invalid_manifests_are_refused(tmp_path: Path, column: str, value: object, message: str):
    write_set(tmp_path)
    values = pq.read_table(tmp_path / "manifest.parquet")[column].to_pylist()
    replace_manifest(tmp_path, column, [value, *values[1:]])
    with pytest.raises(ValueError, match=message):
        Dataset.open(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
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
def test_invalid_descriptions_are_refused(tmp_path: Path, change: Callable[[dict], None], message: str):
    write_set(tmp_path)
    change_description(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        Dataset.open(str(tmp_path))


def test_duplicates_are_found_after_resizing_and_compression():
    def detailed(seed: int) -> Image.Image:
        coarse = np.random.default_rng(seed).integers(0, 255, (12, 16, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((200, 150), Image.Resampling.BICUBIC)

    different = {f"d{n}": fingerprint(detailed(n)) for n in range(40)}
    original = detailed(1)
    copy = Image.open(io.BytesIO(encode(original.resize((96, 72), Image.Resampling.BILINEAR), quality=60)))
    red = Image.blend(original, Image.new("RGB", original.size, "red"), 0.3)  # the same structure, other colours
    others = {"d1b": fingerprint(copy.convert("RGB")), "red": fingerprint(red)}
    assert find_duplicates({**different, **others}) == [["d1", "d1b"]]
    flat = {f"f{n}": fingerprint(Image.new("RGB", (50, 50), (n, n, n))) for n in (0, 1, 200, 201)}
    assert find_duplicates(flat) == [["f0", "f1"], ["f200", "f201"]]


def test_the_name_below_an_image_stays_in_its_column() -> None:
    (name, *_) = contact_sheet._sample_lines("train", "album-3-face-126-e5ee14b783ab" * 2, ["a face"], [])
    assert ImageFont.load_default(11).getlength(name) < contact_sheet._SIDE


def test_contact_sheets_show_images_of_every_split(tmp_path: Path):
    dataset = write_set(tmp_path)
    assert choose_keys(dataset, 6) == ["s000", "s004", "s008", "s001", "s005", "s009"]
    empty = draw_sheet(dataset, {})
    assert Image.open(io.BytesIO(empty)).size[1] > 0


def test_data_that_cannot_teach_is_said_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copied = record(0).image  # s000 is in the test split, as each fourth
    records = {f"s{n:03d}": record(n, captions=("a bird",)) for n in range(COUNT)}
    records["s001"] = record(1, image=copied, captions=("a bird",))
    write_shards(str(tmp_path / "set"), records.values(), source="test", licence="none")
    assert check_shards.main([str(tmp_path / "set"), "--processes", "1"]) == 0
    said = capsys.readouterr().err
    assert "warning: split train: all captions are equal: 'a bird'" in said
    assert "warning: 1 images are in two splits (" in said and "test/s000" in said and "train/s001" in said
