"""map_unordered calls the function once per task, in this process or in several."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from t2idist.launch import parallel


def _square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def test_no_workers_runs_in_this_process_without_ray() -> None:
    assert list(parallel.map_unordered(_square, range(3), 0)) == [(n * n, os.getpid()) for n in range(3)]
    code = "import sys, t2idist.evaluate.score; assert 'ray' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.whole
def test_two_workers_run_every_task_once() -> None:
    done = list(parallel.map_unordered(_square, iter(range(11)), 2))
    assert sorted(value for value, _ in done) == [n * n for n in range(11)]
    assert os.getpid() not in {process for _, process in done}
