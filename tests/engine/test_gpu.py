"""Tests on an accelerator: steps and images equal those of the CPU, and the benchmarks run.

The checks of tests/helpers/device_checks.py also run on the CPU, so that they are known to work.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from t2idist.evaluate import score
from tests.helpers import device_checks
from tests.helpers.hardware import needs_bfloat16
from tests.helpers.runs import check_finished, run_command, write_recipe
from tools.bench import bench_sample, bench_step

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator on this machine"),
]
SYSTEMS = [
    "damsm", "attngan", "stackgan_pp", "stargan", "mirrorgan", "dm_gan", "df_gan", "gan_cls", "stackgan", "dcgan",
    "style", "captioner", "char_text",
]  # fmt: skip
BENCHMARKED = [name for name in SYSTEMS if name != "char_text"]
"""Systems with a step in the authors' way."""


def on_gpu(function):  # type: ignore[no-untyped-def]
    for mark in GPU:
        function = mark(function)
    return function


def accelerator() -> str:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    return device.type


@pytest.mark.parametrize("name", device_checks.QUICK)
def test_checks_pass_on_the_cpu(name: str) -> None:
    device_checks.CHECKS[name](torch.device("cpu"))


@pytest.mark.whole
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=needs_bfloat16) if name in device_checks.IN_BFLOAT16 else name
        for name in device_checks.CHECKS
        if name not in device_checks.QUICK
    ],
)
def test_longer_checks_pass_on_the_cpu(name: str) -> None:
    device_checks.CHECKS[name](torch.device("cpu"))


@on_gpu
@pytest.mark.parametrize("name", device_checks.CHECKS)
def test_check(name: str) -> None:
    device_checks.CHECKS[name](torch.device(accelerator()))


@on_gpu
@pytest.mark.parametrize("system", SYSTEMS)
def test_two_steps_equal_those_of_the_cpu(system: str) -> None:
    reports = []
    for device in ("cpu", accelerator()):
        arguments = bench_step.build_parser().parse_args(
            [system, "--group-size", "4", "--precision", "float64", "--device", device]
        )
        torch.manual_seed(1)
        benchmark = bench_step.make_benchmark("best", arguments)
        for _ in range(2):
            benchmark.trainer.run_step(benchmark.batch)
        reports.append(benchmark.trainer.reduce_reports())
    expected, actual = reports
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert actual[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@on_gpu
@pytest.mark.parametrize("system", BENCHMARKED)
def test_bfloat16_steps_are_finite_and_both_benchmarks_measure(system: str) -> None:
    arguments = bench_step.build_parser().parse_args([system, "--group-size", "4", "--device", accelerator()])
    benchmarks = {name: bench_step.make_benchmark(name, arguments) for name in ("authors", "best")}
    results = bench_step.measure(benchmarks, 1)
    assert benchmarks["best"].trainer.guard.skipped_steps == 0
    assert all(result.seconds > 0 and result.memory > 0 for result in results.values())


@on_gpu
def test_images_equal_those_of_the_cpu() -> None:
    images = []
    for device in ("cpu", accelerator()):
        torch.manual_seed(0)
        arguments = bench_sample.build_parser().parse_args(["attngan", "--batch-size", "3", "--device", device])
        samplers = bench_sample.samplers(arguments)
        images.append([sample().images[-1].cpu() for sample in samplers.values()])
    for name, expected, actual in zip(samplers, *images, strict=True):
        assert (actual - expected).abs().max() < (0.2 if name == "bfloat16" else 5e-3), name


@on_gpu
def test_bench_step_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_step.py", "attngan", "--steps", "1", "--device", accelerator()])
    assert bench_step.main() == 0
    assert "times as fast as authors" in capsys.readouterr().out


@on_gpu
@pytest.mark.parametrize("local", [True, False], ids=["in this process", "under Ray"])
def test_a_whole_run_with_a_gpu_and_scores_of_its_images(tmp_path: Path, local: bool) -> None:
    recipe = str(write_recipe(tmp_path, cluster={"workers": 1, "gpus_per_worker": 1}))
    done = run_command(recipe, "precision=bfloat16", *(["--local"] if local else []))
    assert done.returncode == 0, done.stderr
    check_finished(tmp_path)
    assert run_command(recipe, "precision=bfloat16", "--local").returncode == 0  # it is done: nothing to train
    if local:
        export = tmp_path / "runs/tiny/attngan/export"
        arguments = [
            "--export",
            str(export),
            "--data",
            "emoji",
            "--metrics",
            "r_precision",
            "--n",
            "200",
            "--split",
            "train",
        ]
        assert score.main([*arguments, "--device", accelerator()]) == 0
