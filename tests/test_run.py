"""Whole runs from the command line: in one process, killed and resumed, and on two Ray workers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from t2idist.engine.batches import read_ledger
from tests.helpers.runs import (
    ROOT,
    check_finished,
    command_environment,
    command_line,
    copy_run,
    export_bytes,
    images_in_progress,
    processes_with_mark,
    run_command,
    train_with_killed_worker,
    worker_pids,
    write_recipe,
)


@pytest.mark.whole
@pytest.mark.parametrize("system", ["attngan", pytest.param("stackgan_pp", marks=pytest.mark.slow)])
def test_killed_run_resumes_to_the_same_weights(tmp_path: Path, system: str) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, killed = write_recipe(tmp_path / "whole", system), write_recipe(tmp_path / "killed", system)
    done = run_command(str(whole), "--local")
    assert done.returncode == 0, done.stderr
    check_finished(tmp_path / "whole", system)
    process = subprocess.Popen(
        command_line(str(killed), "--local"), cwd=ROOT, env=command_environment(), stdout=subprocess.DEVNULL
    )
    checkpoints = tmp_path / "killed/runs/tiny" / system / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("*/commit.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/runs/tiny" / system / "export/export.json").exists()
    again = run_command(str(killed), "--local")
    assert again.returncode == 0, again.stderr
    assert "restarts 1" in again.stdout
    check_finished(tmp_path / "killed", system)
    for stage in ("damsm", system):
        assert export_bytes(tmp_path / "killed", stage) == export_bytes(tmp_path / "whole", stage)


@pytest.mark.whole
def test_finished_run_is_not_trained_again(finished: Path, tmp_path: Path) -> None:
    file = copy_run(finished, tmp_path)
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.safetensors")}
    assert run_command(str(file), "--local").returncode == 0
    assert before == {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.safetensors")}


@pytest.mark.whole
def test_encoder_with_another_vocabulary_is_refused(finished: Path, tmp_path: Path) -> None:
    file = copy_run(finished, tmp_path)
    encoder = tmp_path / "runs/tiny/damsm/export"
    index = json.loads((encoder / "export.json").read_text())
    index["vocabulary"] = index["vocabulary"][:100]
    (encoder / "export.json").write_text(json.dumps(index))
    refused = run_command(str(file), "--local", "name=other", f"stages.attngan.uses={{damsm: {encoder}}}")
    assert refused.returncode == 2
    assert "does not fit the data" in refused.stderr and len(refused.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_two_ray_workers_train_the_same_weights_as_one(finished: Path, tmp_path: Path) -> None:
    done = run_command(str(write_recipe(tmp_path, cluster={"workers": 2, "cpus_per_worker": 1})))
    assert done.returncode == 0, done.stderr + done.stdout
    assert "workers 2" in done.stdout
    check_finished(tmp_path)
    for stage, file in (("damsm", "text"), ("attngan", "generator")):
        ours = load_file(tmp_path / "runs/tiny" / stage / f"export/{file}.safetensors")
        theirs = load_file(finished / "runs/tiny" / stage / f"export/{file}.safetensors")
        for name, value in theirs.items():
            assert float((ours[name].double() - value.double()).norm()) <= 1e-3 * float(value.double().norm()) + 1e-6, (
                name
            )


@pytest.mark.slow
def test_unrecoverable_fault_ends_the_run_with_its_message(finished: Path, tmp_path: Path) -> None:
    file = copy_run(finished, tmp_path)
    (tmp_path / "runs/tiny/attngan/export/export.json").unlink()
    for marker in (tmp_path / "runs/tiny/attngan/checkpoints").glob("*/commit.json"):
        marker.write_text("{")
    failed = run_command(str(file))
    assert failed.returncode == 1
    assert "the run failed: " in failed.stderr and "no checkpoint is valid" in failed.stderr


@pytest.mark.whole
def test_killed_worker_is_replaced_and_the_weights_are_the_same(tmp_path: Path) -> None:
    out, images, resumed = train_with_killed_worker(tmp_path, "report.ledger=true")
    assert "restarts 1" in out
    assert resumed["from"] == "copy in memory" and resumed["images"] >= images - 8
    at = tmp_path / "killed/runs/tiny/attngan"
    lines = [json.loads(line) for line in (at / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == list(range(8, 321, 8))
    assert list(read_ledger(str(at))) == [(step, group) for step in range(40) for group in range(2)]


def interrupt(folder: Path, number: signal.Signals, images: int) -> tuple[int, str]:
    """Signal a run on its own Ray cluster once it has seen `images` images (0: while its workers start).

    Returns:
        Exit status and stderr, after all processes that the run started have ended.
    """
    mark = f"{os.getpid()}-{time.time_ns()}"
    process = subprocess.Popen(
        command_line(
            str(write_recipe(folder)), "stages.attngan.images=8000", "stages.attngan.checkpoint_every_images=8000"
        ),
        cwd=ROOT,
        env={**command_environment(), "T2IDIST_MARK": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's background ignores it
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while images_in_progress(folder / "runs/tiny", "attngan") < images or not worker_pids(mark):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    while remaining := processes_with_mark(mark):
        assert time.monotonic() < deadline + 60, remaining
        time.sleep(0.2)
    return process.returncode, stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "images"), [(signal.SIGINT, 80), (signal.SIGINT, 0), (signal.SIGTERM, 0)])
def test_signal_ends_the_run_and_all_its_processes(tmp_path: Path, number: signal.Signals, images: int) -> None:
    status, stderr = interrupt(tmp_path, number, images)
    assert (status, stderr) == (
        128 + number,
        "interrupted; run the same command again to resume from the last checkpoint\n",
    )
    assert json.loads((tmp_path / "runs/tiny/outcome.json").read_text())["state"] == "interrupted"


@pytest.mark.slow
def test_sigterm_during_training_saves_a_checkpoint_first(tmp_path: Path) -> None:
    status, stderr = interrupt(tmp_path, signal.SIGTERM, 80)
    match = re.fullmatch(r"ended on request, saved at (\d+) images; run the same command again to resume\n", stderr)
    assert status == 143 and match is not None and int(match[1]) >= 80, stderr
    assert json.loads((tmp_path / "runs/tiny/outcome.json").read_text())["state"] == "stopped"
    done = run_command(str(write_recipe(tmp_path)), "--local", f"stages.attngan.images={int(match[1]) + 8}")
    assert done.returncode == 0, done.stderr
    attempts = json.loads((tmp_path / "runs/tiny/attempts.json").read_text())
    assert attempts[-1]["resumed"]["attngan"]["images"] == int(match[1])
