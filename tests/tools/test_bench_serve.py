"""tools/bench/bench_serve.py measures a server of an export with random weights."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.helpers.runs import ROOT


@pytest.mark.slow
def test_it_prints_pictures_per_second_and_latency() -> None:
    system = "attngan --preset demo --threads 1 --floor 0.001"
    arguments = f"{system} --clients 2 --n 1 4 --seconds 0.3 --rounds 1"
    words = [sys.executable, "tools/bench/bench_serve.py", *arguments.split(" ")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^sample, 4 at a time: [\d.]+ pictures/s$", done.stdout, re.M)
    assert len(re.findall(r"^ +2 +[14] +[\d.]+ +[\d.]+ +\d+ +\d+$", done.stdout, re.M)) == 2
