"""The benchmarks of a training step and of sampling run for every system and report bad arguments."""

from __future__ import annotations

import sys
import time

import pytest
import torch

from tools.bench import bench_sample, bench_step

pytestmark = pytest.mark.whole


def run_benchmark(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench_step.py", *arguments, "--threads", "1"])
    return bench_step.main()


def check_table(output: str) -> None:
    """Check the table of both steps at two images per step."""
    lines = {line[:46].strip(): line[46:].split() for line in output.splitlines()}
    assert lines["phase"] == ["authors", "ms", "best", "ms"]
    phases = [name for name in lines if name.endswith(("forward", "EMA", "the rest")) or name.startswith("through")]
    for column in (0, 1):
        total = sum(float(lines[name][column]) for name in phases)
        assert total == pytest.approx(float(lines["step"][column]), abs=0.1 * len(phases))
        assert float(lines["images/s"][column]) == pytest.approx(
            2000 / float(lines["step"][column]), rel=0.02, abs=0.06
        )
        assert float(lines["memory of a step, MiB"][column]) > 0
    assert "GFLOP an image" in output and "times as fast as authors" in output


@pytest.mark.whole
def test_table_shows_the_phases_of_both_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_benchmark(monkeypatch, "stackgan_pp", "--steps", "1", "--group-size", "2", "--floor", "1000") == 1
    output, error = capsys.readouterr()
    assert "times as fast as authors; --floor is 1000" in error
    check_table(output)


@pytest.mark.parametrize("system", ["damsm", "attngan", "stargan", "mirrorgan", "dm_gan", "df_gan", "gan_cls", "style"])
def test_every_system_is_measured(capsys: pytest.CaptureFixture[str], system: str) -> None:
    options = bench_step.build_parser().parse_args([system, "--group-size", "2"])
    results = bench_step.measure({name: bench_step.make_benchmark(name, options) for name in ("authors", "best")}, 1)
    for result in results.values():
        assert sum(result.phases.values()) == pytest.approx(result.seconds) and result.memory > 0
    run, stage = bench_step.select_stage(options)
    with torch.device("meta"):
        built, info = bench_step.build_system(run, stage, options.vocabulary_size)
    flops = bench_step.flops_per_image(built, info)
    assert flops > 1e6
    bench_step.print_table(results, 2, flops, peak=1e12)
    check_table(capsys.readouterr().out)


@pytest.mark.whole
def test_step_is_the_mean_over_a_period_if_roles_alternate() -> None:
    options = bench_step.build_parser().parse_args(["stargan", "--preset", "celeba128", "--group-size", "1"])
    benchmark = bench_step.make_benchmark("best", options)
    result = bench_step.measure({"best": benchmark}, 1)["best"]
    assert benchmark.trainer.step == 5 * 3  # the generator is updated at every fifth step: first, measured, memory
    assert "generator backward, Adam, EMA" in result.phases


@pytest.mark.whole
def test_one_step_can_be_measured_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for flag, name in (("--best", "best"), ("--like=authors", "authors")):
        assert run_benchmark(monkeypatch, "dcgan", "--steps", "1", "--group-size", "2", flag) == 0
        assert f"{'phase':46}{name + ' ms':>16}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "recipe", ["damsm", "attngan", "stackgan_pp", "stargan", "mirrorgan", "dm_gan", "df_gan", "gan_cls", "stackgan"]
)
def test_reference_step_gives_the_same_losses(recipe: str) -> None:
    options = bench_step.build_parser().parse_args([recipe, "--group-size", "4", "--precision", "float64"])
    reports = []
    for name in ("authors", "best"):
        torch.manual_seed(1)
        benchmark = bench_step.make_benchmark(name, options)
        benchmark.timed_steps(2)
        values = benchmark.trainer.reduce_reports()
        reports.append(
            {name: value for name, value in values.items() if "accuracy" not in name and "norm/" not in name}
        )
    reference, ours = reports
    assert reference.keys() == ours.keys() and len(ours) >= 2
    for name, value in ours.items():
        assert reference[name] == pytest.approx(value, rel=1e-6, abs=1e-7), name


def test_error_names_a_system_that_the_recipe_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_benchmark(monkeypatch, "stargan", "--recipe", "attngan") == 2
    assert "recipe attngan has no stage of system 'stargan'; it has damsm" in capsys.readouterr().err


def test_floor_applies_to_the_ratio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_benchmark(monkeypatch, "dcgan", "--floor", "1", "--best") == 2
    assert "leave --like and --best out" in capsys.readouterr().err
    assert bench_step.check_floor({"authors": 3.0, "best": 1.0}, "best", 3.0) == 0
    assert bench_step.check_floor({"authors": 2.9, "best": 1.0}, "best", 3.0) == 1
    assert bench_step.check_floor({"best": 1.0}, "best", None) == 0


@pytest.mark.whole
def test_sampling_benchmark_prints_every_variant(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for system, code in (("attngan", 0), ("dcgan", 0), ("stargan", 2)):
        arguments = [system, "--steps", "1", "--batch-size", "3", "--threads", "1"]
        monkeypatch.setattr(sys, "argv", ["bench_sample.py", *arguments])
        assert bench_sample.main() == code
        captured = capsys.readouterr()
        if code:
            assert captured.err == "error: stargan does not generate images from captions\n"
        else:
            assert [line.split()[0] for line in captured.out.splitlines()[1:]] == ["authors", "float32", "bfloat16"]


def test_sampling_variants_generate_the_same_images() -> None:
    samplers = bench_sample.samplers(bench_sample.build_parser().parse_args(["attngan", "--batch-size", "3"]))
    reference, ours, half = (sample().images[-1] for sample in samplers.values())
    torch.testing.assert_close(reference, ours, rtol=1e-3, atol=1e-4)
    assert 0 < (half - reference).abs().max() < 0.1


class HostEvent:
    """Stands for an event of an accelerator."""

    def __init__(self, device: torch.device, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: HostEvent) -> float:
        return 1e3 * (end.time - self.time)


def test_phases_by_events_come_from_further_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Event", HostEvent)
    options = bench_step.build_parser().parse_args(["dcgan", "--group-size", "2"])
    benchmark = bench_step.make_benchmark("best", options)
    expected = benchmark.timed_steps(1).phases.keys()
    benchmark.trainer.by_events = True
    step = benchmark.trainer.step
    times = benchmark.timed_steps(2)
    assert benchmark.trainer.step == step + 4 and times.phases.keys() == expected
    assert 0 < times.submit_seconds <= times.seconds == pytest.approx(sum(times.phases.values()))
