"""The checks on a GPU are rehearsed on the CPU; a part that fails or takes too long is a result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import check_gpu

pytestmark = pytest.mark.whole

WITHOUT = "import sys; sys.modules.update(dict.fromkeys(('ray', 'deepspeed', 'dicebear'))); "


def check(tmp_path: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    out = tmp_path / "results.jsonl"
    words = [sys.executable, "tools/check_gpu.py", "--device", "cpu", "--tiny", "--out", str(out), *arguments]
    done = subprocess.run(words, cwd=check_gpu.ROOT, capture_output=True, text=True, timeout=900, check=False)
    return done, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def test_one_part_is_recorded_and_shown(tmp_path: Path) -> None:
    done, results = check(tmp_path, "--parts", "environment")
    assert done.returncode == 0, done.stderr
    assert [result["name"] for result in results] == ["versions", "peak"]
    assert "environment  peak" in done.stdout and "bfloat16_tflops" in done.stdout


@pytest.mark.whole
@pytest.mark.timeout(900)
def test_all_parts_are_rehearsed_on_the_cpu(tmp_path: Path) -> None:
    done, results = check(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {result["part"] for result in results} == set(check_gpu.PARTS)


def test_a_part_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(check_gpu.LIMITS, "environment", 0.01)
    options = check_gpu.build_parser().parse_args(["--device", "cpu", "--out", str(tmp_path / "out")])
    check_gpu.run_part(options, "environment")
    assert "took more than 0.01 s" in (tmp_path / "out").read_text()


def test_parts_need_no_ray_no_deepspeed_and_no_avatars() -> None:
    line = f"{WITHOUT}import tools.check_gpu, tests.helpers.device_checks, tests.helpers.runs, t2idist.training.local"
    assert subprocess.run([sys.executable, "-c", line], cwd=check_gpu.ROOT, check=False).returncode == 0


def test_without_a_gpu_the_command_says_so(tmp_path: Path) -> None:
    done, _ = check(tmp_path, "--parts", "engines")
    assert done.returncode == 2 and "--parts: 'engines'; there are environment" in done.stderr
