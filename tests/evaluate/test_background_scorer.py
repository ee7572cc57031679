"""Scores during training: their share of the time, and what the scoring process writes."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from t2idist.config import DataConfig, RunConfig, ScoresConfig
from t2idist.config.strict import from_dict, to_dict
from t2idist.data.sources import open_dataset
from t2idist.data.tokenizer import Vocabulary
from t2idist.engine.checkpoint import export
from t2idist.evaluate import background_scorer
from t2idist.evaluate.background_scorer import BackgroundScorer, TimeShare, read_best, read_scores
from t2idist.evaluate.in_training import InTrainingEvaluator
from t2idist.sampling.loading import exported_network
from tests.helpers import small_systems


class Clock:
    def __init__(self) -> None:
        self.now, self.worked = 0.0, 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def work(self, seconds: float) -> None:
        self.now += seconds
        self.worked += seconds


@pytest.mark.parametrize("measured", [True, False])
def test_work_takes_its_share_of_the_time(measured: bool) -> None:
    clock = Clock()
    time_share = TimeShare(0.02, (lambda: clock.worked) if measured else None, lambda: clock.now, clock.sleep)
    for _ in range(20):
        time_share()
        clock.work(3.0)
    time_share()
    assert clock.worked == 60.0 and 0.0199 < clock.worked / clock.now <= 0.02
    time_share.unlimited = True
    before = clock.now
    clock.work(100.0)
    time_share()
    assert clock.now == before + 100.0, "no sleep when the share is unlimited"
    assert time_share.seconds_left() == TimeShare(1.0, lambda: clock.worked).seconds_left() == math.inf


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the index of an export of the small attngan, whose data are avatars."""
    folder = tmp_path_factory.mktemp("index")
    data = DataConfig(source="avatars", samples=400, size=32, crop=1.0, cache=str(folder))
    small_systems.write_export("attngan", str(folder / "export"), open_dataset(data).vocabulary.words[:40])
    index = json.loads((folder / "export" / export.INDEX).read_text())
    return {key: value for key, value in index.items() if key != "networks"} | {"data": {"settings": to_dict(data)}}


def nets() -> dict[str, Any]:
    system = small_systems.build("attngan")
    return {dotted.rpartition(".")[2]: exported_network(system, dotted) for dotted in system.exports}


def wait_for(folder: Path, count: int, scorer: BackgroundScorer) -> None:
    deadline = time.monotonic() + 120
    while len(read_scores(str(folder))) < count:
        assert time.monotonic() < deadline and scorer._process.poll() is None
        time.sleep(0.1)


@pytest.mark.whole
def test_newest_weights_are_scored_and_the_best_export_is_kept(tmp_path: Path, index: dict[str, Any]) -> None:
    config = ScoresConfig(metrics=("kid",), n=24, real=24, share=1.0)
    told: list[tuple[int, dict[str, float]]] = []
    scorer = BackgroundScorer(
        config,
        str(tmp_path),
        lambda images: {**index, "images": images},
        lambda images, scores: told.append((images, dict(scores))),
    )
    networks = nets()
    scorer.submit(networks, 100, last=False)
    scorer.submit(networks, 150, last=False)
    assert not (tmp_path / "scored/000000000150").exists(), "the process is busy"
    wait_for(tmp_path, 1, scorer)
    for parameter in networks["generator"].parameters():
        parameter.data.mul_(0.0)  # all images have one colour
    scorer.submit(networks, 200, last=False)
    wait_for(tmp_path, 2, scorer)
    for net, same in zip(networks.values(), nets().values(), strict=True):
        net.load_state_dict(same.state_dict())
    scorer.submit(networks, 300, last=True)
    scorer.close(finished=True)
    lines = read_scores(str(tmp_path))
    assert [line["images"] for line in lines] == [100, 200, 300]
    assert lines[0]["kid"] == lines[2]["kid"] != lines[1]["kid"] and lines[0]["protocol"]["generated"] == 24
    assert told == [(line["images"], {"kid": line["kid"]}) for line in lines], "also the last ones"
    best = read_best(str(tmp_path))
    assert best is not None and best["metric"] == "kid"
    assert best["value"] == min(line["kid"] for line in lines)
    folders = [f.name for f in (tmp_path / "scored").iterdir() if f.name.isdigit()]
    assert folders == [best["export"].rpartition("/")[2]], "only the best of all submitted exports is kept"
    assert export.read(str(tmp_path / best["export"])).images == best["images"]

    resumed = BackgroundScorer(config, str(tmp_path), lambda images: {**index, "images": images})
    resumed.submit(networks, 200, last=False)  # a resumed run submits the same images again
    assert not (tmp_path / "scored/000000000200").exists() or best["images"] == 200
    resumed.close(finished=False)
    assert resumed._process.poll() is not None


@pytest.mark.whole
def test_process_ends_with_its_worker(tmp_path: Path, index: dict[str, Any]) -> None:
    config = ScoresConfig(n=24, real=24, share=1e-6)  # it would sleep for weeks
    scorer = BackgroundScorer(config, str(tmp_path), lambda images: {**index, "images": images})
    scorer.submit(nets(), 100, last=False)
    assert scorer._process.stdin is not None
    scorer._process.stdin.close()  # as after the worker was killed
    assert scorer._process.wait(60) == 0
    assert read_scores(str(tmp_path)) == [] and read_best(str(tmp_path)) is None


@pytest.mark.whole
def test_evaluator_writes_images_and_submits_scores(tmp_path: Path, index: dict[str, Any]) -> None:
    data = DataConfig(**{**index["data"]["settings"], "beside": ()})
    stage = {**to_dict(small_systems.config("attngan").stages["attngan"]), "scores_every_images": 12}
    scores = {"metrics": ["kid"], "n": 12, "real": 12, "share": 1.0}
    values = {"name": "run", "stages": {"attngan": stage}, "data": to_dict(data), "scores": scores}
    config = from_dict(RunConfig, values)
    folder = tmp_path / "run/attngan"
    dataset = replace(open_dataset(data), vocabulary=Vocabulary(index["vocabulary"]))
    location = (str(folder), torch.device("cpu"), lambda images: index)
    evaluator = InTrainingEvaluator(small_systems.build("attngan"), [dataset], config, "attngan", *location)
    metrics = evaluator.evaluate(nets(), 12, images=True, scores=True)
    assert metrics["val/diversity"] > 0 and (folder / "pictures/images_000000012.png").exists()
    assert evaluator.evaluate(nets(), 24, images=False, scores=False) == {}
    assert evaluator._scorer is not None
    wait_for(folder, 1, evaluator._scorer)
    evaluator.close(finished=True)
    assert [line["images"] for line in read_scores(str(folder))] == [12]
    damsm = from_dict(RunConfig, {**values, "stages": {"damsm": {**stage, "system": "damsm"}}})
    with pytest.raises(ValueError, match="scores_every_images: damsm does not generate images from captions"):
        InTrainingEvaluator(small_systems.build("damsm"), [dataset], damsm, "damsm", *location)


def test_invalid_configuration_is_rejected_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="extractor 'vgg': allowed are"):
        BackgroundScorer(ScoresConfig(extractor="vgg"), str(tmp_path), lambda images: {})
    with pytest.raises(ValueError, match="damsm_r: give a DAMSM"):
        BackgroundScorer(ScoresConfig(metrics=("damsm_r",)), str(tmp_path), lambda images: {})
    with pytest.raises(ValueError, match="scores.metrics: 'fidd'; there are fid, kid"):
        ScoresConfig(metrics=("fidd",))
    with pytest.raises(ValueError, match="scores.share: 2"):
        ScoresConfig(share=2)
    assert background_scorer._better("kid", 0.1, 0.2) and background_scorer._better("r_precision", 0.2, 0.1)
