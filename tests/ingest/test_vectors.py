"""Sentence vectors that come with the data: written, read with the caption that was drawn, checked, embedded."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import torch
import webdataset as wds

from t2idist import storage
from t2idist.config import DataConfig, RunConfig
from t2idist.config.strict import from_dict, to_dict
from t2idist.contract import Batch
from t2idist.data import sample_format
from t2idist.data.loader import load_split
from t2idist.data.sample_format import SampleRecord, npy, npy_header
from t2idist.data.shard_writer import write_shards
from t2idist.data.shards import Dataset, SentenceVectorInfo
from t2idist.engine.checkpoint import export
from t2idist.ingest.check import _expected, check_shard
from t2idist.ingest.embed import CaptionedSamples, embed_set
from t2idist.ingest.vectors_file import VectorsFile
from t2idist.sampling import sample as sampler
from t2idist.sampling.loading import exported_network
from t2idist.sampling.sentence_encoders import encode_sentences, open_encoder
from t2idist.training import worker
from t2idist.training.stages import StageRun
from tests.data.shard_sets import WORDS, make_loader, make_sample, take_batches
from tests.helpers import small_systems, toy_gan
from tools import check_shards, embed_captions

DIM = 7
CPU = torch.device("cpu")


def vector(key: str, caption: int, dim: int = DIM) -> np.ndarray:
    return np.random.default_rng([int(key[1:]), caption]).normal(size=dim).astype(np.float32)


def vectors(key: str, captions: int, dim: int = DIM) -> np.ndarray:
    return np.stack([vector(key, number, dim) for number in range(captions)])


def spoken(number: int, split: str = "train", captions: int = 5, dtype: str = "float32") -> SampleRecord:
    """A sample whose captions are all different words, so that the words tell which one was drawn."""
    made = make_sample(number, split)
    words = tuple(WORDS[(number + i) % len(WORDS)] for i in range(captions))
    return replace(made, captions=words, vectors=vectors(made.key, captions).astype(dtype))


def write(url: Path | str, records: Sequence[SampleRecord], **options: object) -> Dataset:
    write_shards(str(url), records, source="test", licence="none", shard_samples=17, **options)  # type: ignore[arg-type]
    return Dataset.open(str(url))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """40 training samples and 6 to test on, each with five captions and their vectors."""
    folder = tmp_path_factory.mktemp("told") / "set"
    records = [spoken(n, "train" if n < 40 else "test") for n in range(46)]
    return write(folder, records, encoder={"name": "made up"})


def expected(dataset: Dataset, batch: Batch) -> torch.Tensor:
    """The vector of each row's caption, which its word tells."""
    split = dataset.split("train")
    rows = []
    for key, token in zip(batch.ids, batch.captions.tokens[:, 0].tolist(), strict=True):
        number = split.captions(split.keys.index(key)).index(dataset.vocabulary.words[token])
        rows.append(torch.from_numpy(vector(key, number)))
    return torch.stack(rows)


# ------------------------------------------------------------------------------------------------ written and read
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("compress", [False, True])
def test_what_is_written_is_read(tmp_path: Path, dtype: str, compress: bool):
    records = [spoken(n, dtype=dtype) for n in range(20)]
    dataset = write(tmp_path / "set", records, compress=compress, encoder={"name": "made up"})
    assert dataset.vector_info == SentenceVectorInfo(DIM, dtype, {"name": "made up"}) and dataset.info.vector_dim == DIM
    loaded = load_split(dataset, "train", sizes=(8,), max_words=5, caption=2)
    assert loaded.batch.captions.vectors.dtype == torch.float32
    for row, record in enumerate(records):
        assert record.vectors is not None
        assert torch.equal(loaded.batch.captions.vectors[row], torch.from_numpy(record.vectors[2].astype(np.float32)))


def test_any_webdataset_reader_can_take_them(told: Dataset):
    first = next(iter(wds.WebDataset(f"{told.url}/train-00000.tar", shardshuffle=False).decode()))
    assert first["__key__"] == "s0000" and np.array_equal(first["vectors.npy"], vectors("s0000", 5))
    with tarfile.open(f"{told.url}/train-00000.tar") as tar:
        assert tar.getnames()[:4] == ["s0000.png", "s0000.json", "s0000.vectors.npy", "s0001.png"]


@pytest.mark.parametrize("shape", [(1, 1), (5, 384), (10, 4800), (123456, 65536), (0, 3)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_headers_are_those_of_numpy(shape: tuple[int, int], dtype: str):
    out = io.BytesIO()
    code = sample_format.VECTOR_TYPES[dtype]
    np.lib.format.write_array_header_1_0(out, {"descr": code, "fortran_order": False, "shape": shape})
    assert npy_header(dtype, *shape) == out.getvalue()


def test_sets_without_vectors_open_as_before(tmp_path: Path):
    dataset = write(tmp_path / "set", [make_sample(n) for n in range(9)])
    assert dataset.vector_info is None and dataset.info.vector_dim == 0
    assert load_split(dataset, "train", sizes=(8,), max_words=5).batch.captions.vectors.shape == (9, 0)


def test_writer_refuses_what_would_go_wrong(tmp_path: Path):
    good = spoken(1)
    for wrong, says in (
        (np.zeros((4, DIM), np.float32), "vectors 4 x 7; one for each of its 5 captions is needed"),
        (np.zeros((5, DIM)), "vectors of float64; allowed are float16, float32"),
        (np.full((5, DIM), np.nan, np.float32), "values that are not finite"),
        (np.full((5, DIM), np.inf, np.float16), "values that are not finite"),
        (np.zeros((5, 0), np.float32), "vectors 5 x 0"),
    ):
        with pytest.raises(ValueError, match=says):
            replace(good, vectors=wrong)
    other = replace(good, key="s0002", vectors=np.zeros((5, 3), np.float32))
    with pytest.raises(ValueError, match="s0002: sentence vectors: 3 elements of float32; samples before it have 7"):
        write(tmp_path / "a", [good, other])
    with pytest.raises(ValueError, match="s0002: sentence vectors: none; samples before it have 7 numbers"):
        write(tmp_path / "b", [good, replace(other, vectors=None)])


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"dim": 0, "dtype": "float32", "encoder": {}}, "vectors of 0 elements; allowed are 1 to 65536"),
        ({"dim": 7, "dtype": "object", "encoder": {}}, "vectors of 'object'; allowed are float16, float32"),
        ({"dim": 7, "dtype": "float32", "encoder": "x"}, "encoder is 'x'; it must be a mapping"),
        ({"dim": 7}, "missing"),
        ([7], "vectors"),
    ],
)
def test_a_hostile_description_gives_a_sentence(told: Dataset, tmp_path: Path, said: object, says: str):
    description = storage.read_json(f"{told.url}/dataset.json")
    storage.write_json(f"{tmp_path}/dataset.json", {**description, "vectors": said})
    with pytest.raises(ValueError, match=says):
        Dataset.open(str(tmp_path))


# ------------------------------------------------------------------------------------------------ streamed
def test_a_row_has_the_vector_of_the_caption_that_was_drawn(told: Dataset):
    batches = take_batches(make_loader(told, [0, 1, 2, 3]), 6)
    for batch in batches:
        assert torch.equal(batch.captions.vectors, expected(told, batch))
    drawn = {(key, int(t)) for b in batches for key, t in zip(b.ids, b.captions.tokens[:, 0], strict=True)}
    assert len(drawn) > 60  # of 40 samples' captions


def test_any_workers_and_any_resume_give_the_same_vectors(told: Dataset):
    whole = take_batches(make_loader(told, [0, 1, 2, 3]), 5)
    for groups in ([0, 1], [2, 3], [1]):
        for step, batch in enumerate(take_batches(make_loader(told, groups, step0=2), 3), start=2):
            rows = torch.cat([torch.arange(6) + 6 * group for group in groups])
            assert torch.equal(batch.captions.vectors, whole[step].captions.vectors[rows])


def test_mean_of_several_is_the_drawn_one_and_others(told: Dataset):
    mean_of = {"config": DataConfig(max_words=5, threads=2, vectors_mean_of=3)}
    seen = set()
    for batch, again in zip(
        take_batches(make_loader(told, [0, 1], **mean_of), 4), take_batches(make_loader(told, [0, 1]), 4), strict=True
    ):
        assert torch.equal(batch.captions.tokens, again.captions.tokens)  # the words are those of the caption drawn
        for key, own, found in zip(batch.ids, expected(told, batch), batch.captions.vectors, strict=True):
            of_picture = [torch.from_numpy(vector(key, number)) for number in range(5)]
            pairs = [(a, b) for a in range(5) for b in range(a)]
            fits = [
                pair
                for pair in pairs
                if torch.allclose(found, (own + of_picture[pair[0]] + of_picture[pair[1]]) / 3, atol=1e-6)
            ]
            assert len(fits) == 1 and not any(torch.equal(of_picture[i], own) for i in fits[0])
            seen.add(fits[0])
    assert len(seen) > 5
    (batch,) = take_batches(make_loader(told, [0], config=DataConfig(max_words=5, vectors_mean_of=9)), 1)
    for key, found in zip(batch.ids, batch.captions.vectors, strict=True):
        assert torch.allclose(found, torch.from_numpy(vectors(key, 5).mean(0)), atol=1e-6)


def test_bad_vectors_quarantine_their_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bad = {
        "s0003": npy(vectors("s0003", 4)),
        "s0005": npy(vectors("s0005", 5))[:-4],
        "s0007": npy(np.full((5, DIM), np.nan, np.float32)),
        "s0009": npy(vectors("s0009", 5).astype(np.float16)),
    }
    real = sample_format.member
    spoilt = {f"{key}.vectors.npy": data for key, data in bad.items()}
    monkeypatch.setattr(sample_format, "member", lambda name, data: real(name, spoilt.get(name, data)))
    dataset = write(tmp_path / "set", [spoken(n) for n in range(24)])
    stream = make_loader(dataset, [0, 1], total_groups=2)
    batches = take_batches(stream, 4)
    assert set(stream.quarantine) == set(bad)
    assert "not finite" in stream.quarantine["s0007"] and "5 x 7 elements of float32" in stream.quarantine["s0005"]
    for batch in batches:
        assert not set(batch.ids) & set(bad) and torch.equal(batch.captions.vectors, expected(dataset, batch))
    problems = check(dataset)
    assert [sentence.split(":")[0] for sentence in problems] == [f"train-00000.tar, sample {key}" for key in bad]
    assert "its sentence vectors are not 5 x 7 elements of float32" in problems[0]


def test_a_sample_without_vectors_in_a_set_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = sample_format.member
    with monkeypatch.context() as patch:
        patch.setattr(
            sample_format, "member", lambda name, data: b"" if name == "s0003.vectors.npy" else real(name, data)
        )
        dataset = write(tmp_path / "set", [spoken(n) for n in range(8)])
    stream = make_loader(dataset, [0], total_groups=1)
    take_batches(stream, 2)
    assert stream.quarantine == {"s0003": "has no sentence vectors"}
    assert any("holds 23 members; the manifest needs 24" in sentence for sentence in check(dataset))


# ------------------------------------------------------------------------------------------------ checked
def check(dataset: Dataset) -> list[str]:
    found = []
    for split in dataset.splits.values():
        rows = [_expected(split, i, frozenset()) for i in range(len(split))]
        for shard in split.shards:
            mine, rows = rows[: shard.samples], rows[shard.samples :]
            report = check_shard(storage.join(dataset.url, shard.name), shard, mine, False, dataset.vector_info)
            found += report.problems.sentences
    return found


@pytest.mark.whole
def test_a_sound_set_is_found_sound(told: Dataset):
    assert check_shards.main([told.url, "--processes", "1"]) == 0


# ------------------------------------------------------------------------------------------------ embedded
def of_words(given: CaptionedSamples) -> list[np.ndarray]:
    return [np.array([[len(c), ord(c[0])] for c in captions], np.float32).reshape(-1, 2) for _, captions in given]


FACTS = SentenceVectorInfo(2, "float32", {"name": "lengths"})


def test_an_embedded_set_is_the_same_with_vectors(told: Dataset, tmp_path: Path):
    plain = write(
        tmp_path / "plain", [replace(spoken(n, "train" if n < 40 else "test"), vectors=None) for n in range(46)]
    )
    embed_set(plain, str(tmp_path / "new"), of_words, FACTS)
    new = Dataset.open(str(tmp_path / "new"))
    assert not (tmp_path / "new" / "progress").exists() and check(new) == []
    assert new.vector_info == FACTS and new.vocabulary == plain.vocabulary and new.source == plain.source
    for name, split in plain.splits.items():
        assert new.split(name).keys == split.keys and new.split(name).shard_sizes == split.shard_sizes
        assert [new.split(name).captions(i) for i in range(len(split))] == [
            split.captions(i) for i in range(len(split))
        ]
    for ours, theirs in zip(
        take_batches(make_loader(new, [0, 1]), 3), take_batches(make_loader(plain, [0, 1]), 3), strict=True
    ):
        assert ours.ids == theirs.ids and torch.equal(ours.images[-1], theirs.images[-1])
        words = [new.vocabulary.words[token] for token in ours.captions.tokens[:, 0].tolist()]
        assert torch.equal(ours.captions.vectors, torch.tensor([[len(w), ord(w[0])] for w in words]).float())
    again = embed_set(new, str(tmp_path / "again"), of_words, SentenceVectorInfo(2, "float16", {"name": "lengths"}))
    assert again["vectors"]["dtype"] == "float16"  # a set that has vectors gets others


def test_what_was_cut_off_goes_on(told: Dataset, tmp_path: Path):
    embed_set(told, str(tmp_path / "whole"), of_words, FACTS)
    calls: list[str] = []

    def cut(given: CaptionedSamples) -> list[np.ndarray]:
        calls.append(given[0][0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return of_words(given)

    out = str(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        embed_set(told, out, cut, FACTS)
    with pytest.raises(ValueError, match="was begun with other data or another encoder"):
        embed_set(told, out, of_words, SentenceVectorInfo(2, "float16", {"name": "lengths"}))
    (tmp_path / "cut" / "train-00000.tar").write_bytes(b"torn")
    embed_set(told, out, cut, FACTS)
    assert calls == ["s0040", "s0000", "s0017", "s0000", "s0017", "s0034"]  # the shard of the test split stays
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "cut").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    with pytest.raises(ValueError, match="holds a finished shard set already"):
        embed_set(told, out, of_words, FACTS)


def test_captions_without_a_vector_are_left_out_and_counted(told: Dataset, tmp_path: Path):
    def no_r(given: CaptionedSamples) -> list[np.ndarray]:
        found = of_words(given)
        for (key, captions), rows in zip(given, found, strict=True):
            rows[[key == "s0004" or c.startswith("r") for c in captions]] = np.nan
        return found

    said = embed_set(told, str(tmp_path / "new"), no_r, FACTS)
    new = Dataset.open(str(tmp_path / "new"))
    assert "s0004" not in new.split("train").keys and len(new.split("train")) == 39
    assert not {"red", "round"} & set(new.vocabulary.words) and check(new) == []
    before = sum(len(told.split(name).captions(i)) for name in told.splits for i in range(len(told.split(name))))
    after = sum(len(new.split(name).captions(i)) for name in new.splits for i in range(len(new.split(name))))
    assert said["without_vector"] == {"samples": 1, "captions": before - after}


def vectors_file(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **arrays)  # type: ignore[arg-type]
    elif path.suffix == ".safetensors":
        safetensors.numpy.save_file(arrays, path)
    else:
        rows = [(key, i, row.tolist()) for key, found in arrays.items() for i, row in reversed(list(enumerate(found)))]
        columns = {name: [row[i] for row in rows] for i, name in enumerate(("key", "caption", "vector"))}
        pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".parquet"])
def test_files_of_vectors_are_read(tmp_path: Path, suffix: str):
    arrays = {f"s{n:04d}": vectors(f"s{n:04d}", 3) for n in range(4)}
    file = VectorsFile(vectors_file(tmp_path / f"v{suffix}", arrays))
    assert file.dim == DIM and len(file.sha256()) == 64
    found = file.of([("s0002", "abc"), ("s0000", "abc")])
    assert np.array_equal(found[0], arrays["s0002"]) and np.array_equal(found[1], arrays["s0000"])
    assert found[0].dtype == np.float32
    with pytest.raises(ValueError, match="has no vectors of sample 's9', and 4 others"):
        file.of([("s9", "a")])
    with pytest.raises(ValueError, match="vectors of sample 's0001' are 3 x 7; its captions need 5 x 7"):
        file.of([("s0001", "abcde")])


def test_files_that_hold_no_vectors_give_a_sentence(tmp_path: Path):
    objects = np.empty((2, 2), dtype=object)
    np.savez(tmp_path / "code.npz", s1=objects)
    np.savez(tmp_path / "whole.npz", s1=np.zeros((2, 3), dtype=np.int64))
    np.savez(tmp_path / "none.npz")
    (tmp_path / "junk.npz").write_bytes(b"junk")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    (tmp_path / "junk.parquet").write_bytes(b"junk")
    pq.write_table(
        pa.table({"key": ["a", "b"], "caption": [0, 0], "vector": [[1.0], [1.0, 2.0]]}), tmp_path / "odd.parquet"
    )
    pq.write_table(pa.table({"key": ["a"], "caption": [1], "vector": [[1.0]]}), tmp_path / "late.parquet")
    for name, says in (
        ("code.npz", "allow_pickle=False"),
        ("whole.npz", "give floating numbers"),
        ("none.npz", "holds no vectors"),
        ("junk.npz", "junk.npz: not a npz file of vectors"),
        ("junk.safetensors", "not a safetensors file"),
        ("junk.parquet", "not a parquet file"),
        ("odd.parquet", "differ in length"),
        ("late.parquet", r"captions \[1\]; they count from 0"),
        ("missing.npz", "No such file"),
        ("v.pkl", "files of vectors end in .npz, .safetensors, .parquet"),
    ):
        with pytest.raises(ValueError, match=says):
            VectorsFile(tmp_path / name)


# ------------------------------------------------------------------------------------------------ encoders
@pytest.fixture(scope="module", params=["damsm", "char_text"])
def text_export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An export of an untrained text encoder that knows the words of the emoji and of these tests' samples."""
    words = ("<end>", *dict.fromkeys([*WORDS, *Dataset.open(emoji()).vocabulary.words[1:]]))
    name, extent = request.param, replace(toy_gan.DATA_INFO, words=words)
    run = small_systems.config(name)
    plan = StageRun(run, name).build_info(extent)
    torch.manual_seed(2)
    system = StageRun(run, name).build(plan)
    index = {
        "system": name,
        "config": to_dict(StageRun(run, name).model_config()),
        "plan": plan.describe(),
        "vocabulary": list(words),
        "images": 7,
    }
    url = str(tmp_path_factory.mktemp(name))
    export.write(url, {dotted.rpartition(".")[2]: exported_network(system, dotted) for dotted in system.exports}, index)
    return url


def emoji() -> str:
    return str(Path(__file__).parents[2] / "t2idist" / "data" / "embedded" / "emoji")


def test_an_export_encodes_sentences_each_by_itself(text_export: str):
    encoder = open_encoder(text_export, CPU)
    assert encoder.dim == 16 and len(encoder.facts["sha256"]) == 64
    said = ["red round", "happy", "zqz qqxq", "red round zqz"]
    found = encoder.encode(said)
    assert np.isnan(found[2]).all() and np.isfinite(found[[0, 1, 3]]).all()
    assert np.abs(found[0] - found[1]).max() > 1e-5
    assert np.allclose(found[0], found[3], atol=1e-6), "unknown words are left out"
    for sentence, row in zip(said[:2], found, strict=False):
        assert np.allclose(encoder.encode([sentence])[0], row, atol=1e-6)
    captions = encode_sentences(encoder, said[:2])
    assert torch.allclose(captions.vectors, torch.from_numpy(found[:2]), atol=1e-6) and len(captions) == 2
    with pytest.raises(ValueError, match='"zqz qqxq": the encoder knows no word'):
        encode_sentences(encoder, said)


def test_what_is_no_encoder_gives_a_sentence(tmp_path: Path):
    with pytest.raises(ValueError, match=r"encoder 'minilm': allowed are all-minilm-l6-v2, a folder"):
        open_encoder("minilm", CPU)
    with pytest.raises(ValueError, match="no export here"):
        open_encoder(str(tmp_path), CPU)


@pytest.mark.whole
@pytest.mark.parametrize("text_export", ["damsm"], indirect=True)
def test_the_tool_embeds_emoji_by_an_export(text_export: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = str(tmp_path / "new")
    words = ["--data", "emoji", "--to", out, "--encoder", text_export, "--dtype", "float16"]
    assert embed_captions.main(words) == 0
    assert "sentence vectors: 16 numbers of float16" in capsys.readouterr().out
    old, new = Dataset.open(emoji()), Dataset.open(out)
    assert (
        new.vector_info is not None
        and new.vector_info.encoder["sha256"] == open_encoder(text_export, CPU).facts["sha256"]
    )
    assert new.split("val").keys == old.split("val").keys and new.vocabulary == old.vocabulary
    loaded = load_split(new, "val", sizes=(32,), max_words=18, limit=20)
    direct = open_encoder(text_export, CPU).encode([captions[0] for captions in loaded.captions])
    assert np.allclose(loaded.batch.captions.vectors.numpy(), direct, atol=2e-3)
    assert check_shards.main([out, "--processes", "1"]) == 0
    assert embed_captions.main(words) == 2 and "holds a finished shard set" in capsys.readouterr().err


@pytest.mark.whole
def test_the_tool_embeds_emoji_by_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    old = Dataset.open(emoji())
    arrays = {}
    for number, split in enumerate(old.splits.values()):
        for i, key in enumerate(split.keys):
            count = len(split.captions(i))
            arrays[key] = np.random.default_rng([number, i]).normal(size=(count, 12)).astype(np.float32)
    file = vectors_file(tmp_path / "made.npz", arrays)
    words = ["--data", "emoji", "--to", str(tmp_path / "new"), "--encoder"]
    del arrays[old.split("val").keys[0]]
    short = vectors_file(tmp_path / "short.npz", arrays)
    assert embed_captions.main([*words, str(short)]) == 2
    assert f"has no vectors of sample '{old.split('val').keys[0]}'" in capsys.readouterr().err
    assert embed_captions.main([*words, str(file)]) == 2 and "begun with other" in capsys.readouterr().err
    assert embed_captions.main([*words, str(file), "--restart"]) == 0
    loaded = load_split(Dataset.open(str(tmp_path / "new")), "test", sizes=(32,), max_words=18, limit=9)
    for key, found in zip(loaded.batch.ids, loaded.batch.captions.vectors, strict=True):
        split = old.split("test")
        number = list(old.splits).index("test")
        count = len(split.captions(split.keys.index(key)))
        whole = np.random.default_rng([number, split.keys.index(key)]).normal(size=(count, 12)).astype(np.float32)
        assert np.array_equal(found.numpy(), whole[0])


@pytest.mark.whole
@pytest.mark.parametrize("text_export", ["char_text"], indirect=True)
def test_a_system_is_trained_on_vectors_and_drawn_from_by_their_encoder(
    text_export: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    assert embed_captions.main(["--data", "emoji", "--to", str(tmp_path / "set"), "--encoder", text_export]) == 0
    data = {"source": str(tmp_path / "set"), "max_words": 6, "vectors_mean_of": 2}
    stage = {"system": "gan_cls", "group_size": 4, "groups": 2, "images": 16, "model": small_systems.MODELS["gan_cls"]}
    given = {"name": "run", "storage": str(tmp_path), "precision": "float32", "data": data, "stages": {"gan": stage}}
    worker.main(from_dict(RunConfig, {**given, "report": {"captions": ["a red heart"]}}), CPU, worker.WorkerContext())
    assert "reads the data's sentence vectors, which these captions do not have" in caplog.text
    assert (tmp_path / "run/gan/pictures/images_000000016.png").exists()
    url = str(tmp_path / "run/gan/export")
    assert set(export.read(url).weights) == {"generator"}
    command = ["--export", url, "--out", str(tmp_path / "out"), "--text", "a red heart", "--text", "smiling face"]
    capsys.readouterr()
    assert sampler.main(command) == 2
    assert f"sentence vectors of 16 elements, made by {text_export}; give" in capsys.readouterr().err
    assert sampler.main([*command, "--encoder", text_export, "--n", "2"]) == 0
    assert capsys.readouterr().err == "" and len(list((tmp_path / "out").iterdir())) == 5
    assert sampler.main([*command[:4], "--interpolate-text", "red heart", "face", "--encoder", text_export]) == 0
    assert sampler.main([*command, "--text", "qqxq zqz", "--encoder", text_export]) == 2
    assert '"qqxq zqz": the encoder knows no word' in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(small_systems.MODELS, "damsm", {**small_systems.MODELS["damsm"], "embedding_dim": 8})
        small_systems.write_export("damsm", str(tmp_path / "short"), ("<end>", *toy_gan.DATA_INFO.words[1:]))
    assert sampler.main([*command, "--encoder", str(tmp_path / "short")]) == 2
    assert "gives 8 elements; the export reads vectors of 16" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sentence_transformer_runs_offline():
    """Needs the extra 'text', which `make test-slow` installs."""
    encoder = open_encoder("all-minilm-l6-v2", CPU)
    found = encoder.encode(["a red heart", "a crimson heart", "an old steam engine"])
    assert encoder.dim == 384 and found.shape == (3, 384)
    near, far = found[0] @ found[1], found[0] @ found[2]
    assert near > 0.6 and near > far + 0.3
