"""Opening shard sets, intact and damaged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from t2idist.config import DataConfig
from t2idist.data.order import SampleRange
from t2idist.data.reader import ShardReader
from t2idist.data.shards import Dataset
from t2idist.data.sources import open_dataset
from tests.helpers.shard_sets import WORDS, make_sample, write_set


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("storage", ["disk", "memory"])
def test_set_reads_back_what_was_written(tmp_path: Path, compress: bool, storage: str):
    url = str(tmp_path / "set") if storage == "disk" else f"memory://written-{compress}"
    samples = [make_sample(n) for n in range(40)]
    dataset = write_set(url, samples, compress=compress)
    split = dataset.split("train")
    assert split.shard_sizes == [17, 17, 6]
    assert split.keys == [s.key for s in samples]
    assert split.captions(20) == list(samples[20].captions)
    assert split.attributes(20) == ["blue"]
    assert split.class_ids.tolist() == list(range(40))
    assert dataset.vocabulary.words[0] == "<end>" and set(dataset.vocabulary.words[1:]) == set(WORDS)
    reader = ShardReader(dataset, "train")
    assert [image.data for image in reader.read_encoded(SampleRange(1, 3, 9))] == [s.image for s in samples[20:29]]


def damaged_set(tmp_path: Path, damage: str) -> Path:
    """Write a set, and damage it."""
    folder = tmp_path / "set"
    write_set(folder, [make_sample(n) for n in range(30)])
    description = json.loads((folder / "dataset.json").read_text())
    shard = folder / "train-00001.tar"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-5000])
    elif damage == "missing":
        shard.unlink()
    elif damage == "manifest":
        (folder / "manifest.parquet").write_bytes((folder / "manifest.parquet").read_bytes()[:-1] + b"x")
    elif damage == "version":
        description["schema"] = 7
    elif damage == "keys":
        del description["vocabulary"]
    elif damage == "outside":
        description["splits"]["train"]["shards"][0]["name"] = "../x.tar"
    elif damage == "count":
        description["splits"]["train"]["shards"][1]["samples"] -= 1
    elif damage == "offsets":
        table = pq.read_table(folder / "manifest.parquet")
        moved = pa.array([offset + 512 for offset in table["offset"].to_pylist()])
        pq.write_table(table.set_column(3, "offset", moved), folder / "manifest.parquet")
        data = (folder / "manifest.parquet").read_bytes()
        description["manifest"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    elif damage == "json":
        (folder / "dataset.json").write_text("{")
        return folder
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", r"train-00001.tar: has \d+ bytes; dataset.json says \d+ bytes"),
        ("missing", "train-00001.tar: is missing"),
        ("manifest", "manifest.parquet: its .* bytes are not those"),
        ("version", "schema version 7; this program reads 2"),
        ("keys", "not a shard set's description.*vocabulary"),
        ("outside", "shard name '../x.tar'; allowed are plain file names"),
        ("count", "manifest.parquet: 30 rows; dataset.json counts 29|do not match"),
        ("offsets", "the offsets of the samples of train-00000.tar do not match its size"),
        ("json", "not JSON"),
    ],
)
def test_open_reports_the_damage(tmp_path: Path, damage: str, message: str):
    with pytest.raises(ValueError, match=message):
        Dataset.open(str(damaged_set(tmp_path, damage)))


def test_missing_sets_splits_and_sources_are_reported(small_set: Dataset, tmp_path: Path):
    with pytest.raises(ValueError, match=r"no dataset.json there"):
        Dataset.open(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="no split 'valid'; there are test, train"):
        small_set.split("valid")
    with pytest.raises(ValueError, match=r"'emojis' .did you mean emoji.*; allowed are avatars, emoji and the URL"):
        open_dataset(DataConfig(source="emojis"))
    with pytest.raises(ValueError, match="pipe"):
        open_dataset(DataConfig(source="pipe:cat /etc/passwd"))
