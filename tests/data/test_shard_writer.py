"""The shard writer."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from t2idist.data.sample_format import SampleRecord
from t2idist.data.shards import Dataset
from t2idist.data.tokenizer import UNICODE, Vocabulary
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


def test_a_set_records_its_tokenizer_and_without_one_it_is_ascii(tmp_path: Path):
    sample = replace(make_sample(1), captions=("ein gr\u00fcner Vogel",))
    old = write_set(tmp_path / "old", [sample])
    assert "tokenizer" not in json.loads((tmp_path / "old/dataset.json").read_text())
    assert old.vocabulary == Vocabulary(["<end>", "ein", "grner", "vogel"])
    new = write_set(tmp_path / "new", [sample], tokenizer=UNICODE)
    description = json.loads((tmp_path / "new/dataset.json").read_text())
    assert description["tokenizer"] == "unicode" and description["words"] == "lower case, NFKC"
    assert new.vocabulary == Vocabulary(["<end>", "ein", "gr\u00fcner", "vogel"], UNICODE)
    (tmp_path / "new/dataset.json").write_text(json.dumps({**description, "tokenizer": "words-2"}))
    with pytest.raises(ValueError, match=r"new/dataset.json: tokenizer is 'words-2'; this program has"):
        Dataset.open(str(tmp_path / "new"))


def test_a_set_says_that_characters_are_words_if_some_are(tmp_path: Path):
    write_set(tmp_path / "set", [replace(make_sample(1), captions=("\u7ea2\u8272\u7684\u9e1f",))], tokenizer=UNICODE)
    said = json.loads((tmp_path / "set/dataset.json").read_text())["words"]
    assert "each character is a word in Chinese" in said and said.endswith("(no segmenter)")
