"""Runs on three hosts that are hurt and come back: seconds, not the run, and the same model at the end."""

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
from tools.chaos import chaos, injuries, story
from tools.chaos.hosts import Missing


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_host_is_killed_and_comes_back(tmp_path: Path) -> None:
    schedule = injuries.parse_schedule("40:kill_host:2 100:return_host:2", 3)
    words = ["checkpoint.memory_every_steps=1", "cluster.grow_after_seconds=5"]
    try:
        verdict = chaos.run(words, schedule, folder=tmp_path, steps=240, return_seconds=1200, limit_seconds=1200)
    except Missing as missing:
        pytest.skip(str(missing))
    assert verdict.faults == []
    lost, back = verdict.recoveries
    assert (lost.causes, back.causes) == (["kill_host on host 2"], ["host 2 comes back"])
    assert (lost.workers, lost.workers_after, back.workers_after) == (3, 2, 3)
    assert lost.first_step is not None and lost.first_step - lost.began < 30
    assert lost.lost_steps <= 1 and back.lost_steps == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_host_is_drained_and_comes_back_then_the_driver_dies_then_the_whole_cluster(tmp_path: Path) -> None:
    words = ["checkpoint.memory_every_steps=10", "cluster.grow_after_seconds=5"]
    schedule = injuries.parse_schedule("20:drain_host:2 65:return_host:2 110:nan 150:kill_driver 200:kill_head", 3)
    try:
        verdict = chaos.run(words, schedule, folder=tmp_path, steps=320, return_seconds=1200, limit_seconds=1200)
    except Missing as missing:
        pytest.skip(str(missing))
    assert verdict.faults == []
    drained, back, nan, driver, head = verdict.recoveries
    assert (drained.causes, drained.lost_steps) == (["drain_host on host 2", "host 2 goes"], 0)
    assert (drained.workers, drained.workers_after) == (3, 2)
    assert drained.first_step is not None and drained.first_step - drained.began < injuries.DRAIN_SECONDS + 40
    assert (back.causes, back.workers_after, back.lost_steps) == (["host 2 comes back"], 3, 0)
    assert (nan.causes, nan.first_step) == (["nan"], None)
    assert driver.causes == ["kill_driver"] and driver.lost_steps <= 11
    assert driver.first_step is not None and driver.first_step - driver.began < injuries.SUBMIT_SECONDS + 45
    assert (head.causes, head.workers_after) == (["kill_head"], 3)
    assert head.lost_steps <= 20


def test_a_schedule_is_read_and_a_wrong_word_named() -> None:
    found = injuries.parse_schedule("30:kill_host:2 +8.5s:store_errors", 3)
    assert [(i.kind, i.step, i.after, i.host) for i in found] == [
        ("kill_host", 30, 0.0, 2),
        ("store_errors", None, 8.5, None),
    ]
    for word, said in (
        ("30:kill_host:4", "host 4"),
        ("30:melt", "'melt'"),
        ("soon:partition", "expected WHEN"),
        ("+3s:nan", "a step"),
    ):
        with pytest.raises(ValueError, match=said):
            injuries.parse_schedule(word, 3)


def test_random_schedules_hold_every_kind_and_few_lost_clusters() -> None:
    long = injuries.random_schedule(200, 5, 12, 24)
    assert long == injuries.random_schedule(200, 5, 12, 24)
    counts = Counter(injury.kind for injury in long)
    assert counts["kill_head"] == 10 and counts["kill_driver"] == 20
    assert all(counts[kind] >= 15 for kind in injuries.COMMON)
    assert {injury.kind for injury in injuries.random_schedule(11, 5, 12, 24)} == set(injuries.KINDS)
    steps = injuries.nan_steps(long)
    assert len(set(steps)) == len(steps) == counts["nan"]


@pytest.mark.whole
def test_the_checks_find_what_is_wrong(tmp_path: Path) -> None:
    file = write_recipe(tmp_path, report={"ledger": True})
    assert run_command(str(file), "--local").returncode == 0
    config, good, bad = configuration.load(str(file)), tmp_path / "runs/tiny", tmp_path / "bad"
    shutil.copytree(good, bad)
    story.check_ledger(str(good), config)
    assert story.check_checkpoints(str(good), config) > 0
    assert story.largest_difference(str(good), str(bad), config) == (0.0, "nowhere")

    sorted((bad / "attngan/ledger").iterdir())[3].unlink()
    with pytest.raises(ValueError, match="attngan: .* missing or extra"):
        story.check_ledger(str(bad), config)
    part = next((bad / "attngan/checkpoints").glob("*/part-*.safetensors"))
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="sha256 differs"):
        story.check_checkpoints(str(bad), config)
    index = export.read_index(str(bad / "attngan/export"))
    nets = {name: Moved(tensors) for name, tensors in export.read(str(bad / "attngan/export")).weights.items()}
    export.write(str(bad / "attngan/export"), nets, index)
    apart, where = story.largest_difference(str(bad), str(good), config)
    assert apart == pytest.approx(1e-3, rel=1e-3) and where.startswith("attngan generator")


class Moved(nn.Module):
    """Weights of a network, the first generator tensor a thousandth of its norm away."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: value * 1.001 if name == "h_net1.fc.0.weight" else value for name, value in self.tensors.items()}
