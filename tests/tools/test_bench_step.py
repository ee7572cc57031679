"""The benchmark of one step: it runs for every system and says what it cannot find."""

from __future__ import annotations

import sys

import pytest
import torch

from tools.bench import bench_sample, bench_step


def bench(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench_step.py", *words, "--threads", "1"])
    return bench_step.main()


def check_table(said: str) -> None:
    """Of both ways, at two images a step."""
    lines = {line[:46].strip(): line[46:].split() for line in said.splitlines()}
    assert lines["phase"] == ["authors", "ms", "best", "ms"]
    phases = [name for name in lines if name.endswith(("forward", "EMA", "the rest")) or name.startswith("through")]
    for column in (0, 1):
        total = sum(float(lines[name][column]) for name in phases)
        assert total == pytest.approx(float(lines["step"][column]), abs=0.1 * len(phases))
        assert float(lines["images/s"][column]) == pytest.approx(
            2000 / float(lines["step"][column]), rel=0.02, abs=0.06
        )
        assert float(lines["memory of a step, MiB"][column]) > 0
    assert "GFLOP an image" in said and "times as fast as authors" in said


def test_prints_phases_of_both_ways(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(monkeypatch, "stackgan_pp", "--steps", "1", "--group-size", "2", "--floor", "1000") == 1
    said, complaint = capsys.readouterr()
    assert "times as fast as authors; --floor is 1000" in complaint
    check_table(said)


@pytest.mark.parametrize("system", ["damsm", "attngan", "stargan", "mirrorgan", "gan_cls", "style"])
def test_every_system_is_measured(capsys: pytest.CaptureFixture[str], system: str) -> None:
    words = bench_step.parser().parse_args([system, "--group-size", "2"])
    found = bench_step.measure({name: bench_step.make_way(name, words) for name in ("authors", "best")}, 1)
    for each in found.values():
        assert sum(each.phases.values()) == pytest.approx(each.seconds) and each.memory > 0
    run, stage = bench_step.chosen_stage(words)
    with torch.device("meta"):
        built, plan = bench_step.system_of(run, stage, words.vocabulary_size)
    flops = bench_step.flops_per_image(built, plan)
    assert flops > 1e6
    bench_step.show(found, 2, flops, peak=1e12)
    check_table(capsys.readouterr().out)


def test_a_step_is_the_mean_of_a_whole_turn_where_roles_take_turns() -> None:
    words = bench_step.parser().parse_args(["stargan", "--preset", "celeba128", "--group-size", "1"])
    way = bench_step.make_way("best", words)
    found = bench_step.measure({"best": way}, 1)["best"]
    assert way.trainer.step == 5 * 3  # the generator's turn comes every fifth time: first, measured, memory
    assert "generator backward, Adam, EMA" in found.phases


def test_one_way_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for word, name in (("--best", "best"), ("--like=authors", "authors")):
        assert bench(monkeypatch, "dcgan", "--steps", "1", "--group-size", "2", word) == 0
        assert f"{'phase':46}{name + ' ms':>16}\n" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["damsm", "attngan", "stackgan_pp", "stargan", "mirrorgan", "gan_cls", "stackgan"])
def test_the_authors_way_gives_the_same_numbers(recipe: str) -> None:
    words = bench_step.parser().parse_args([recipe, "--group-size", "4", "--precision", "float64"])
    reports = []
    for name in ("authors", "best"):
        torch.manual_seed(1)
        way = bench_step.make_way(name, words)
        way.timed_steps(2)
        found = way.trainer.reduce_reports()
        reports.append({name: value for name, value in found.items() if "accuracy" not in name and "norm/" not in name})
    authors, ours = reports
    assert authors.keys() == ours.keys() and len(ours) >= 2
    for name, value in ours.items():
        assert authors[name] == pytest.approx(value, rel=1e-6, abs=1e-7), name


def test_an_unknown_system_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(monkeypatch, "stargan", "--recipe", "attngan") == 2
    assert "recipe attngan has no stage of system 'stargan'; it has damsm" in capsys.readouterr().err


def test_a_floor_is_of_a_ratio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(monkeypatch, "dcgan", "--floor", "1", "--best") == 2
    assert "leave --like and --best out" in capsys.readouterr().err
    assert bench_step.too_slow({"authors": 3.0, "best": 1.0}, "best", 3.0) == 0
    assert bench_step.too_slow({"authors": 2.9, "best": 1.0}, "best", 3.0) == 1
    assert bench_step.too_slow({"best": 1.0}, "best", None) == 0


def test_pictures_a_second(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for system, code in (("attngan", 0), ("dcgan", 0), ("stargan", 2)):
        words = [system, "--steps", "1", "--batch-size", "3", "--threads", "1"]
        monkeypatch.setattr(sys, "argv", ["bench_sample.py", *words])
        assert bench_sample.main() == code
        said = capsys.readouterr()
        if code:
            assert said.err == "error: stargan draws no pictures of captions\n"
        else:
            assert [line.split()[0] for line in said.out.splitlines()[1:]] == ["authors", "float32", "bfloat16"]


def test_the_sampling_ways_draw_the_same() -> None:
    made = bench_sample.ways(bench_sample.parser().parse_args(["attngan", "--batch-size", "3"]))
    theirs, ours, half = (draw().images[-1] for draw in made.values())
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)
    assert 0 < (half - theirs).abs().max() < 0.1
