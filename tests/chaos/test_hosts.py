"""Runs on three hosts with injected faults recover within seconds and end with the same weights."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from t2idist import config as configuration
from t2idist.engine.checkpoint import export
from tests.helpers.runs import run_command, write_recipe
from tools.chaos import chaos, faults, history
from tools.chaos.hosts import Unsupported


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_run_survives_a_killed_host_and_grows_when_it_returns(tmp_path: Path) -> None:
    schedule = faults.parse_schedule("40:kill_host:2 100:return_host:2", 3)
    arguments = ["checkpoint.memory_every_steps=1", "cluster.grow_after_seconds=5"]
    try:
        result = chaos.run(arguments, schedule, folder=tmp_path, steps=240, return_seconds=1200, limit_seconds=1200)
    except Unsupported as missing:
        pytest.skip(str(missing))
    assert result.failures == []
    lost, back = result.recoveries
    assert (lost.causes, back.causes) == (["kill_host on host 2"], ["host 2 comes back"])
    assert (lost.workers, lost.workers_after, back.workers_after) == (3, 2, 3)
    assert lost.first_step is not None and lost.first_step - lost.began < 30
    assert lost.lost_steps <= 1 and back.lost_steps == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_run_survives_a_drained_host_a_killed_driver_and_a_lost_cluster(tmp_path: Path) -> None:
    arguments = ["checkpoint.memory_every_steps=10", "cluster.grow_after_seconds=5"]
    schedule = faults.parse_schedule("20:drain_host:2 65:return_host:2 110:nan 150:kill_driver 200:kill_head", 3)
    try:
        result = chaos.run(arguments, schedule, folder=tmp_path, steps=320, return_seconds=1200, limit_seconds=1200)
    except Unsupported as missing:
        pytest.skip(str(missing))
    assert result.failures == []
    drained, back, nan, driver, head = result.recoveries
    assert (drained.causes, drained.lost_steps) == (["drain_host on host 2", "host 2 shuts down"], 0)
    assert (drained.workers, drained.workers_after) == (3, 2)
    assert drained.first_step is not None and drained.first_step - drained.began < faults.DRAIN_SECONDS + 40
    assert (back.causes, back.workers_after, back.lost_steps) == (["host 2 comes back"], 3, 0)
    assert (nan.causes, nan.first_step) == (["nan"], None)
    assert driver.causes == ["kill_driver"] and driver.lost_steps <= 11
    assert driver.first_step is not None and driver.first_step - driver.began < faults.SUBMIT_SECONDS + 45
    assert (head.causes, head.workers_after) == (["kill_head"], 3)
    assert head.lost_steps <= 20


def test_parse_schedule_reads_entries_and_names_wrong_ones() -> None:
    schedule = faults.parse_schedule("30:kill_host:2 +8.5s:store_errors", 3)
    assert [(i.kind, i.step, i.after, i.host) for i in schedule] == [
        ("kill_host", 30, 0.0, 2),
        ("store_errors", None, 8.5, None),
    ]
    for entry, message in (
        ("30:kill_host:4", "host 4"),
        ("30:melt", "'melt'"),
        ("soon:partition", "expected WHEN"),
        ("+3s:nan", "a step"),
    ):
        with pytest.raises(ValueError, match=message):
            faults.parse_schedule(entry, 3)


def test_random_schedule_has_every_kind_and_few_lost_clusters() -> None:
    long = faults.random_schedule(200, 5, 12, 24)
    assert long == faults.random_schedule(200, 5, 12, 24)
    counts = Counter(fault.kind for fault in long)
    assert counts["kill_head"] == 10 and counts["kill_driver"] == 20
    assert all(counts[kind] >= 15 for kind in faults.COMMON)
    assert {fault.kind for fault in faults.random_schedule(11, 5, 12, 24)} == set(faults.KINDS)
    steps = faults.nan_steps(long)
    assert len(set(steps)) == len(steps) == counts["nan"]
    by_clock = faults.random_schedule(200, 5, 12, 24, 30.0)
    assert Counter(fault.kind for fault in by_clock) == counts
    assert all((fault.after == 30.0) == (fault.step is None) == (fault.kind != "nan") for fault in by_clock)


def test_medians_are_of_faults_that_came_alone() -> None:
    def recovery(seconds: float | None, *causes: str) -> history.Recovery:
        first_step = None if seconds is None else 100.0 + seconds
        return history.Recovery(list(causes), 100.0, 5, 3, 0, first_step=first_step, lost_steps=2)

    alone = [recovery(seconds, f"kill_worker on host {host}") for host, seconds in ((1, 4.0), (2, 9.0), (3, 5.0))]
    lines = chaos.medians([*alone, recovery(50.0, "kill_driver", "nan"), recovery(None, "nan")])
    assert lines == ["kill_worker: 3 times, first new step after 5.0 s (median; 4.0 to 9.0), at most 2 steps lost"]


def test_recorded_recoveries_are_those_that_ended_by_cause() -> None:
    def attempt(cause: str, *seconds: float) -> dict[str, Any]:
        phases = dict(zip(("end", "start", "restore"), seconds, strict=False))
        return {"recovery": {"cause": cause, "seconds": phases, "images_repeated": 0}}

    attempts = [{}, attempt("resize", 0.25, 0.5, 0.25), attempt("worker lost", 1, 2), attempt("resize", 1, 1, 1)]
    assert chaos.recorded_recoveries(attempts) == ["attempts.json: resize: 2 times, 2.0 s (median; 1.0 to 3.0)"]


@pytest.mark.whole
def test_checks_detect_missing_ledgers_damaged_checkpoints_and_changed_weights(tmp_path: Path) -> None:
    file = write_recipe(tmp_path, report={"ledger": True})
    assert run_command(str(file), "--local").returncode == 0
    config, good, bad = configuration.load(str(file)), tmp_path / "runs/tiny", tmp_path / "bad"
    shutil.copytree(good, bad)
    history.check_ledger(str(good), config)
    assert history.check_checkpoints(str(good), config) > 0
    assert history.largest_difference(str(good), str(bad), config) == (0.0, "nowhere")

    sorted((bad / "attngan/ledger").iterdir())[3].unlink()
    with pytest.raises(ValueError, match="attngan: .* missing or extra"):
        history.check_ledger(str(bad), config)
    part = next((bad / "attngan/checkpoints").glob("*/part-*.safetensors"))
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="sha256 differs"):
        history.check_checkpoints(str(bad), config)
    index = export.read_index(str(bad / "attngan/export"))
    nets = {name: Changed(tensors) for name, tensors in export.read(str(bad / "attngan/export")).weights.items()}
    export.write(str(bad / "attngan/export"), nets, index)
    distance, where = history.largest_difference(str(bad), str(good), config)
    assert distance == pytest.approx(1e-3, rel=1e-3) and where.startswith("attngan generator")


class Changed(nn.Module):
    """Weights of a network, with one tensor of the generator changed by a thousandth of its norm."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: value * 1.001 if name == "h_net1.fc.0.weight" else value for name, value in self.tensors.items()}
