"""The system and the trainer of a stage."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from t2idist.engine.world import World
from t2idist.training import building
from t2idist.training.stages import StageRun
from tests.helpers import small_systems


@pytest.mark.parametrize(("workers", "reason"), [(2, "there are 2 workers"), (1, "its groups are computed in parts")])
def test_the_log_says_why_there_are_no_cuda_graphs(
    workers: int, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(building, "Trainer", lambda *args, **settings: SimpleNamespace(graphs=None))
    monkeypatch.setattr(building, "CudaGraphRecorder", lambda: None)
    run = replace(small_systems.config("damsm", "float32"), cuda_graphs="auto")
    system: Any = None

    def build(rank: int, device: str) -> str:
        caplog.clear()
        world = World(rank, workers, torch.device(device))
        building.build_trainer(run, StageRun(run, "damsm"), system, world, rollback=0)
        return caplog.text

    assert f"cuda_graphs: auto: stage damsm runs without CUDA graphs: {reason}" in build(0, "cuda")
    assert not build(0, "cpu")
    assert workers == 1 or not build(1, "cuda"), "once"
