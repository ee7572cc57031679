"""Pieces of work over processes: every one is done, whatever their number."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from t2idist.launch import parallel


def _square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def test_alone_it_is_this_process_and_ray_stays_away() -> None:
    assert list(parallel.map_unordered(_square, range(3), 0)) == [(n * n, os.getpid()) for n in range(3)]
    code = "import sys, t2idist.evaluate.score; assert 'ray' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.whole
def test_every_piece_is_done_once_by_two_processes() -> None:
    done = list(parallel.map_unordered(_square, iter(range(11)), 2))
    assert sorted(value for value, _ in done) == [n * n for n in range(11)]
    assert os.getpid() not in {process for _, process in done}
