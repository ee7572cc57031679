"""What needs an accelerator: steps and pictures there are those of the CPU, and the benchmarks run."""

from __future__ import annotations

import sys

import pytest
import torch

from tools.bench import bench_sample, bench_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator on this machine"),
]
SYSTEMS = ["damsm", "attngan", "stackgan_pp", "stargan", "mirrorgan", "gan_cls", "stackgan", "dcgan", "style"]


def accelerator() -> str:
    found = torch.accelerator.current_accelerator()
    assert found is not None
    return found.type


@pytest.mark.parametrize("system", SYSTEMS)
def test_two_steps_are_those_of_the_cpu(system: str) -> None:
    reports = []
    for device in ("cpu", accelerator()):
        words = bench_step.build_parser().parse_args(
            [system, "--group-size", "4", "--precision", "float64", "--device", device]
        )
        torch.manual_seed(1)
        way = bench_step.make_benchmark("best", words)
        way.timed_steps(2)
        reports.append(way.trainer.reduce_reports())
    theirs, ours = reports
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("system", SYSTEMS)
def test_half_precision_steps_are_finite_and_both_ways_are_measured(system: str) -> None:
    words = bench_step.build_parser().parse_args([system, "--group-size", "4", "--device", accelerator()])
    ways = {name: bench_step.make_benchmark(name, words) for name in ("authors", "best")}
    found = bench_step.measure(ways, 1)
    assert ways["best"].trainer.guard.skipped_steps == 0
    assert all(each.seconds > 0 and each.memory > 0 for each in found.values())


def test_pictures_are_those_of_the_cpu() -> None:
    drawn = []
    for device in ("cpu", accelerator()):
        torch.manual_seed(0)
        made = bench_sample.samplers(bench_sample.build_parser().parse_args(["attngan", "--batch-size", "3", "--device", device]))
        drawn.append([draw().images[-1].cpu() for draw in made.values()])
    for (name, theirs), ours in zip(zip(made, drawn[0], strict=True), drawn[1], strict=True):
        assert (ours - theirs).abs().max() < (0.2 if name == "bfloat16" else 5e-3), name


def test_the_benchmark_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_step.py", "attngan", "--steps", "1", "--device", accelerator()])
    assert bench_step.main() == 0
    assert "times as fast as authors" in capsys.readouterr().out
