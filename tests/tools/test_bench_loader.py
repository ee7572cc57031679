"""The benchmark of the loader runs, and every loader in it does the same work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_table_has_every_loader() -> None:
    line = [
        sys.executable,
        "tools/bench/bench_loader.py",
        "--samples",
        "512",
        "--rounds",
        "1",
        "--step-seconds",
        "0.01",
    ]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    rows = {text[:34].strip(): text[34:].split() for text in done.stdout.splitlines()}
    for name in ("ours, local disk", "bare Pillow", "webdataset"):
        assert float(rows[name][0]) > 10
    assert float(rows["webdataset"][2]) == pytest.approx(
        float(rows["ours, local disk"][0]) / float(rows["webdataset"][0]), rel=0.02
    )
    assert "waiting for data, local disk:" in done.stdout and "resident after epochs 1 to 3" in done.stdout


@pytest.mark.whole
def test_pictures_that_are_not_there_are_a_sentence(tmp_path: Path) -> None:
    line = [sys.executable, "tools/bench/bench_loader.py", "--images", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "no .jpg in it" in done.stderr
