"""A whole sweep on Ray Tune: killed in the middle, resumed by the same command, and its winner trained again."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import ROOT, command_environment, processes_with_mark, write_recipe

KEY = "stages.attngan.model.generator_lr"


def command(recipe: Path, *more: str, metric: str = "generator/adversarial_32") -> list[str]:
    values = f"{KEY}=[1e-4,2e-4,4e-4]"
    options = ["--metric", metric, "--mode", "min", "--trials", "3", "--no-early-stopping"]
    return [sys.executable, "-m", "t2idist.cli", "sweep", str(recipe), values, *options, *more]


def read_json(file: Path) -> Any:
    return json.loads(file.read_text())


def seen(folder: Path) -> int:
    """Return the images that any trial has seen in its last stage."""
    files = folder.glob("runs/tiny-sweep-0*/attngan/metrics.jsonl")
    return max((json.loads(f.read_text().splitlines()[-1])["images"] for f in files if f.stat().st_size), default=0)


def wait_until(condition: Any, process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_sweep_continues_without_losing_a_trial(tmp_path: Path) -> None:
    stages = {"stages.attngan.images=320", "stages.attngan.checkpoint_every_images=64"}
    recipe = write_recipe(tmp_path, cluster={"workers": 1, "cpus_per_worker": 1})
    words = command(recipe, *sorted(stages), "--max-concurrent", "2")
    mark = f"{os.getpid()}-{time.time_ns()}"
    environment = {**command_environment(), "HOME": str(tmp_path), "T2IDIST_MARK": mark}
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    wait_until(lambda: seen(tmp_path) >= 96, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not processes_with_mark(mark))  # nothing is left running
    before = {folder.name for folder in (tmp_path / "runs").glob("tiny-sweep-0*")}
    assert {trial["number"] for trial in read_json(tmp_path / "runs/tiny-sweep/sweep.json")["trials"]} == {1, 2, 3}

    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    sweep = read_json(tmp_path / "runs/tiny-sweep/sweep.json")
    assert [(trial["state"], trial["images"]) for trial in sweep["trials"]] == [("finished", 320)] * 3
    assert sorted(float(trial["values"][KEY]) for trial in sweep["trials"]) == [1e-4, 2e-4, 4e-4]
    resumed = [
        attempt["resumed"]["attngan"]["images"]
        for name in before
        for attempt in read_json(tmp_path / "runs" / name / "attempts.json")[1:]
        if "attngan" in attempt.get("resumed", {})
    ]
    assert resumed and min(resumed) > 0, "interrupted trials continue from their checkpoints"
    assert len(read_json(tmp_path / "runs/tiny-sweep-shared/attempts.json")) == 1, "DAMSM was trained once"
    assert not processes_with_mark(mark)
    page = (tmp_path / "runs/tiny-sweep/report.html").read_text()
    assert all(f"tiny-sweep-000{n}/report.html" in page for n in (1, 2, 3)) and "data:image/" in page


def run_sweep(folder: Path, *more: str, workers: int = 1, **options: str) -> tuple[list[str], dict[str, str]]:
    """Run a whole sweep; returns its command and environment."""
    recipe = write_recipe(folder, cluster={"workers": workers, "cpus_per_worker": 1})
    words, environment = command(recipe, *more, **options), {**command_environment(), "HOME": str(folder)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    sweep = read_json(folder / "runs/tiny-sweep/sweep.json")
    assert [(trial["state"], trial["images"]) for trial in sweep["trials"]] == [("finished", 64)] * 3
    return words, environment


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_trials_of_several_workers_train_in_the_cluster_of_the_sweep(tmp_path: Path) -> None:
    run_sweep(tmp_path, workers=2)
    for name in ("shared", "0001", "0002", "0003"):
        (attempt,) = read_json(tmp_path / f"runs/tiny-sweep-{name}/attempts.json")
        assert attempt["workers"] == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_of_the_winner_gives_its_weights_bit_for_bit(tmp_path: Path) -> None:
    too_little_time = ["scores.n=16", "scores.real=16", "scores.share=0.000001"]
    words, environment = run_sweep(tmp_path, *too_little_time, metric="kid")
    sweep = read_json(tmp_path / "runs/tiny-sweep/sweep.json")
    printed = subprocess.run([*words, "--best"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    best = min(sweep["trials"], key=lambda trial: trial["value"])
    program, *arguments = shlex.split(printed.stdout)
    assert program == "t2idist" and f"{KEY}={best['values'][KEY]}" in arguments
    again = [sys.executable, "-m", "t2idist.cli", *arguments, "--local"]
    subprocess.run(again, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)
    ours, theirs = (tmp_path / f"runs/tiny-sweep-{name}/attngan/export" for name in ("best", f"{best['number']:04d}"))
    weights = "generator.safetensors"
    assert (ours / weights).read_bytes() == (theirs / weights).read_bytes()
