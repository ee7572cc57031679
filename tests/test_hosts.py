"""A run on three hosts of which one is lost and comes back: seconds, not the run, and the same model at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hosts import Missing
from tools import chaos

pytestmark = pytest.mark.slow


@pytest.mark.timeout(1500)
def test_a_host_is_killed_and_comes_back(tmp_path: Path) -> None:
    schedule = chaos.parse_schedule("25:kill_host:2 60:return_host:2", 3)
    try:
        verdict = chaos.run([], schedule, folder=tmp_path, steps=160, return_seconds=600, limit_seconds=900)
    except Missing as missing:
        pytest.skip(str(missing))
    assert verdict.faults == []
    lost, back = verdict.recoveries
    assert lost.causes == ["kill_host on host 2"] and back.causes == ["host 2 comes back"]
    assert (lost.workers, lost.workers_after, back.workers_after) == (3, 2, 3)
    assert lost.first_step is not None and lost.first_step - lost.began < 30
    assert lost.step >= 25 and lost.first_step < back.began
