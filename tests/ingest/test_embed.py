"""Adding sentence vectors to a shard set, and tools/embed_captions.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from t2idist.config import RunConfig
from t2idist.config.strict import from_dict, to_dict
from t2idist.data.loader import load_split
from t2idist.data.shards import Dataset, SentenceVectorInfo
from t2idist.data.tokenizer import UNICODE
from t2idist.engine.checkpoint import export
from t2idist.ingest.embed import CaptionedSamples, embed_set
from t2idist.sampling import sample as sampler
from t2idist.sampling.loading import exported_network
from t2idist.sampling.sentence_encoders import open_encoder, vector_captions
from t2idist.training import worker
from t2idist.training.stages import StageRun
from tests.helpers import small_systems, toy_gan
from tests.helpers.shard_sets import WORDS, make_loader, take_batches, write_set
from tests.ingest.vector_sets import (
    CPU,
    emoji,
    find_problems,
    make_vector_sample,
    write_vectors_file,
)
from tools import check_shards, embed_captions


def encode_lengths(samples: CaptionedSamples) -> list[np.ndarray]:
    return [np.array([[len(c), ord(c[0])] for c in captions], np.float32).reshape(-1, 2) for _, captions in samples]


INFO = SentenceVectorInfo(2, "float32", {"name": "lengths"})


def test_embed_set_changes_only_the_vectors(vector_set: Dataset, tmp_path: Path):
    plain = write_set(
        tmp_path / "plain",
        [replace(make_vector_sample(n, "train" if n < 40 else "test"), vectors=None) for n in range(46)],
        tokenizer=UNICODE,
    )
    embed_set(plain, str(tmp_path / "new"), encode_lengths, INFO)
    new = Dataset.open(str(tmp_path / "new"))
    assert not (tmp_path / "new" / "progress").exists() and find_problems(new) == []
    assert new.vector_info == INFO and new.vocabulary == plain.vocabulary and new.source == plain.source
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
    again = embed_set(
        new, str(tmp_path / "again"), encode_lengths, SentenceVectorInfo(2, "float16", {"name": "lengths"})
    )
    assert again["vectors"]["dtype"] == "float16"  # vectors are replaced


def test_an_interrupted_embed_set_resumes(vector_set: Dataset, tmp_path: Path):
    embed_set(vector_set, str(tmp_path / "whole"), encode_lengths, INFO)
    calls: list[str] = []

    def interrupted(samples: CaptionedSamples) -> list[np.ndarray]:
        calls.append(samples[0][0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode_lengths(samples)

    out = str(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        embed_set(vector_set, out, interrupted, INFO)
    with pytest.raises(ValueError, match="was started with other data or another encoder"):
        embed_set(vector_set, out, encode_lengths, SentenceVectorInfo(2, "float16", {"name": "lengths"}))
    (tmp_path / "cut" / "train-00000.tar").write_bytes(b"torn")
    embed_set(vector_set, out, interrupted, INFO)
    assert calls == ["s0040", "s0000", "s0017", "s0000", "s0017", "s0034"]  # the shard of the test split is kept
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "cut").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    with pytest.raises(ValueError, match="holds a finished shard set already"):
        embed_set(vector_set, out, encode_lengths, INFO)


def test_captions_without_a_vector_are_excluded_and_counted(vector_set: Dataset, tmp_path: Path):
    def without_r(samples: CaptionedSamples) -> list[np.ndarray]:
        vectors = encode_lengths(samples)
        for (key, captions), rows in zip(samples, vectors, strict=True):
            rows[[key == "s0004" or c.startswith("r") for c in captions]] = np.nan
        return vectors

    description = embed_set(vector_set, str(tmp_path / "new"), without_r, INFO)
    new = Dataset.open(str(tmp_path / "new"))
    assert "s0004" not in new.split("train").keys and len(new.split("train")) == 39
    assert not {"red", "round"} & set(new.vocabulary.words) and find_problems(new) == []
    before = sum(
        len(vector_set.split(name).captions(i))
        for name in vector_set.splits
        for i in range(len(vector_set.split(name)))
    )
    after = sum(len(new.split(name).captions(i)) for name in new.splits for i in range(len(new.split(name))))
    assert description["without_vector"] == {"samples": 1, "captions": before - after}


@pytest.fixture(scope="module", params=["damsm", "char_text"])
def text_export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An export of an untrained text encoder with the words of the emoji and of the samples in these tests."""
    words = ("<end>", *dict.fromkeys([*WORDS, *Dataset.open(emoji()).vocabulary.words[1:]]))
    name, data = request.param, replace(toy_gan.DATA_INFO, words=words)
    run = small_systems.config(name)
    build_info = StageRun(run, name).build_info(data)
    torch.manual_seed(2)
    system = StageRun(run, name).build(build_info)
    index = {
        "system": name,
        "config": to_dict(StageRun(run, name).model_config()),
        "plan": build_info.describe(),
        "vocabulary": list(words),
        "images": 7,
    }
    url = str(tmp_path_factory.mktemp(name))
    export.write(url, {dotted.rpartition(".")[2]: exported_network(system, dotted) for dotted in system.exports}, index)
    return url


def test_export_encoders_encode_each_sentence_independently(text_export: str):
    encoder = open_encoder(text_export, CPU)
    assert encoder.dim == 16 and len(encoder.facts["sha256"]) == 64
    sentences = ["red round", "happy", "zqz qqxq", "red round zqz"]
    vectors = encoder.encode(sentences)
    assert np.isnan(vectors[2]).all() and np.isfinite(vectors[[0, 1, 3]]).all()
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-5
    assert np.allclose(vectors[0], vectors[3], atol=1e-6), "unknown words are skipped"
    for sentence, row in zip(sentences[:2], vectors, strict=False):
        assert np.allclose(encoder.encode([sentence])[0], row, atol=1e-6)
    captions = vector_captions(vectors[:2])
    assert torch.equal(captions.vectors, torch.from_numpy(vectors[:2])) and len(captions) == 2


def test_open_encoder_refuses_unknown_names(tmp_path: Path):
    with pytest.raises(ValueError, match=r"encoder 'minilm': allowed are all-minilm-l6-v2, a folder"):
        open_encoder("minilm", CPU)
    with pytest.raises(ValueError, match="no export here"):
        open_encoder(str(tmp_path), CPU)


@pytest.mark.whole
@pytest.mark.parametrize("text_export", ["damsm"], indirect=True)
def test_embed_captions_uses_an_export(text_export: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = str(tmp_path / "new")
    arguments = ["--data", "emoji", "--to", out, "--encoder", text_export, "--dtype", "float16"]
    assert embed_captions.main(arguments) == 0
    assert "sentence vectors: 16 elements of float16" in capsys.readouterr().out
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
    assert embed_captions.main(arguments) == 2 and "holds a finished shard set" in capsys.readouterr().err


@pytest.mark.whole
def test_embed_captions_uses_a_vectors_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    old = Dataset.open(emoji())
    arrays = {}
    for number, split in enumerate(old.splits.values()):
        for i, key in enumerate(split.keys):
            count = len(split.captions(i))
            arrays[key] = np.random.default_rng([number, i]).normal(size=(count, 12)).astype(np.float32)
    file = write_vectors_file(tmp_path / "made.npz", arrays)
    arguments = ["--data", "emoji", "--to", str(tmp_path / "new"), "--encoder"]
    del arrays[old.split("val").keys[0]]
    short = write_vectors_file(tmp_path / "short.npz", arrays)
    assert embed_captions.main([*arguments, str(short)]) == 2
    assert f"no vectors for sample '{old.split('val').keys[0]}'" in capsys.readouterr().err
    assert embed_captions.main([*arguments, str(file)]) == 2 and "started with other" in capsys.readouterr().err
    assert embed_captions.main([*arguments, str(file), "--restart"]) == 0
    loaded = load_split(Dataset.open(str(tmp_path / "new")), "test", sizes=(32,), max_words=18, limit=9)
    for key, vector in zip(loaded.batch.ids, loaded.batch.captions.vectors, strict=True):
        split = old.split("test")
        number = list(old.splits).index("test")
        count = len(split.captions(split.keys.index(key)))
        vectors = np.random.default_rng([number, split.keys.index(key)]).normal(size=(count, 12)).astype(np.float32)
        assert np.array_equal(vector.numpy(), vectors[0])


@pytest.mark.whole
@pytest.mark.parametrize("text_export", ["char_text"], indirect=True)
def test_a_system_trains_on_vectors_and_samples_with_their_encoder(
    text_export: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    assert embed_captions.main(["--data", "emoji", "--to", str(tmp_path / "set"), "--encoder", text_export]) == 0
    data = {"source": str(tmp_path / "set"), "max_words": 6, "vectors_mean_of": 2}
    stage = {"system": "gan_cls", "group_size": 4, "groups": 2, "images": 16, "model": small_systems.MODELS["gan_cls"]}
    config = {"name": "run", "storage": str(tmp_path), "precision": "float32", "data": data, "stages": {"gan": stage}}
    worker.main(from_dict(RunConfig, {**config, "report": {"captions": ["a red heart"]}}), CPU, worker.WorkerContext())
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
    command[3] = str(tmp_path / "between")
    assert sampler.main([*command[:4], "--interpolate-text", "red heart", "face", "--encoder", text_export]) == 0
    assert sampler.main([*command, "--text", "qqxq zqz", "--encoder", text_export]) == 2
    assert '"qqxq zqz": the encoder knows no word' in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(small_systems.MODELS, "damsm", {**small_systems.MODELS["damsm"], "embedding_dim": 8})
        small_systems.write_export("damsm", str(tmp_path / "short"), ("<end>", *toy_gan.DATA_INFO.words[1:]))
    assert sampler.main([*command, "--encoder", str(tmp_path / "short")]) == 2
    assert "its vectors have 8 elements; the export reads 16" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sentence_transformer_runs_offline():
    """Needs the extra `text`, which `make test-slow` installs."""
    encoder = open_encoder("all-minilm-l6-v2", CPU)
    vectors = encoder.encode(["a red heart", "a crimson heart", "an old steam engine"])
    assert encoder.dim == 384 and vectors.shape == (3, 384)
    near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert near > 0.6 and near > far + 0.3
