"""The command t2idist score on small exports: chunks, workers, resuming, files and errors."""

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
from t2idist.evaluate.feature_extractors import ExtractorOutput, WeightsFile
from t2idist.evaluate.score import Settings
from t2idist.launch.parallel import map_unordered
from tests.helpers import small_systems
from tests.helpers.shard_sets import make_sample, write_set


class Pooled:
    """Cheap extractor: mean colours of 6 x 6 cells, and logits from them."""

    dim, classes = 108, 5
    facts = {"name": "pooled", "weights": "none", "sha256": "", "resize": "mean of 6 x 6"}  # noqa: RUF012

    def __init__(self, weights: WeightsFile, device: torch.device) -> None: ...

    def __call__(self, images: Tensor) -> ExtractorOutput:
        features = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 6).flatten(1)
        return ExtractorOutput(features, 8 * features[:, :5])


@pytest.fixture(autouse=True)
def _pooled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(feature_extractors.EXTRACTORS, "pooled", Pooled)
    yield
    score_chunks._cached_extractor.cache_clear()
    score_chunks._cached_export.cache_clear()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with exports of untrained networks whose data are avatars."""
    folder = tmp_path_factory.mktemp("scored")
    data = DataConfig(source="avatars", samples=900, size=32, crop=1.0, cache=str(folder / "cache"))
    words = open_dataset(data).vocabulary.words
    for system in ("attngan", "damsm"):
        # the vocabulary size of the small networks
        small_systems.write_export(system, str(folder / system / "export"), words[:40])
        index_file = folder / system / "export/export.json"
        index = json.loads(index_file.read_text()) | {"data": {"settings": to_dict(data)}, "seed": 3}
        index_file.write_text(json.dumps(index))
    return folder


def settings(run: Path, out: Path, **values: Any) -> Settings:
    options = {"metrics": ("kid",), "extractor": "pooled", "n": 150, "train": 300, "bootstrap": 0, **values}
    return Settings(str(run / "attngan/export"), out=str(out), **options)


@pytest.mark.whole
def test_all_metrics_are_written_with_their_protocol(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--export", str(run / "attngan/export"), "--extractor", "pooled", "--n", "160", "--train", "300"]
    arguments += ["--metrics", "fid,kid,is,prdc,r_precision,damsm_r,memorisation", "--judge", str(run / "damsm/export")]
    arguments += ["--out", str(tmp_path / "scores"), "--fail-above", "kid=0.01", "--fail-below", "precision=0"]
    assert score.main(arguments) == 1, "an untrained generator is far from real"
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
        assert row["chance"] == 0.01 and row["value"] - row["chance"] < 3 * row["error"] + 0.01, (
            "an untrained generator ignores the text"
        )
    assert rows["r_precision"]["real"] > 0.1, "real images retrieve their own caption"
    protocol = result["protocol"]
    assert protocol["generated"] == 160 and protocol["train"] == 300 and protocol["pixels"] == 32
    assert protocol["extractors"][0] == Pooled.facts and protocol["extractors"][1]["name"] == "damsm"
    assert all(text in out for text in ("generated: 160", "extractor: name pooled", "kid_subset", "version"))
    assert {row["name"] for row in result["breakdown"]["attributes"]} >= {"Eyeglasses", "Wearing_Hat"}
    assert all(row["n"] >= 20 for kind in result["breakdown"].values() for row in kind)
    for name in ("best", "worst", "nearest"):
        assert (tmp_path / "scores" / result["sheets"][name]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.whole
def test_interrupted_scoring_resumes_with_the_same_result(run: Path, tmp_path: Path) -> None:
    options = settings(run, tmp_path, metrics=("fid", "r_precision"))
    first = score.score(options)
    chunks = sorted((tmp_path / "work").rglob("*.safetensors"))
    assert len(chunks) == 7, "two of generated images, two of real ones, three of training images"
    kept = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in chunks}
    chunks[0].unlink()
    again = score.score(options)
    assert again["scores"] == first["scores"]
    assert chunks[0].read_bytes() == kept[chunks[0]][0]
    assert all(file.stat().st_mtime_ns == kept[file][1] for file in chunks[1:]), "only the missing chunk was computed"
    other = score.score(replace(options, truncation=0.5))
    new = set((tmp_path / "work").rglob("*.safetensors")) - set(chunks)
    assert {file.name.partition("-")[0] for file in new} == {"generated"}, "real images are used again"
    earlier = json.loads((tmp_path / "earlier-1/scores.json").read_text())
    assert earlier == json.loads(json.dumps(again)), "the first scores are kept, not overwritten"
    assert (tmp_path / "earlier-1/best.png").read_bytes() != (tmp_path / "best.png").read_bytes()
    added = score.score(replace(options, truncation=0.5, metrics=("r_precision",)))
    assert [row["name"] for row in added["scores"]] == ["fid", "r_precision"], "of the same protocol: completed"
    assert not (tmp_path / "earlier-2").exists()
    assert other["scores"][0]["value"] != first["scores"][0]["value"]
    assert score.differences(other["protocol"], first["protocol"]) == ["truncation: 0.5 here, None there"]
    comparison = score.compare(other, first, "x")
    assert "DIFFERENT PROTOCOL" in comparison and "truncation: 0.5 here, None there" in comparison
    assert "the same protocol" in score.compare(again, first, "x")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_any_number_of_workers_gives_the_same_values(run: Path, tmp_path: Path) -> None:
    metrics = ("fid", "kid", "is", "prdc", "r_precision")
    options = settings(run, tmp_path / "0", metrics=metrics, extractor="efficientnet-lite0", train=130)
    in_process = score.score(options)["scores"]
    assert len(in_process) == 8
    for workers in (1, 2, 3):
        parallel_options = replace(options, out=str(tmp_path / str(workers)), workers=workers)
        several = score.score(parallel_options, map_unordered)["scores"]
        for ours, theirs in zip(several, in_process, strict=True):
            assert ours["value"] == pytest.approx(theirs["value"], rel=1e-6, abs=1e-9), ours["name"]


def assert_rejected(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert score.main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("score: ") and err.count("\n") == 1 and "Traceback" not in err


def test_invalid_input_gives_one_sentence(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--export", str(run / "attngan/export"), "--out", str(tmp_path), "--extractor", "pooled"]
    for arguments, message in (
        (["--metrics", "fidd"], "--metrics fidd: allowed are fid, kid"),
        (["--n", "1"], "--n 1: give at least 2"),
        (["--jpeg", "101"], "--jpeg 101: allowed are 1 to 100"),
        (["--split", "dev"], "--split dev: the data has"),
        (["--metrics", "damsm_r"], "give a DAMSM of another run with --judge"),
        (
            ["--metrics", "kid", "--n", "40", "--subset", "1000"],
            "--subset 1000: there are 144 real and 40 generated images; give more",
        ),
        (["--metrics", "prdc", "--n", "4"], "5 neighbours need at least 20"),
        (["--metrics", "is", "--n", "4"], "--splits 10: there are"),
        (["--fail-above", "kid"], "--fail-above kid: expected NAME=VALUE"),
        (
            ["--metrics", "r_precision", "--n", "40"],
            "one of the generated images has only 38; leave it out of --metrics, or give a larger --n or --split",
        ),
        (["--beside", str(tmp_path / "other")], "has no scores.json"),
        (["--data", "emoji"], "words of this data; it was trained on other captions"),
        (["--data", "nowhere"], "nowhere"),
        (["--extractor", "inception-2015", "--weights", "/no/file", "--weights-sha256", "0" * 64], "no such file"),
    ):
        assert_rejected([*base, *arguments], message, capsys)
    assert not (tmp_path / "work").exists(), "nothing was generated for any of these"
    assert score.main([*base, "--metrics", "kid", "--n", "40", "--fail-above", "kidd=1"]) == 2
    assert "kidd was not measured; use kid" in capsys.readouterr().err
    assert_rejected(["--export", str(run / "damsm/export"), "--out", str(tmp_path)], "does not generate images", capsys)
    assert_rejected(["--export", str(tmp_path / "none")], "none", capsys)


def test_map_in_process_runs_in_order_and_rejects_workers() -> None:
    assert list(score.map_in_process(str, (1, 2), 0)) == ["1", "2"]
    with pytest.raises(ValueError, match="--workers 2: only the command t2idist score starts worker processes"):
        list(score.map_in_process(str, (1, 2), 2))


def test_bias_of_few_images_is_that_of_as_many_real_ones(run: Path, tmp_path: Path) -> None:
    rows = {n: score.score(settings(run, tmp_path / str(n), metrics=("fid",), n=n))["scores"][0] for n in (8, 40)}
    assert rows[8]["bias"] > 2 * rows[40]["bias"] > 0, "fewer images have a larger bias"
    assert "bias: 8 real images against" in rows[8]["note"] and "8 images are few for 108 features" in rows[8]["note"]
    many = score.score(settings(run, tmp_path / "150", metrics=("fid", "kid"), n=150))
    fid, kid = many["scores"]
    assert fid["bias"] == fid["real"] and "too few for 150" in fid["note"] and kid["bias"] is None
    assert "bias" in score.table(many)


@pytest.mark.parametrize(
    ("source", "splits", "expected"),
    [
        ("coco", {"train": 1, "val": 1, "test": 1}, "val"),
        ("coco", {"train": 1, "val": 1}, "val"),
        ("folder", {"train": 1, "val": 1, "test": 1}, "test"),
        ("folder", {"train": 1, "val": 1}, "val"),
        ("folder", {"train": 1, "val": 1, "test": 0}, "val"),
        ("celeba", {"train": 0, "val": 0, "test": 0}, "test"),
        ("folder", {"train": 1}, "test"),
    ],
)
def test_split_that_is_scored_by_default(tmp_path: Path, source: str, splits: dict[str, int], expected: str) -> None:
    """`splits`: captions of each image. COCO is scored on val, as in the papers."""
    samples = [
        replace(make_sample(number, split), captions=("a bird",) * captions)
        for number, (split, captions) in enumerate(splits.items())
    ]
    assert score.default_split(replace(write_set(tmp_path / "set", samples), source=source)) == expected
