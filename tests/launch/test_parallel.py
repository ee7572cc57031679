"""map_unordered calls the function once per task, in this process or in several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from t2idist.launch import connection, parallel
from t2idist.observability.command import describe_error


def _square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def _refuse(number: int) -> None:
    raise ValueError(f"--n {number}: give at least 2")


def test_no_workers_runs_in_this_process_without_ray() -> None:
    assert list(parallel.map_unordered(_square, range(3), 0)) == [(n * n, os.getpid()) for n in range(3)]
    code = "import sys, t2idist.evaluate.score; assert 'ray' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.whole
def test_two_workers_run_every_task_once_and_leave_nothing_in_the_home_folder(home: Path) -> None:
    done = list(parallel.map_unordered(_square, iter(range(11)), 2))
    assert sorted(value for value, _ in done) == [n * n for n in range(11)]
    assert os.getpid() not in {process for _, process in done}
    assert list(home.iterdir()) == [] and not {name for name in os.environ if name.startswith("RAY_AUTH_")}


@pytest.mark.whole
def test_error_of_a_worker_is_the_error_of_the_task(home: Path) -> None:
    with pytest.raises(ValueError, match="--n 1") as caught:
        list(parallel.map_unordered(_refuse, [1], 1))
    assert describe_error(caught.value) == "--n 1: give at least 2"


@pytest.mark.parametrize(
    ("gpus", "workers", "available", "share"),
    [(0, 4, 0, 0), (1, 4, 8, 1), (1, 4, 4, 1), (1, 4, 1, 0.25), (1, 3, 2, 0.5), (1, 3, 1, 0.3333), (1, 5, 2, 0.3333)],
)
def test_workers_share_gpus_if_there_are_fewer(gpus: int, workers: int, available: int, share: float) -> None:
    assert connection.gpu_share(gpus, workers, available) == share
    assert not share or int(1 / share) * available >= workers, "all workers run at once"


@pytest.mark.whole
@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has a GPU")
def test_workers_that_need_a_gpu_are_refused_without_one(home: Path) -> None:
    with pytest.raises(ValueError, match="^2 workers on GPUs, but Ray finds no GPU on this machine; use the CPU$"):
        list(parallel.map_unordered(_square, range(3), 2, gpus=1))
