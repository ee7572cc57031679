"""Export of the weights with the best held-out R-precision."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from t2idist import run
from t2idist.config import StageConfig
from t2idist.engine.checkpoint import export
from t2idist.evaluate import best_weights, in_training
from t2idist.evaluate.best_weights import BestWeights
from t2idist.evaluate.r_precision import RPrecision
from tests.helpers.runs import write_recipe

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
    assert kept(tmp_path) == [] and len(best_weights.read(str(tmp_path))) == 3


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


def test_the_switch() -> None:
    damsm, gan = type("Damsm", (), {"export_best": "r_precision", "embed_images": 0, "embed_captions": 0})(), object()
    for chosen, system, tracked in (("auto", damsm, True), ("last", damsm, False), ("auto", gan, False)):
        settings = StageConfig("damsm", group_size=1, groups=1, images=1, export_best=chosen)
        assert best_weights.is_tracked(system, settings) is tracked
    with pytest.raises(ValueError, match="export_best: 'fid'; allowed are auto, r_precision, last"):
        StageConfig("damsm", group_size=1, groups=1, images=1, export_best="fid")


def inject(monkeypatch: pytest.MonkeyPatch, values: Mapping[int, float]) -> None:
    """Let the evaluation of the n-th call find the n-th value, as if retrieval of held-out images fell."""
    remaining = iter(values.values())
    monkeypatch.setattr(in_training, "validation_score", lambda *args, **more: score(next(remaining)))


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
