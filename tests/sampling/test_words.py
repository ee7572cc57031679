"""The sampler tokenizes as training did: the tokenizer goes from the data to the export and on."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from t2idist.config import RunConfig
from t2idist.config.strict import from_dict
from t2idist.data.shards import Dataset
from t2idist.data.tokenizer import ASCII, UNICODE
from t2idist.sampling import sample
from t2idist.sampling.generate import encode_captions
from t2idist.sampling.loading import load_export
from t2idist.training import worker
from tests.helpers import small_systems
from tests.helpers.shard_sets import make_sample, write_set

CPU = torch.device("cpu")
CAPTIONS = ("ein gr\u00fcner Vogel", "\u7ea2\u8272\u7684\u9e1f")


def train(folder: Path, tokenizer: str) -> tuple[Dataset, str]:
    """Train DAMSM and AttnGAN for a few steps. Returns the data, and the URL of the generator's export."""
    samples = [replace(make_sample(number), captions=CAPTIONS) for number in range(16)]
    dataset = write_set(folder / "set", samples, tokenizer=tokenizer)
    scale = {"group_size": 4, "groups": 2, "images": 16}
    stages = {
        "damsm": {"system": "damsm", **scale, "model": small_systems.MODELS["damsm"]},
        "attngan": {
            "system": "attngan", **scale, "model": small_systems.MODELS["attngan"], "uses": {"damsm": "damsm"},
        },
    }  # fmt: skip
    config = {"name": "run", "storage": str(folder), "data": {"source": str(folder / "set"), "max_words": 6}}
    worker.main(from_dict(RunConfig, {**config, "stages": stages}), CPU, worker.WorkerContext())
    return dataset, str(folder / "run/attngan/export")


def test_the_sampler_tokenizes_as_training_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset, url = train(tmp_path, UNICODE)
    for stage in ("damsm", "attngan"):
        assert json.loads((tmp_path / f"run/{stage}/export/export.json").read_text())["tokenizer"] == UNICODE
    vocabulary = load_export(url, CPU).vocabulary
    assert vocabulary == dataset.vocabulary and "gr\u00fcner" in vocabulary.ids and "\u9e1f" in vocabulary.ids
    decomposed = unicodedata.normalize("NFD", CAPTIONS[0])
    (tmp_path / "captions.txt").write_bytes(f"{CAPTIONS[0]}\n{decomposed}\n{CAPTIONS[1]}\n".encode("utf-16"))
    capsys.readouterr()
    arguments = ["--export", url, "--out", str(tmp_path / "out"), "--n", "1"]
    assert sample.main([*arguments, "--captions", str(tmp_path / "captions.txt")]) == 0
    assert "not in the vocabulary" not in capsys.readouterr().err
    assert len(list((tmp_path / "out").glob("00*.png"))) == 3
    composed, same, other = encode_captions(vocabulary, [CAPTIONS[0], decomposed, CAPTIONS[1]], 6).tokens.tolist()
    trained = [dataset.vocabulary.encode(caption, 6)[0].tolist() for caption in CAPTIONS]
    assert composed == same == trained[0] and other == trained[1] and len(set(other)) == 5


def test_an_export_without_a_tokenizer_reads_ascii_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, url = train(tmp_path, ASCII)
    assert "tokenizer" not in json.loads((tmp_path / "run/attngan/export/export.json").read_text())
    vocabulary = load_export(url, CPU).vocabulary
    assert vocabulary.tokenizer == ASCII and set(vocabulary.words) == {"<end>", "ein", "grner", "vogel"}
    capsys.readouterr()
    arguments = ["--export", url, "--out", str(tmp_path / "out"), "--n", "1"]
    assert sample.main([*arguments, "--text", "ein \u7ea2\u8272 Vogel"]) == 0
    assert "'\u7ea2\u8272'" in capsys.readouterr().err


def test_a_sentence_in_an_encoding_that_is_not_named_is_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "captions.txt"
    file.write_bytes("ein Vogel\nein gr\u00fcner Vogel\n".encode("cp1252"))
    arguments = ["--export", str(tmp_path), "--out", str(tmp_path / "out"), "--captions", str(file)]
    assert sample.main(arguments) == 2
    assert "captions.txt, line 2: byte 0xfc is not UTF-8" in capsys.readouterr().err
