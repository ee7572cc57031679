"""Recorded steps, on the simulated device of tests/helpers/fake_accelerator.py."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from t2idist.engine.trainer import Trainer
from t2idist.engine.world import World
from t2idist.nn.fast.torch_internals import TorchDispatchMode
from tests.helpers import small_systems

STEPS = 14
QUICK = ["damsm", "attngan-options", "stargan"]
OTHERS = [
    "attngan", "stackgan_pp", "stackgan_pp-options", "mirrorgan", "dm_gan", "df_gan-options", "gan_cls", "stackgan",
    "stackgan-2-options", "style", "dcgan", "cyclegan", "pix2pix", "char_text", "captioner",
]  # fmt: skip


def run_fake(labels: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.helpers.fake_accelerator", "--recorded", str(STEPS), *labels]
    process = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=900)
    assert process.returncode == 0, process.stderr[-3000:]
    results: dict[str, Any] = json.loads(process.stdout)
    return results


@pytest.mark.parametrize(
    "labels", [pytest.param(QUICK, marks=pytest.mark.whole), pytest.param(OTHERS, marks=pytest.mark.slow)]
)
def test_recorded_steps_equal_launched_ones(labels: list[str]) -> None:
    results = run_fake(labels)
    assert list(results) == labels
    for label, result in results.items():
        launched, recorded = result["reports"]
        assert result["failure"] == "", label
        assert result["repeated"] >= STEPS // 2, label
        assert result["apart"] < 1e-4, f"{label}: {result['where']}"
        assert recorded == pytest.approx(launched, rel=1e-5, abs=1e-9), label


def repeats_nothing(step: Callable[[], None]) -> Callable[[], None]:
    step()
    return lambda: None


def cannot_record(step: Callable[[], None]) -> Callable[[], None]:
    step()
    raise RuntimeError("operation not permitted when stream is capturing")


class _NoUpdates(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "adam" in func.name():
            raise RuntimeError("no kernel of Adam can be recorded")
        return func(*args, **(kwargs or {}))


def ends_midway(step: Callable[[], None]) -> Callable[[], None]:
    with _NoUpdates():
        step()
    return step


def trained(record: Callable[[Callable[[], None]], Callable[[], None]] | None) -> Trainer:
    trainer = small_systems.trainer(World(), "dcgan", "float64", record=record)
    for _ in range(8):
        trainer.run_step(small_systems.toy_batch(trainer))
    return trainer


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (repeats_nothing, "a repeated step moves"),
        (cannot_record, "operation not permitted"),
        (ends_midway, "no kernel of Adam"),
    ],
)
def test_a_step_that_cannot_be_repeated_is_launched(record: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    launched, other = trained(None), trained(record)
    assert other.graphs is not None and reason in other.graphs.failure
    assert [text for text in caplog.messages if "without CUDA graphs" in text and reason in text]
    assert all(torch.equal(value, other.state()[name]) for name, value in launched.state().items())
    assert other.reduce_reports() == launched.reduce_reports()


def test_micro_batches_are_not_recorded() -> None:
    trainer = small_systems.trainer(World(), "dcgan", "float64", micro_batch_groups=1, record=repeats_nothing)
    assert trainer.graphs is None
