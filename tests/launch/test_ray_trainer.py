"""The trainer starts only the actors and callbacks that a run needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from t2idist import config
from t2idist.launch import callbacks, ray_internals, submit, worker_pool


@pytest.mark.parametrize("own", [True, False])
def test_trainer_has_no_callbacks_that_start_idle_actors(own: bool, tmp_path: Path) -> None:
    """Each takes seconds before the first step (tools/bench/bench_ray.py)."""
    settings = config.load("dcgan", ["preset=demo", f"storage={tmp_path}"])
    pool = worker_pool.WorkerPool({}, spares=0, start_seconds=60)
    trainer = submit._trainer(settings, "run-id", str(tmp_path), own, None, callbacks.StopOnSigterm(), pool, 0)
    kinds = [type(each) for each in trainer._create_default_callbacks()]
    assert not {ray_internals.DatasetsCallback, ray_internals.PlacementGroupCleanerCallback} & set(kinds)
    assert {callbacks.CheckNodes, callbacks.StartTimeout} <= set(kinds)
