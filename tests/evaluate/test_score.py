"""The score command over small exports: in pieces, anywhere, taken up again; what it writes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from t2idist.config import DataConfig
from t2idist.config.strict import to_dict
from t2idist.data.sources import open_dataset
from t2idist.evaluate import feature_extractors, score, score_chunks
from t2idist.evaluate.feature_extractors import Seen, Weights
from t2idist.evaluate.score import Settings
from tests.helpers import small_systems


class Pooled:
    """A cheap extractor: colours of places, and classes made of them."""

    dim, classes = 108, 5
    facts = {"name": "pooled", "weights": "none", "sha256": "", "resize": "mean of 6 x 6"}  # noqa: RUF012

    def __init__(self, weights: Weights, device: torch.device) -> None: ...

    def __call__(self, images: Tensor) -> Seen:
        features = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 6).flatten(1)
        return Seen(features, 8 * features[:, :5])


@pytest.fixture(autouse=True)
def _pooled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(feature_extractors.EXTRACTORS, "pooled", Pooled)
    yield
    score_chunks._looker_of.cache_clear()
    score_chunks._loaded_of.cache_clear()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with exports of untrained networks, and avatars for them."""
    folder = tmp_path_factory.mktemp("scored")
    data = DataConfig(source="avatars", samples=900, size=32, crop=1.0, cache=str(folder / "cache"))
    words = open_dataset(data).vocabulary.words
    for system in ("attngan", "damsm"):
        # as many words as the small networks know
        small_systems.write_export(system, str(folder / system / "export"), words[:40])
        about = folder / system / "export/export.json"
        index = json.loads(about.read_text()) | {"data": {"settings": to_dict(data)}, "seed": 3}
        about.write_text(json.dumps(index))
    return folder


def settings(run: Path, out: Path, **values: Any) -> Settings:
    asked = {"metrics": ("kid",), "extractor": "pooled", "n": 150, "train": 300, "bootstrap": 0, **values}
    return Settings(str(run / "attngan/export"), out=str(out), **asked)


@pytest.mark.whole
def test_all_metrics_stand_beside_their_protocol(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--export", str(run / "attngan/export"), "--extractor", "pooled", "--n", "160", "--train", "300"]
    words += ["--metrics", "fid,kid,is,prdc,r_precision,damsm_r,memorisation", "--judge", str(run / "damsm/export")]
    words += ["--out", str(tmp_path / "scores"), "--fail-above", "kid=0.01", "--fail-below", "precision=0"]
    assert score.main(words) == 1, "an untrained generator is far from real"
    out, err = capsys.readouterr()
    assert "score: kid is above 0.01" in err and "precision is below" not in err
    result = json.loads((tmp_path / "scores/scores.json").read_text())
    rows = {row["name"]: row for row in result["scores"]}
    names = [
        "fid",
        "kid",
        "is",
        "precision",
        "recall",
        "density",
        "coverage",
        "r_precision",
        "damsm_r",
        "nearest_train",
    ]
    assert list(rows) == names
    assert rows["fid"]["value"] > 10 * rows["fid"]["real"] and rows["fid"]["low"] < rows["fid"]["value"]
    assert rows["kid"]["value"] > 0.01 > abs(rows["kid"]["real"])
    assert rows["precision"]["value"] < 0.2 < 0.5 < rows["precision"]["real"]
    assert rows["nearest_train"]["value"] > 1.5
    for name in ("r_precision", "damsm_r"):
        row = rows[name]
        assert row["chance"] == 0.01 and row["value"] - row["chance"] < 3 * row["error"] + 0.01, "text is not followed"
    assert rows["r_precision"]["real"] > 0.1, "real pictures pick their own caption"
    protocol = result["protocol"]
    assert protocol["generated"] == 160 and protocol["train"] == 300 and protocol["pixels"] == 32
    assert protocol["extractors"][0] == Pooled.facts and protocol["extractors"][1]["name"] == "damsm"
    assert all(word in out for word in ("generated: 160", "extractor: name pooled", "kid_subset", "version"))
    assert {row["name"] for row in result["breakdown"]["attributes"]} >= {"Eyeglasses", "Wearing_Hat"}
    assert all(row["n"] >= 20 for kind in result["breakdown"].values() for row in kind)
    for name in ("best", "worst", "nearest"):
        assert (tmp_path / "scores" / result["sheets"][name]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.whole
def test_it_goes_on_where_it_was_and_gives_the_same(run: Path, tmp_path: Path) -> None:
    asked = settings(run, tmp_path, metrics=("fid", "r_precision"))
    first = score.score(asked)
    pieces = sorted((tmp_path / "work").rglob("*.safetensors"))
    assert len(pieces) == 7, "two of generated pictures, two of real ones, three of training"
    kept = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in pieces}
    pieces[0].unlink()
    again = score.score(asked)
    assert again["scores"] == first["scores"]
    assert pieces[0].read_bytes() == kept[pieces[0]][0]
    assert all(file.stat().st_mtime_ns == kept[file][1] for file in pieces[1:]), "only what was missing was done"
    other = score.score(replace(asked, truncation=0.5))
    new = set((tmp_path / "work").rglob("*.safetensors")) - set(pieces)
    assert {file.name.partition("-")[0] for file in new} == {"generated"}, "real pictures are the same for it"
    assert other["scores"][0]["value"] != first["scores"][0]["value"]
    assert score.differences(other["protocol"], first["protocol"]) == ["truncation: 0.5 here, None there"]
    said = score.beside(other, first, "x")
    assert "ANOTHER PROTOCOL" in said and "truncation: 0.5 here, None there" in said
    assert "the same protocol" in score.beside(again, first, "x")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_any_number_of_workers_gives_the_same(run: Path, tmp_path: Path) -> None:
    metrics = ("fid", "kid", "is", "prdc", "r_precision")
    asked = settings(run, tmp_path / "0", metrics=metrics, extractor="efficientnet-lite0", train=130)
    alone = score.score(asked)["scores"]
    assert len(alone) == 8
    for workers in (1, 2, 3):
        several = score.score(replace(asked, out=str(tmp_path / str(workers)), workers=workers))["scores"]
        for ours, theirs in zip(several, alone, strict=True):
            assert ours["value"] == pytest.approx(theirs["value"], rel=1e-6, abs=1e-9), ours["name"]


def refused(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert score.main(words) == 2
    err = capsys.readouterr().err
    assert says in err and err.startswith("score: ") and err.count("\n") == 1 and "Traceback" not in err


def test_bad_input_is_a_sentence(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--export", str(run / "attngan/export"), "--out", str(tmp_path), "--extractor", "pooled"]
    for words, says in (
        (["--metrics", "fidd"], "--metrics fidd: there are fid, kid"),
        (["--n", "1"], "--n 1: give at least 2"),
        (["--jpeg", "101"], "--jpeg 101: allowed are 1 to 100"),
        (["--split", "dev"], "--split dev: the data has"),
        (["--metrics", "damsm_r"], "give a DAMSM of another run with --judge"),
        (
            ["--metrics", "kid", "--n", "40", "--subset", "1000"],
            "--subset 1000: there are 144 real and 40 generated pictures; give more",
        ),
        (["--metrics", "prdc", "--n", "4"], "with 5 neighbours it takes at least 20"),
        (["--metrics", "is", "--n", "4"], "--splits 10: there are"),
        (["--fail-above", "kid"], "--fail-above kid: expected NAME=VALUE"),
        (
            ["--metrics", "r_precision", "--n", "40"],
            "out of 100 of other classes, and the generated pictures give one of them only",
        ),
        (["--beside", str(tmp_path / "other")], "no scores.json there"),
        (["--data", "emoji"], "words of this data; it was trained on other captions"),
        (["--data", "nowhere"], "nowhere"),
        (["--extractor", "inception-2015", "--weights", "/no/file", "--weights-sha256", "0" * 64], "no such file"),
    ):
        refused([*base, *words], says, capsys)
    assert not (tmp_path / "work").exists(), "nothing was drawn for any of these"
    assert score.main([*base, "--metrics", "kid", "--n", "40", "--fail-above", "kidd=1"]) == 2
    assert "kidd was not measured; there are kid" in capsys.readouterr().err
    refused(["--export", str(run / "damsm/export"), "--out", str(tmp_path)], "draws no pictures", capsys)
    refused(["--export", str(tmp_path / "none")], "none", capsys)
