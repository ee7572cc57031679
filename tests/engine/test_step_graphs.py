"""Recorded steps, on the simulated device of tests/helpers/fake_accelerator.py."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from t2idist.engine.step_graphs import Recorder
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import World
from t2idist.nn.fast.torch_internals import TorchDispatchMode
from tests.helpers import small_systems

pytestmark = pytest.mark.whole
STEPS = 24
QUICK = ["damsm", "attngan-options", "stargan"]
OTHERS = [
    "attngan", "stackgan_pp", "stackgan_pp-options", "mirrorgan", "dm_gan", "df_gan-options", "gan_cls", "stackgan",
    "stackgan-2-options", "style", "dcgan", "cyclegan", "pix2pix", "char_text", "captioner",
]  # fmt: skip


def run_fake(labels: list[str], precision: str = "float64", mutation: str = "") -> dict[str, Any]:
    command = ["tests.helpers.fake_accelerator", "--recorded", str(STEPS), precision, mutation, *labels]
    process = subprocess.run(
        [sys.executable, "-m", *command], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=900
    )
    assert process.returncode == 0, process.stderr[-3000:]
    results: dict[str, Any] = json.loads(process.stdout)
    assert list(results) == labels
    return results


@pytest.mark.parametrize(
    "labels", [pytest.param(QUICK, marks=pytest.mark.whole), pytest.param(OTHERS, marks=pytest.mark.slow)]
)
def test_recorded_steps_equal_launched_ones(labels: list[str]) -> None:
    for label, result in run_fake(labels).items():
        launched, recorded = result["reports"]
        assert result["failure"] == "" and result["repeated"] >= 4, label
        assert result["apart"] < 1e-4, f"{label}: {result['where']}"
        assert recorded == pytest.approx(launched, rel=1e-5, abs=1e-9), label


@pytest.mark.whole
def test_recorded_steps_in_bfloat16_use_the_present_weights() -> None:
    (result,) = run_fake(["dcgan"], "bfloat16").values()
    assert result["failure"] == "" and result["repeated"] >= 4 and result["apart"] < 0.01, result["where"]
    (mutated,) = run_fake(["dcgan"], "bfloat16", "casts").values()
    assert mutated["failure"] or mutated["apart"] > 0.01


@pytest.mark.whole
@pytest.mark.parametrize("mutation", ["noise", "batch"])
def test_graphs_that_read_values_of_an_earlier_step_are_not_used(mutation: str) -> None:
    (result,) = run_fake(["dcgan"], mutation=mutation).values()
    assert "elsewhere than a launched one" in result["failure"] and result["repeated"] == 0
    assert result["apart"] == 0


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


def trained(recorder: Recorder | None) -> Trainer:
    trainer = small_systems.trainer(World(), "dcgan", "float64", recorder=recorder)
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
def test_a_step_that_cannot_be_repeated_is_launched(
    record: Any, reason: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(recorder, "record", record)
    launched, other = trained(None), trained(recorder)
    assert other.graphs is not None and reason in other.graphs.failure
    assert [text for text in caplog.messages if "without CUDA graphs" in text and reason in text]
    assert all(torch.equal(value, other.state()[name]) for name, value in launched.state().items())
    assert other.reduce_reports() == launched.reduce_reports()


def test_micro_batches_are_not_recorded_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "t2idist")
    small_systems.trainer(World(), "dcgan", "float64", micro_batch_groups=1)
    assert "CUDA graphs" not in caplog.text, "nobody asked for them"
    trainer = small_systems.trainer(World(), "dcgan", "float64", micro_batch_groups=1, recorder=Recorder())
    assert "stage dcgan runs without CUDA graphs: its groups are computed in parts" in caplog.text
    assert trainer.graphs is None


class Watcher(Recorder):
    """Finds in a launched step what cannot be recorded."""

    @contextlib.contextmanager
    def watching(self) -> Iterator[list[str]]:
        yield ["the host waits in step.py:1"]

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        raise AssertionError("it is not even tried")


def test_a_step_in_which_the_host_waits_is_not_recorded() -> None:
    graphs = trained(Watcher()).graphs
    assert graphs is not None and graphs.failure == "the host waits in step.py:1"


class Counter(Recorder):
    """Repeats a step by launching it again, and counts the recordings."""

    recorded = 0

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        step()
        self.recorded += 1
        return step


def test_only_steps_that_come_again_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decision that is always another one until step 12, and then one of two in turn."""
    recorder = Counter()
    trainer = small_systems.trainer(World(), "dcgan", "float64", recorder=recorder)
    step = trainer.system.step

    def decides(batch: Any, train: Any) -> None:
        train.decide(lambda number, images: number if number < 12 else 100 + number % 2)
        step(batch, train)

    monkeypatch.setattr(trainer.system, "step", decides)
    for _ in range(12):
        trainer.run_step(small_systems.toy_batch(trainer))
    assert recorder.recorded == 0
    for _ in range(8):
        trainer.run_step(small_systems.toy_batch(trainer))
    assert recorder.recorded == 2 and trainer.graphs is not None
