"""Tests on an accelerator: steps and images equal those of the CPU, and the benchmarks run."""

from __future__ import annotations

import sys

import pytest
import torch

from tools.bench import bench_sample, bench_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator on this machine"),
]
SYSTEMS = ["damsm", "attngan", "stackgan_pp", "stargan", "mirrorgan", "gan_cls", "stackgan", "dcgan", "style"]


def accelerator() -> str:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    return device.type


@pytest.mark.parametrize("system", SYSTEMS)
def test_two_steps_equal_those_of_the_cpu(system: str) -> None:
    reports = []
    for device in ("cpu", accelerator()):
        arguments = bench_step.build_parser().parse_args(
            [system, "--group-size", "4", "--precision", "float64", "--device", device]
        )
        torch.manual_seed(1)
        benchmark = bench_step.make_benchmark("best", arguments)
        benchmark.timed_steps(2)
        reports.append(benchmark.trainer.reduce_reports())
    expected, actual = reports
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert actual[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("system", SYSTEMS)
def test_bfloat16_steps_are_finite_and_both_benchmarks_measure(system: str) -> None:
    arguments = bench_step.build_parser().parse_args([system, "--group-size", "4", "--device", accelerator()])
    benchmarks = {name: bench_step.make_benchmark(name, arguments) for name in ("authors", "best")}
    results = bench_step.measure(benchmarks, 1)
    assert benchmarks["best"].trainer.guard.skipped_steps == 0
    assert all(result.seconds > 0 and result.memory > 0 for result in results.values())


def test_images_equal_those_of_the_cpu() -> None:
    images = []
    for device in ("cpu", accelerator()):
        torch.manual_seed(0)
        arguments = bench_sample.build_parser().parse_args(["attngan", "--batch-size", "3", "--device", device])
        samplers = bench_sample.samplers(arguments)
        images.append([sample().images[-1].cpu() for sample in samplers.values()])
    for name, expected, actual in zip(samplers, *images, strict=True):
        assert (actual - expected).abs().max() < (0.2 if name == "bfloat16" else 5e-3), name


def test_bench_step_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_step.py", "attngan", "--steps", "1", "--device", accelerator()])
    assert bench_step.main() == 0
    assert "times as fast as authors" in capsys.readouterr().out
