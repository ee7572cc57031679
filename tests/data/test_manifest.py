"""Large manifests, which are converted once per host and mapped."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from t2idist import storage
from t2idist.data import manifest, manifest_rows, statistics
from t2idist.data.manifest import Keys
from t2idist.data.sample_format import SampleRecord
from t2idist.data.shards import Dataset
from tests.data.test_shards import damaged_set
from tests.helpers.shard_sets import make_sample, write_set


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "CONVERTED_ABOVE_BYTES", 0)
    monkeypatch.setattr(manifest_rows, "_ROWS_AT_ONCE", 30)


def samples(count: int = 100) -> list[SampleRecord]:
    """Samples of two splits: some with a class, some without attributes or captions."""
    return [
        replace(
            make_sample(n, "test" if n % 3 == 0 else "train"),
            class_id=n % 7 if n % 2 else None,
            attributes=("red", "blue", "green")[: n % 4],
            captions=make_sample(n).captions[: n % 3],
        )
        for n in range(count)
    ]


def entries(folder: Path) -> list[Path]:
    return [path for path in (folder / "manifests").iterdir() if path.suffix != ".lock"]


def assert_equal(one: Dataset, other: Dataset) -> None:
    assert list(one.splits) == list(other.splits) and one.fingerprint == other.fingerprint
    for split, same in zip(one.splits.values(), other.splits.values(), strict=True):
        assert split.keys == same.keys and len(split) == len(same)
        for name in ("offsets", "lengths", "class_ids"):
            assert np.array_equal(getattr(split, name), getattr(same, name))
        for read in ("sha256", "has_class", "image_size", "captions", "attributes"):
            assert [getattr(split, read)(i) for i in range(len(split))] == [
                getattr(same, read)(i) for i in range(len(same))
            ]
        assert split.attribute_counts() == same.attribute_counts()
        assert np.array_equal(split.count_attributes(["red", "green"]), same.count_attributes(["red", "green"]))
        assert split.only_caption() == same.only_caption() and split.has_captions() == same.has_captions()
    assert statistics.problems_of(one) == statistics.problems_of(other)


@pytest.mark.parametrize("store", ["disk", "memory"])
def test_mapped_set_is_equal_to_the_one_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str) -> None:
    url = str(tmp_path / "set") if store == "disk" else f"memory://mapped-{uuid.uuid4().hex}"
    records = samples()
    small = write_set(url, records)
    assert small.split("train").keys == [record.key for record in records if record.split == "train"]
    assert [small.split("test").captions(i) for i in range(34)] == [list(r.captions) for r in records[::3]]
    monkeypatch.setattr(manifest, "CONVERTED_ABOVE_BYTES", 0)
    monkeypatch.setattr(manifest_rows, "_ROWS_AT_ONCE", 30)
    for _ in range(2):
        assert_equal(small, Dataset.open(url, cache=str(tmp_path / "cache")))
    assert len(entries(tmp_path / "cache")) == 1
    assert not list((tmp_path / "cache").rglob("manifest.parquet"))


def test_small_manifests_write_no_file(tmp_path: Path) -> None:
    write_set(tmp_path / "set", samples())
    Dataset.open(str(tmp_path / "set"), cache=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("everything_is_large")
def test_conversion_happens_once_and_later_openings_read_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_set(tmp_path / "set", samples())
    cache = str(tmp_path / "cache")
    with caplog.at_level(logging.INFO):
        threads = [
            threading.Thread(target=Dataset.open, args=(str(tmp_path / "set"),), kwargs={"cache": cache})
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    (folder,) = entries(tmp_path / "cache")
    assert sum(str(folder) in message for message in caplog.messages) == 1

    def refuse(*arguments: object, **options: object) -> bytes:
        raise AssertionError("the manifest is read again")

    monkeypatch.setattr(storage, "read_bytes", refuse)
    monkeypatch.setattr(manifest, "checked_parts", refuse)
    before = pa.total_allocated_bytes()
    dataset = Dataset.open(str(tmp_path / "set"), cache=cache)
    assert pa.total_allocated_bytes() - before < 4096, "columns were copied into memory"
    assert not dataset.split("train").offsets.flags.owndata


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("damage", ["cut", "column missing", "unfinished", "no contents", "header"])
def test_damaged_or_half_entries_are_made_again(tmp_path: Path, damage: str) -> None:
    expected = write_set(tmp_path / "set", samples())
    Dataset.open(str(tmp_path / "set"), cache=str(tmp_path / "cache"))
    (folder,) = entries(tmp_path / "cache")
    texts = folder / "texts.arrow"
    if damage == "cut":
        texts.write_bytes(texts.read_bytes()[:-1])
    elif damage == "column missing":
        (folder / "offsets.npy").unlink()
    elif damage == "unfinished":
        shutil.move(folder, folder.with_name(f"{folder.name}.unfinished"))
    elif damage == "no contents":
        (folder / "contents.json").write_text("{")
    elif damage == "header":
        (folder / "widths.npy").write_bytes(bytes((folder / "widths.npy").stat().st_size))
    assert_equal(expected, Dataset.open(str(tmp_path / "set"), cache=str(tmp_path / "cache")))
    assert entries(tmp_path / "cache") == [folder]


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("case", ["not a folder", "full disk"])
def test_without_a_disk_the_manifest_is_held_in_memory_with_one_warning(
    tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write_set(tmp_path / "set", samples())
    cache = tmp_path / "cache"
    if case == "not a folder":
        cache.write_text("a file")
    else:

        def full(file: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(manifest.os, "fsync", full)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_equal(expected, Dataset.open(str(tmp_path / "set"), cache=str(cache)))
    assert sum("holds it in memory" in message for message in caplog.messages) == 1
    assert case != "full disk" or entries(cache) == []


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("manifest", "manifest.parquet: its .* bytes are not those"),
        ("count", "manifest.parquet: 30 rows; dataset.json counts 29"),
        ("offsets", "the offsets of the samples of train-00000.tar do not match its size"),
    ],
)
def test_damaged_manifests_are_reported_and_leave_nothing(
    tmp_path: Path, damage: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = damaged_set(tmp_path, damage)
    with pytest.raises(ValueError, match=message):
        Dataset.open(str(folder), cache=str(tmp_path / "cache"))
    assert entries(tmp_path / "cache") == []


@pytest.mark.usefixtures("everything_is_large")
def test_another_list_of_shards_is_another_entry(tmp_path: Path) -> None:
    write_set(tmp_path / "set", samples())
    text = (tmp_path / "set/dataset.json").read_text()
    Dataset.open(str(tmp_path / "set"), cache=str(tmp_path / "cache"))
    (tmp_path / "set/dataset.json").write_text(text.replace("train-00001.tar", "train-00009.tar"))
    with pytest.raises(ValueError, match="do not match the shards"):
        Dataset.open(str(tmp_path / "set"), cache=str(tmp_path / "cache"), check_sizes=False)


def test_a_key_that_occurs_twice_far_apart_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_rows, "_ROWS_AT_ONCE", 30)
    keys = [f"{'k' * (n % 80)}-{n}" for n in range(1000)]
    groups = [pa.array(keys[first : first + 100]) for first in range(0, 1000, 100)]
    hashes = np.concatenate([manifest_rows._hash_keys(group) for group in groups])
    assert len(set(hashes.tolist())) == 1000
    assert manifest_rows._hash_keys(pa.array(["a"]))[0] == manifest_rows._hash_keys(pa.array(["a", "b" * 90]))[0]
    write_set(tmp_path / "set", samples())
    file, description = tmp_path / "set/manifest.parquet", tmp_path / "set/dataset.json"
    table = pq.read_table(file)
    names = table["key"].to_pylist()
    names[90] = names[3]
    pq.write_table(table.set_column(2, "key", pa.array(names)), file, row_group_size=17)
    facts = json.loads(description.read_text())
    facts["manifest"] = {"bytes": file.stat().st_size, "sha256": storage.sha256(file.read_bytes())}
    description.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=f"sample key '{names[3]}' occurs more than once"):
        Dataset.open(str(tmp_path / "set"))


def test_keys_behave_like_a_list() -> None:
    names = [f"s{n}" for n in range(3000)]
    keys = Keys(pa.chunked_array([names[:10], [], names[10:2500], names[2500:]]))
    assert keys == names and names == keys and keys == tuple(names) and keys != names[:-1] and keys != names[::-1]
    assert list(keys) == names and keys[2499] == "s2499" and keys[-1] == "s2999" and keys[5:15] == names[5:15]
    assert keys.index("s2600") == 2600 and "s7" in keys and "x" not in keys and sorted(keys) == sorted(names)
    with pytest.raises(IndexError):
        keys[3000]
