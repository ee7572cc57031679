"""Export of the weights with the best held-out R-precision."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from t2idist import run
from t2idist.config import RunConfig, StageConfig
from t2idist.engine.checkpoint import export
from t2idist.engine.guard import Diverged
from t2idist.engine.preemption import PreemptionNotice, StopRequested
from t2idist.engine.world import World
from t2idist.evaluate import best_weights, in_training
from t2idist.evaluate.best_weights import BestWeights, HeldOut
from t2idist.evaluate.r_precision import RPrecision
from t2idist.training import worker
from t2idist.training.options import StopAfter
from tests.engine.test_trainer import SINGLE_WORKER
from tests.helpers.runs import load_config, write_recipe
from tests.helpers.worker_processes import Workers

FALLING = {32: 0.9, 64: 0.1}


def score(value: float, n: int = 1000) -> RPrecision:
    error = (value * (1 - value) / n) ** 0.5
    return RPrecision(value, error, 0.0, n, 100, torch.empty(0), torch.empty(0))


def index(images: int) -> dict[str, Any]:
    return {"system": "damsm", "config": {}, "plan": {}, "vocabulary": [], "images": images}


def record(folder: Path, values: Mapping[int, float]) -> None:
    best = BestWeights(str(folder), index)
    for images, value in values.items():
        net = nn.Linear(1, 1, bias=False)
        nn.init.constant_(net.weight, images)
        best.record({"text": net}, images, score(value))


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "best").iterdir() if path.is_dir())


def test_only_the_best_weights_are_kept(tmp_path: Path) -> None:
    record(tmp_path, {40: 0.143, 80: 0.122, 120: 0.102})
    assert kept(tmp_path) == [f"{40:012d}"]
    found = best_weights.better_than_last(str(tmp_path), 120)
    assert found is not None and (found[0].images, found[1].images) == (40, 120)
    best_weights.export_best(str(tmp_path), str(tmp_path / "export"), *found)
    exported = export.read(str(tmp_path / "export"))
    assert exported.weights["text"]["weight"].item() == 40 and exported.images == 40
    assert exported.meta["selected"]["last"]["value"] == 0.102
    best_weights.remove(str(tmp_path))
    assert kept(tmp_path) == [] and len(best_weights.read(str(tmp_path))[1]) == 3


@pytest.mark.parametrize("values", [{40: 0.1, 80: 0.14}, {40: 0.143, 80: 0.13}, {80: 0.1}, {}])
def test_a_fall_within_noise_keeps_the_last_weights(tmp_path: Path, values: dict[int, float]) -> None:
    record(tmp_path, values)
    assert best_weights.better_than_last(str(tmp_path), 80) is None


def test_weights_that_were_not_scored_at_the_end_are_not_judged(tmp_path: Path) -> None:
    record(tmp_path, {40: 0.5, 80: 0.1})
    assert best_weights.better_than_last(str(tmp_path), 100) is None


def test_steps_that_are_repeated_after_a_restart_leave_the_same(tmp_path: Path) -> None:
    values = {40: 0.1, 80: 0.3, 120: 0.2}
    record(tmp_path / "straight", values)
    record(tmp_path / "restarted", {40: 0.1, 80: 0.3})
    record(tmp_path / "restarted", values)
    files = [
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("straight", "restarted")
    ]
    assert files[0] == files[1]


def test_scores_after_the_point_where_a_stage_trains_again_are_forgotten(tmp_path: Path) -> None:
    record(tmp_path, {40: 0.1, 80: 0.3, 120: 0.2})
    best_weights.forget_after(str(tmp_path), 80)
    best, scores = best_weights.read(str(tmp_path))
    assert best is not None and best.images == 80 and [each.images for each in scores] == [40, 80]
    assert kept(tmp_path) == [f"{80:012d}"]
    best_weights.forget_after(str(tmp_path), 79)
    best, scores = best_weights.read(str(tmp_path))
    assert best is None and [each.images for each in scores] == [40] and kept(tmp_path) == []
    record(tmp_path, {80: 0.05})  # the best of which there are weights
    assert kept(tmp_path) == [f"{80:012d}"]


def test_the_switch() -> None:
    damsm, gan = type("Damsm", (), {"export_best": "r_precision", "embed_images": 0, "embed_captions": 0})(), object()
    for chosen, system, tracked in (("auto", damsm, True), ("last", damsm, False), ("auto", gan, False)):
        settings = StageConfig("damsm", group_size=1, groups=1, images=1, export_best=chosen)
        assert best_weights.is_tracked(system, settings) is tracked


def inject(monkeypatch: pytest.MonkeyPatch, values: Mapping[int, float]) -> None:
    monkeypatch.setattr(in_training, "validation_score", evaluation(values.values()))


def evaluation(values: Iterable[float | None]) -> Callable[..., RPrecision]:
    """Return an evaluation whose n-th call finds the n-th value, as if retrieval fell; None: training diverges."""
    remaining = iter(values)

    def find(*args: Any, **more: Any) -> RPrecision:
        if (value := next(remaining)) is None:
            raise Diverged("not finite")
        return score(value)

    return find


@pytest.mark.whole
def test_a_run_exports_and_uses_the_best_weights_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = write_recipe(tmp_path)
    arguments = [str(recipe), "--local", "--stop-after", "damsm"]
    inject(monkeypatch, {32: 0.1, 64: 0.9})
    assert run.main([*arguments, "name=rising"]) == 0
    inject(monkeypatch, FALLING)
    with caplog.at_level(logging.WARNING, "t2idist"):
        assert run.main([*arguments, "name=falling"]) == 0
    inject(monkeypatch, FALLING)
    assert run.main([*arguments, "name=last", "stages.damsm.export_best=last"]) == 0
    rising, falling, last = (tmp_path / "runs" / name / "damsm" / "export" for name in ("rising", "falling", "last"))
    assert export.read_index(str(falling))["images"] == 32 and export.read_index(str(rising))["images"] == 64
    files = [(folder / "text.safetensors").read_bytes() for folder in (rising, falling, last)]
    assert files[0] == files[2] != files[1]
    assert "held-out R-precision fell from 0.900 +- 0.009 after 32 images to 0.100" in caplog.text
    assert "selected" not in export.read_index(str(rising))
    assert run.main([str(recipe), "--local", "name=falling"]) == 0
    used = tmp_path / "runs/falling/attngan/export/text.safetensors"
    assert used.read_bytes() == (falling / "text.safetensors").read_bytes()


def train(world: World, config: RunConfig, values: Iterable[float | None], stopped_after: int | None = None) -> None:
    """Train the DAMSM of a run on one of the workers; the evaluations find these values in turn.

    Args:
        stopped_after: steps of this attempt after which the process is asked to stop.
    """
    steps = itertools.count(1)
    context = worker.WorkerContext(
        poll_preemption=lambda: PreemptionNotice(0.0) if next(steps) == stopped_after else None,
        stop_after=StopAfter("damsm", None),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_training, "validation_score", evaluation(values))
        patch.setattr(worker, "_open_world", lambda device, timeout_seconds: world)
        worker.main(config, world.device, context)


def exported(config: RunConfig) -> tuple[dict[str, Any], bytes]:
    """Return why the weights were exported, and the weights."""
    folder = Path(config.storage) / config.name / "damsm/export"
    return export.read_index(str(folder))["selected"], (folder / "text.safetensors").read_bytes()


@pytest.mark.parametrize("stopped_after", [4, 8])
def test_a_stop_at_an_evaluation_changes_nothing(tmp_path: Path, stopped_after: int) -> None:
    straight, stopped = (load_config(tmp_path, f"name={name}") for name in ("straight", "stopped"))
    train(SINGLE_WORKER, straight, FALLING.values())
    with pytest.raises(StopRequested, match=f"saved at {stopped_after * 8} images"):
        train(SINGLE_WORKER, stopped, FALLING.values(), stopped_after)
    train(SINGLE_WORKER, stopped, [FALLING[64]] if stopped_after == 4 else [])
    assert exported(stopped) == exported(straight)


def test_last_weights_without_a_score_are_scored_at_the_export(tmp_path: Path) -> None:
    """The stage was stopped, at no evaluation, where a smaller budget ends."""
    with pytest.raises(StopRequested, match="saved at 40 images"):
        train(SINGLE_WORKER, load_config(tmp_path), [0.9], 5)
    config = load_config(tmp_path, "stages.damsm.images=40")
    train(SINGLE_WORKER, config, [0.1])
    assert exported(config)[0]["last"] == asdict(HeldOut(40, 0.1, score(0.1).standard_error))


def test_two_workers_export_the_same_as_one(workers: Workers, tmp_path: Path) -> None:
    one, two = (load_config(tmp_path, f"name={name}", "precision=float64") for name in ("one", "two"))
    train(SINGLE_WORKER, one, FALLING.values())
    workers.run(2, train, two, list(FALLING.values()))
    (why, weights), (why_of_two, weights_of_two) = exported(one), exported(two)
    assert why == why_of_two and why["best"]["images"] == 32
    expected, found = (safetensors.torch.load(data) for data in (weights, weights_of_two))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)  # sums in another order


def test_an_abandoned_course_has_no_best_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cadence = ["checkpoint.keep=9", "stages.damsm.pictures_every_images=16"]
    command = [str(write_recipe(tmp_path)), "--local", *cadence]
    inject(monkeypatch, {16: 0.1, 32: 0.1, 48: 0.9})
    assert run.main([*command, "--stop-after", "damsm:48"]) == 0
    inject(monkeypatch, {32: 0.4, 48: 0.1, 64: 0.1})
    assert run.main([*command, "--stop-after", "damsm", "--resume-from", "16"]) == 0
    assert exported(load_config(tmp_path))[0]["best"]["images"] == 32


def test_a_rollback_forgets_the_course_that_diverged(tmp_path: Path) -> None:
    config = load_config(tmp_path, "stages.damsm.checkpoint_every_images=32", "stages.damsm.pictures_every_images=8")
    train(SINGLE_WORKER, config, [0.1, 0.1, 0.1, 0.1, 0.2, 0.9, None, 0.5, 0.1, 0.1, 0.1])
    assert exported(config)[0]["best"] == asdict(HeldOut(40, 0.5, score(0.5).standard_error))
