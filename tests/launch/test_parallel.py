"""map_unordered calls the function once per task, in this process or in several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from t2idist.launch import parallel
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
