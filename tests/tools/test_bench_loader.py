"""The loader benchmark runs, and every loader in it does the same work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_benchmark(*arguments: str, timeout: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/bench/bench_loader.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.slow
def test_table_has_a_row_for_every_loader() -> None:
    process = run_benchmark("--samples", "512", "--rounds", "1", "--step-seconds", "0.01", timeout=240)
    assert process.returncode == 0, process.stderr
    rows = {line[:34].strip(): line[34:].split() for line in process.stdout.splitlines()}
    for name in ("ours, local disk", "bare Pillow", "webdataset"):
        assert float(rows[name][0]) > 10
    ratio = float(rows["ours, local disk"][0]) / float(rows["webdataset"][0])
    assert float(rows["webdataset"][2]) == pytest.approx(ratio, rel=0.02)
    assert "waiting for data, local disk:" in process.stdout and "resident after epochs 1 to 3" in process.stdout


@pytest.mark.whole
def test_missing_images_are_a_one_line_error(tmp_path: Path) -> None:
    process = run_benchmark("--images", str(tmp_path), timeout=120)
    assert process.returncode == 2 and "no .jpg in it" in process.stderr
