"""What is refused before a run starts because no worker could do it: scores, best weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from t2idist.preflight import dry_run
from t2idist.training.stages import StageRun
from tests.helpers import small_systems
from tests.helpers.runs import load_config
from tests.helpers.shard_sets import make_sample, write_set
from tests.preflight.test_data import refusals
from tests.sampling.conftest import WORDS

SAMPLES = [make_sample(number) for number in range(40)]
SCORED = "stages.attngan.scores_every_images=16"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["stages.damsm.scores_every_images=16"],
            "stages.damsm.scores_every_images: damsm does not generate images from captions; give 0",
        ),
        ([SCORED, "scores.extractor=vgg"], "scores: extractor 'vgg': allowed are"),
        ([SCORED, "scores.extractor=inception-v3"], "scores: extractor inception-v3.weights: missing"),
        ([SCORED, "scores.n=1"], "scores: --n 1: give at least 2"),
        ([SCORED, "scores.metrics=[kid,damsm_r]"], "scores: --metrics damsm_r: give a DAMSM"),
        ([SCORED, "scores.metrics=[damsm_r]", "scores.judge=/nowhere/export"], "scores: /nowhere/export: no export"),
        ([SCORED, "scores.metrics=[clip_r]"], "scores: --metrics clip_r: not during training"),
    ],
)
def test_scores_that_cannot_be_computed_are_refused(tmp_path: Path, settings: list[str], message: str) -> None:
    for refusal in refusals(load_config(tmp_path, *settings)):
        assert refusal.startswith(message)
    without_data = load_config(tmp_path, *settings, "data.source=")
    with pytest.raises(ValueError, match="scores"):
        dry_run.describe(without_data, None)


def test_page_says_which_workers_and_spare_processes_there_are(tmp_path: Path) -> None:
    config = load_config(tmp_path, "cluster.cpus_per_worker=2")
    assert "workers: 1 to 2 of 2 CPU each; no spare processes on each node\n" in dry_run.describe(config, None, True)
    page = dry_run.describe(config, None)
    assert "workers: 1 to 2 of 2 CPU each; 1 spare process on each node with memory to spare\n" in page


def test_judge_may_be_a_stage_of_the_run(tmp_path: Path) -> None:
    config = load_config(tmp_path, SCORED, "scores.metrics=[damsm_r]")
    judged = replace(config, scores=replace(config.scores, judge=StageRun(config, "damsm").export_url))
    dry_run.check(judged, None)
    small_systems.write_export("attngan", str(tmp_path / "gan"), WORDS)
    for refusal in refusals(load_config(tmp_path, SCORED, "scores.metrics=[damsm_r]", f"scores.judge={tmp_path}/gan")):
        assert refusal.endswith("gan: is an export of attngan, which does not embed images and captions")


def test_best_weights_without_held_out_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_set(tmp_path / "none", [replace(sample, split="train") for sample in SAMPLES])
    write_set(
        tmp_path / "one",
        [replace(s, split="val" if i < 9 else "train", class_id=i // 9) for i, s in enumerate(SAMPLES)],
    )
    for name, missing in (
        ("none", "the data has no split val, only train"),
        ("one", "all images of split val have the same class"),
    ):
        source = f"data.source={tmp_path / name}"
        for refusal in refusals(load_config(tmp_path, source, "stages.damsm.export_best=r_precision")):
            assert refusal == (
                f"stages.damsm.export_best: r_precision, but {missing}; give held-out images, or "
                "stages.damsm.export_best=last"
            )
        capsys.readouterr()
        dry_run.check(load_config(tmp_path, source), None)
        warning = f"warning: stages.damsm.export_best: {missing}; the last weights are exported, not the best\n"
        assert capsys.readouterr().err.count(warning) == 1
        dry_run.check(load_config(tmp_path, source, "stages.damsm.export_best=last"), None)
        assert "export_best" not in capsys.readouterr().err
