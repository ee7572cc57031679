"""The shard writer."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from t2idist.data.sample_format import SampleRecord
from tests.helpers.shard_sets import make_sample, write_set


def test_writer_is_deterministic_and_writes_plain_tars(tmp_path: Path):
    samples = [make_sample(n, "train" if n % 3 else "val") for n in range(40)]
    write_set(tmp_path / "a", samples)
    write_set(tmp_path / "b", samples)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["dataset.json", "manifest.parquet", "train-00000.tar", "train-00001.tar", "val-00000.tar"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with tarfile.open(tmp_path / "a" / "val-00000.tar") as tar:
        members = tar.getmembers()
        assert [member.name for member in members[:3]] == ["s0000.png", "s0000.json", "s0003.png"]
        assert {(member.mtime, member.uid, member.uname) for member in members} == {(0, 0, "")}
        assert json.load(tar.extractfile("s0003.json"))["captions"] == list(samples[3].captions)


def test_writer_rejects_invalid_samples_and_finished_sets(tmp_path: Path):
    with pytest.raises(ValueError, match="'s0001' occurs twice"):
        write_set(tmp_path / "twice", [make_sample(1), make_sample(1)])
    with pytest.raises(ValueError, match="no sample"):
        write_set(tmp_path / "none", [])
    with pytest.raises(ValueError, match=r"key '../etc/x'"):
        SampleRecord("train", "../etc/x", b"", "png", (), 1, 1)
    with pytest.raises(ValueError, match="extension 'pkl'"):
        SampleRecord("train", "x", b"", "pkl", (), 1, 1)
    write_set(tmp_path / "done", [make_sample(1)])
    with pytest.raises(ValueError, match="finished shard set already"):
        write_set(tmp_path / "done", [make_sample(1)])
