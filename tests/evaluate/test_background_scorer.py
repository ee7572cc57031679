"""Scores during training: the share of the time that they take, and what the process beside the worker leaves."""

from __future__ import annotations

import json
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
from t2idist.evaluate.background_scorer import BackgroundScorer, TimeShare, read_best, read_lines
from t2idist.evaluate.in_training import InTrainingEvaluator
from t2idist.sampling.loading import network
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
def test_pieces_of_work_take_their_share_of_the_time(measured: bool) -> None:
    clock = Clock()
    pace = TimeShare(0.02, (lambda: clock.worked) if measured else None, lambda: clock.now, clock.sleep)
    for _ in range(20):
        pace()
        clock.work(3.0)
    pace()
    assert clock.worked == 60.0 and 0.0199 < clock.worked / clock.now <= 0.02
    pace.free = True
    before = clock.now
    clock.work(100.0)
    pace()
    assert clock.now == before + 100.0, "at the end nobody is disturbed"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """That of an export of the small attngan, whose data are avatars."""
    folder = tmp_path_factory.mktemp("during")
    data = DataConfig(source="avatars", samples=400, size=32, crop=1.0, cache=str(folder))
    small_systems.write_export("attngan", str(folder / "export"), open_dataset(data).vocabulary.words[:40])
    found = json.loads((folder / "export" / export.INDEX).read_text())
    return {key: value for key, value in found.items() if key != "networks"} | {"data": {"settings": to_dict(data)}}


def nets() -> dict[str, Any]:
    made = small_systems.build("attngan")
    return {dotted.rpartition(".")[2]: network(made, dotted) for dotted in made.exports}


def wait_for(folder: Path, count: int, scorer: BackgroundScorer) -> None:
    deadline = time.monotonic() + 120
    while len(read_lines(str(folder))) < count:
        assert time.monotonic() < deadline and scorer._process.poll() is None
        time.sleep(0.1)


@pytest.mark.whole
def test_the_newest_weights_are_scored_and_the_best_stay(tmp_path: Path, index: dict[str, Any]) -> None:
    config = ScoresConfig(metrics=("kid",), n=24, real=24, share=1.0)
    scorer = BackgroundScorer(config, str(tmp_path), lambda images: {**index, "images": images})
    networks = nets()
    scorer.offer(networks, 100, last=False)
    scorer.offer(networks, 150, last=False)
    assert not (tmp_path / "scored/000000000150").exists(), "it is busy"
    wait_for(tmp_path, 1, scorer)
    for parameter in networks["generator"].parameters():
        parameter.data.mul_(0.0)  # one colour for all
    scorer.offer(networks, 200, last=False)
    wait_for(tmp_path, 2, scorer)
    for net, same in zip(networks.values(), nets().values(), strict=True):
        net.load_state_dict(same.state_dict())
    scorer.offer(networks, 300, last=True)
    scorer.close(finished=True)
    lines = read_lines(str(tmp_path))
    assert [line["images"] for line in lines] == [100, 200, 300]
    assert lines[0]["kid"] == lines[2]["kid"] != lines[1]["kid"] and lines[0]["protocol"]["generated"] == 24
    best = read_best(str(tmp_path))
    assert best is not None and best["metric"] == "kid"
    assert best["value"] == min(line["kid"] for line in lines)
    folders = [f.name for f in (tmp_path / "scored").iterdir() if f.name.isdigit()]
    assert folders == [best["export"].rpartition("/")[2]], "of all that was offered the best one stays"
    assert export.read(str(tmp_path / best["export"])).images == best["images"]

    again = BackgroundScorer(config, str(tmp_path), lambda images: {**index, "images": images})
    again.offer(networks, 200, last=False)  # a run that goes on from a checkpoint comes by again
    assert not (tmp_path / "scored/000000000200").exists() or best["images"] == 200
    again.close(finished=False)
    assert again._process.poll() is not None


@pytest.mark.whole
def test_the_process_ends_with_its_worker(tmp_path: Path, index: dict[str, Any]) -> None:
    config = ScoresConfig(n=24, real=24, share=1e-6)  # it would wait for weeks
    scorer = BackgroundScorer(config, str(tmp_path), lambda images: {**index, "images": images})
    scorer.offer(nets(), 100, last=False)
    assert scorer._process.stdin is not None
    scorer._process.stdin.close()  # what a killed worker leaves
    assert scorer._process.wait(60) == 0
    assert read_lines(str(tmp_path)) == [] and read_best(str(tmp_path)) is None


@pytest.mark.whole
def test_a_stage_is_looked_at_and_scored(tmp_path: Path, index: dict[str, Any]) -> None:
    data = DataConfig(**{**index["data"]["settings"], "beside": ()})
    stage = {**to_dict(small_systems.config("attngan").stages["attngan"]), "scores_every_images": 12}
    scores = {"metrics": ["kid"], "n": 12, "real": 12, "share": 1.0}
    values = {"name": "run", "stages": {"attngan": stage}, "data": to_dict(data), "scores": scores}
    config = from_dict(RunConfig, values)
    folder = tmp_path / "run/attngan"
    dataset = replace(open_dataset(data), vocabulary=Vocabulary(index["vocabulary"]))
    place = (str(folder), torch.device("cpu"), lambda images: index)
    watcher = InTrainingEvaluator(small_systems.build("attngan"), [dataset], config, "attngan", *place)
    seen = watcher.look(nets(), 12, pictures=True, scores=True)
    assert seen["val/diversity"] > 0 and (folder / "pictures/images_000000012.png").exists()
    assert watcher.look(nets(), 24, pictures=False, scores=False) == {}
    assert watcher._scorer is not None
    wait_for(folder, 1, watcher._scorer)
    watcher.close(finished=True)
    assert [line["images"] for line in read_lines(str(folder))] == [12]
    damsm = from_dict(RunConfig, {**values, "stages": {"damsm": {**stage, "system": "damsm"}}})
    with pytest.raises(ValueError, match="scores_every_images: damsm draws no pictures from captions"):
        InTrainingEvaluator(small_systems.build("damsm"), [dataset], damsm, "damsm", *place)


def test_what_cannot_be_scored_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="extractor 'vgg': there are"):
        BackgroundScorer(ScoresConfig(extractor="vgg"), str(tmp_path), lambda images: {})
    with pytest.raises(ValueError, match="damsm_r: give a DAMSM"):
        BackgroundScorer(ScoresConfig(metrics=("damsm_r",)), str(tmp_path), lambda images: {})
    with pytest.raises(ValueError, match="scores.metrics: 'fidd'; there are fid, kid"):
        ScoresConfig(metrics=("fidd",))
    with pytest.raises(ValueError, match="scores.share: 2"):
        ScoresConfig(share=2)
    assert background_scorer._better("kid", 0.1, 0.2) and background_scorer._better("r_precision", 0.2, 0.1)
