"""The benchmark of one step: it runs for every system and says what it cannot find."""

from __future__ import annotations

import sys

import pytest

from tools import bench_step


def bench(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench_step.py", *words, "--threads", "1"])
    return bench_step.main()


@pytest.mark.parametrize("system", ["damsm", "attngan", "stackgan_pp"])
def test_prints_phases_for_both_precisions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], system: str
) -> None:
    assert bench(monkeypatch, system, "--steps", "1", "--group-size", "2") == 0
    lines = {line[:46].strip(): line[46:].split() for line in capsys.readouterr().out.splitlines()}
    assert lines["phase"] == ["float32", "ms", "bfloat16", "ms"]
    phases = [name for name in lines if name.endswith(("forward", "EMA", "the rest")) or name.startswith("through")]
    for column in (0, 1):
        total = sum(float(lines[name][column]) for name in phases)
        assert total == pytest.approx(float(lines["step"][column]), abs=0.1 * len(phases))
        assert float(lines["images/s"][column]) == pytest.approx(
            2000 / float(lines["step"][column]), rel=0.02, abs=0.06
        )


def test_an_unknown_system_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(monkeypatch, "stargan", "--recipe", "attngan") == 2
    assert "recipe attngan has no stage of system 'stargan'; it has damsm" in capsys.readouterr().err
