"""The trainer starts only the actors and callbacks that a run needs."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from t2idist import config
from t2idist.launch import callbacks, interfaces, ray_internals, ray_trainer, submit, worker_pool


@pytest.mark.parametrize("own", [True, False])
def test_trainer_has_no_callbacks_that_start_idle_actors(own: bool, tmp_path: Path) -> None:
    """Each takes seconds before the first step (tools/bench/bench_ray.py)."""
    settings = config.load("dcgan", ["preset=demo", f"storage={tmp_path}"])
    pool = worker_pool.WorkerPool({}, spares=0, start_seconds=60)
    trainer = submit._trainer(settings, "run-id", str(tmp_path), own, None, callbacks.StopOnSigterm(), pool, 0)
    kinds = [type(each) for each in trainer._create_default_callbacks()]
    assert not {ray_internals.DatasetsCallback, ray_internals.PlacementGroupCleanerCallback} & set(kinds)
    assert {callbacks.CheckNodes, callbacks.StartTimeout} <= set(kinds)


def test_only_the_first_worker_joins_the_process_group_at_once() -> None:
    calls: list[Any] = []

    class Group:
        def execute_single_async(self, *call: Any, **settings: Any) -> None:
            calls.append((*call, settings))

        def execute(self, function: Any) -> str:
            return "on all"

        def __len__(self) -> int:
            return 2

    group = ray_trainer._FirstWorkerListens(Group())
    for rank in range(2):
        group.execute_single_async(rank, print, "a", size=2)
    assert calls == [(0, print, "a", {"size": 2}), (1, interfaces.call_once_reachable, print, "a", {"size": 2})]
    assert len(group) == 2 and group.execute(print) == "on all"
    source = inspect.getsource(ray_trainer.TorchConfig().backend_cls.on_start)
    assert "execute_single_async(" in source, "Ray starts the process group in another way"
