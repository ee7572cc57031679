"""Shard sets with sentence vectors: writing, reading, streaming and checking."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds

from t2idist import storage
from t2idist.config import DataConfig
from t2idist.contract import Batch
from t2idist.data import sample_format
from t2idist.data.loader import load_split
from t2idist.data.sample_format import npy, npy_header
from t2idist.data.shards import Dataset, SentenceVectorInfo
from tests.helpers.shard_sets import make_loader, make_sample, take_batches, write_set
from tests.ingest.vector_sets import (
    DIM,
    find_problems,
    make_vector_sample,
    vector,
    vectors,
)
from tools import check_shards


def expected_vectors(dataset: Dataset, batch: Batch) -> torch.Tensor:
    """Return the vector of the caption of each row, identified by its word."""
    split = dataset.split("train")
    rows = []
    for key, token in zip(batch.ids, batch.captions.tokens[:, 0].tolist(), strict=True):
        number = split.captions(split.keys.index(key)).index(dataset.vocabulary.words[token])
        rows.append(torch.from_numpy(vector(key, number)))
    return torch.stack(rows)


# ------------------------------------------------------------------------------------------------ writing and reading
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("compress", [False, True])
def test_written_vectors_are_read_back(tmp_path: Path, dtype: str, compress: bool):
    records = [make_vector_sample(n, dtype=dtype) for n in range(20)]
    dataset = write_set(tmp_path / "set", records, compress=compress, encoder={"name": "made up"})
    assert dataset.vector_info == SentenceVectorInfo(DIM, dtype, {"name": "made up"}) and dataset.info.vector_dim == DIM
    loaded = load_split(dataset, "train", sizes=(8,), max_words=5, caption=2)
    assert loaded.batch.captions.vectors.dtype == torch.float32
    for row, record in enumerate(records):
        assert record.vectors is not None
        assert torch.equal(loaded.batch.captions.vectors[row], torch.from_numpy(record.vectors[2].astype(np.float32)))


def test_webdataset_reads_the_vectors(vector_set: Dataset):
    first = next(iter(wds.WebDataset(f"{vector_set.url}/train-00000.tar", shardshuffle=False).decode()))
    assert first["__key__"] == "s0000" and np.array_equal(first["vectors.npy"], vectors("s0000", 5))
    with tarfile.open(f"{vector_set.url}/train-00000.tar") as tar:
        assert tar.getnames()[:4] == ["s0000.png", "s0000.json", "s0000.vectors.npy", "s0001.png"]


@pytest.mark.parametrize("shape", [(1, 1), (5, 384), (10, 4800), (123456, 65536), (0, 3)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_npy_header_equals_that_of_numpy(shape: tuple[int, int], dtype: str):
    out = io.BytesIO()
    code = sample_format.VECTOR_TYPES[dtype]
    np.lib.format.write_array_header_1_0(out, {"descr": code, "fortran_order": False, "shape": shape})
    assert npy_header(dtype, *shape) == out.getvalue()


def test_sets_without_vectors_open(tmp_path: Path):
    dataset = write_set(tmp_path / "set", [make_sample(n) for n in range(9)])
    assert dataset.vector_info is None and dataset.info.vector_dim == 0
    assert load_split(dataset, "train", sizes=(8,), max_words=5).batch.captions.vectors.shape == (9, 0)


def test_invalid_vectors_are_refused_when_written(tmp_path: Path):
    valid = make_vector_sample(1)
    for wrong, message in (
        (np.zeros((4, DIM), np.float32), "vectors 4 x 7; one for each of its 5 captions is needed"),
        (np.zeros((5, DIM)), "vectors of float64; allowed are float16, float32"),
        (np.full((5, DIM), np.nan, np.float32), "values that are not finite"),
        (np.full((5, DIM), np.inf, np.float16), "values that are not finite"),
        (np.zeros((5, 0), np.float32), "vectors 5 x 0"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(valid, vectors=wrong)
    other = replace(valid, key="s0002", vectors=np.zeros((5, 3), np.float32))
    with pytest.raises(ValueError, match="s0002: sentence vectors: 3 elements of float32; samples before it have 7"):
        write_set(tmp_path / "a", [valid, other])
    with pytest.raises(ValueError, match="s0002: sentence vectors: none; samples before it have 7 elements"):
        write_set(tmp_path / "b", [valid, replace(other, vectors=None)])


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"dim": 0, "dtype": "float32", "encoder": {}}, "vectors of 0 elements; allowed are 1 to 65536"),
        ({"dim": 7, "dtype": "object", "encoder": {}}, "vectors of 'object'; allowed are float16, float32"),
        ({"dim": 7, "dtype": "float32", "encoder": "x"}, "encoder is 'x'; it must be a mapping"),
        ({"dim": 7}, "missing"),
        ([7], "vectors"),
    ],
)
def test_invalid_descriptions_are_refused(vector_set: Dataset, tmp_path: Path, description: object, message: str):
    content = storage.read_json(f"{vector_set.url}/dataset.json")
    storage.write_json(f"{tmp_path}/dataset.json", {**content, "vectors": description})
    with pytest.raises(ValueError, match=message):
        Dataset.open(str(tmp_path))


# ------------------------------------------------------------------------------------------------ streaming
def test_rows_have_the_vector_of_the_drawn_caption(vector_set: Dataset):
    batches = take_batches(make_loader(vector_set, [0, 1, 2, 3]), 6)
    for batch in batches:
        assert torch.equal(batch.captions.vectors, expected_vectors(vector_set, batch))
    drawn = {(key, int(t)) for b in batches for key, t in zip(b.ids, b.captions.tokens[:, 0], strict=True)}
    assert len(drawn) > 60  # of 40 samples' captions


def test_vectors_do_not_depend_on_workers_or_resuming(vector_set: Dataset):
    whole = take_batches(make_loader(vector_set, [0, 1, 2, 3]), 5)
    for groups in ([0, 1], [2, 3], [1]):
        for step, batch in enumerate(take_batches(make_loader(vector_set, groups, step0=2), 3), start=2):
            rows = torch.cat([torch.arange(6) + 6 * group for group in groups])
            assert torch.equal(batch.captions.vectors, whole[step].captions.vectors[rows])


def test_vectors_mean_of_averages_the_drawn_and_other_captions(vector_set: Dataset):
    mean_of = {"config": DataConfig(max_words=5, threads=2, vectors_mean_of=3)}
    seen = set()
    for batch, again in zip(
        take_batches(make_loader(vector_set, [0, 1], **mean_of), 4),
        take_batches(make_loader(vector_set, [0, 1]), 4),
        strict=True,
    ):
        assert torch.equal(batch.captions.tokens, again.captions.tokens)  # of the drawn caption
        for key, own, mean in zip(batch.ids, expected_vectors(vector_set, batch), batch.captions.vectors, strict=True):
            of_image = [torch.from_numpy(vector(key, number)) for number in range(5)]
            pairs = [(a, b) for a in range(5) for b in range(a)]
            matches = [
                pair
                for pair in pairs
                if torch.allclose(mean, (own + of_image[pair[0]] + of_image[pair[1]]) / 3, atol=1e-6)
            ]
            assert len(matches) == 1 and not any(torch.equal(of_image[i], own) for i in matches[0])
            seen.add(matches[0])
    assert len(seen) > 5
    (batch,) = take_batches(make_loader(vector_set, [0], config=DataConfig(max_words=5, vectors_mean_of=9)), 1)
    for key, mean in zip(batch.ids, batch.captions.vectors, strict=True):
        assert torch.allclose(mean, torch.from_numpy(vectors(key, 5).mean(0)), atol=1e-6)


def test_samples_with_invalid_vectors_are_quarantined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bad = {
        "s0003": npy(vectors("s0003", 4)),
        "s0005": npy(vectors("s0005", 5))[:-4],
        "s0007": npy(np.full((5, DIM), np.nan, np.float32)),
        "s0009": npy(vectors("s0009", 5).astype(np.float16)),
    }
    real = sample_format.member
    damaged = {f"{key}.vectors.npy": data for key, data in bad.items()}
    monkeypatch.setattr(sample_format, "member", lambda name, data: real(name, damaged.get(name, data)))
    dataset = write_set(tmp_path / "set", [make_vector_sample(n) for n in range(24)])
    stream = make_loader(dataset, [0, 1], total_groups=2)
    batches = take_batches(stream, 4)
    assert set(stream.quarantine) == set(bad)
    assert "not finite" in stream.quarantine["s0007"] and "5 x 7 elements of float32" in stream.quarantine["s0005"]
    for batch in batches:
        assert not set(batch.ids) & set(bad) and torch.equal(batch.captions.vectors, expected_vectors(dataset, batch))
    problems = find_problems(dataset)
    assert [sentence.split(":")[0] for sentence in problems] == [f"train-00000.tar, sample {key}" for key in bad]
    assert "its sentence vectors are not 5 x 7 elements of float32" in problems[0]


def test_samples_without_vectors_are_quarantined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = sample_format.member
    with monkeypatch.context() as patch:
        patch.setattr(
            sample_format, "member", lambda name, data: b"" if name == "s0003.vectors.npy" else real(name, data)
        )
        dataset = write_set(tmp_path / "set", [make_vector_sample(n) for n in range(8)])
    stream = make_loader(dataset, [0], total_groups=1)
    take_batches(stream, 2)
    assert stream.quarantine == {"s0003": "has no sentence vectors"}
    assert any("holds 23 members; the manifest needs 24" in sentence for sentence in find_problems(dataset))


@pytest.mark.whole
def test_check_shards_accepts_a_valid_set(vector_set: Dataset):
    assert check_shards.main([vector_set.url, "--processes", "1"]) == 0
