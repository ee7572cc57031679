"""Whole runs by the command line: alone, killed and taken up again, and on two real Ray workers."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from t2idist.engine.batches import read_ledger
from t2idist.engine.checkpoint import export
from tests.helpers import small_systems

ROOT = Path(__file__).parent.parent
TREE = {**small_systems.TREE, "branches": 2, "base_size": 16}


def recipe(folder: Path, system: str = "attngan", **top: Any) -> Path:
    """A small run on the emoji that ship: DAMSM and a GAN, seconds long."""
    scale = {"group_size": 4, "groups": 2, "images": 64, "checkpoint_every_images": 16, "pictures_every_images": 32}
    stages = {
        "damsm": {"system": "damsm", **scale, "model": small_systems.DAMSM},
        system: {"system": system, **scale, "uses": small_systems.USES[system], "model": small_systems.MODELS[system]},
    }
    values = {
        "name": "tiny",
        "storage": str(folder / "runs"),
        "precision": "float32",
        "data": {"source": "emoji", "max_words": 8, "threads": 1},
        "cluster": {"workers": [1, 2]},
        "stages": stages,
        **top,
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "t2idist.run", *words]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run(*words: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


def weights(folder: Path, stage: str) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted((folder / "runs/tiny" / stage / "export").glob("*.safetensors"))}


def check_finished(folder: Path, system: str = "attngan") -> None:
    at = folder / "runs/tiny"
    assert export.read_index(str(at / "damsm/export"))["images"] == 64
    assert set(export.read(str(at / system / "export")).weights) == {"generator", "text"}
    lines = [json.loads(line) for line in (at / system / "metrics.jsonl").read_text().splitlines()]
    images = [line["images"] for line in lines]
    assert images == sorted(set(images)) and images[-1] == 64
    assert any(key.startswith("generator/") for key in lines[-1])
    assert list((at / system / "events").iterdir())
    assert (at / system / "pictures/images_000000064.png").exists()
    page = (at / "report.html").read_text()
    assert "data:image/" in page and "http://" not in page.replace("http://www.w3.org", "")


def copied(finished: Path, folder: Path) -> Path:
    """The same in another folder; gives the recipe there."""
    shutil.copytree(finished / "runs", folder / "runs")
    return recipe(folder)


@pytest.mark.whole
@pytest.mark.parametrize("system", ["attngan", pytest.param("stackgan_pp", marks=pytest.mark.slow)])
def test_killed_and_taken_up_again_gives_the_same_model(tmp_path: Path, system: str) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, killed = recipe(tmp_path / "whole", system), recipe(tmp_path / "killed", system)
    done = run(str(whole), "--local")
    assert done.returncode == 0, done.stderr
    check_finished(tmp_path / "whole", system)
    process = subprocess.Popen(command(str(killed), "--local"), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    checkpoints = tmp_path / "killed/runs/tiny" / system / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("*/commit.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/runs/tiny" / system / "export/export.json").exists()
    again = run(str(killed), "--local")
    assert again.returncode == 0, again.stderr
    assert "restarts 1" in again.stdout
    check_finished(tmp_path / "killed", system)
    for stage in ("damsm", system):
        assert weights(tmp_path / "killed", stage) == weights(tmp_path / "whole", stage)


@pytest.mark.whole
def test_a_run_that_is_done_is_done(finished: Path, tmp_path: Path) -> None:
    file = copied(finished, tmp_path)
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.safetensors")}
    assert run(str(file), "--local").returncode == 0
    assert before == {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.safetensors")}


@pytest.mark.whole
def test_an_encoder_that_does_not_know_the_words_is_refused(finished: Path, tmp_path: Path) -> None:
    file = copied(finished, tmp_path)
    encoder = tmp_path / "runs/tiny/damsm/export"
    index = json.loads((encoder / "export.json").read_text())
    index["vocabulary"] = index["vocabulary"][:100]
    (encoder / "export.json").write_text(json.dumps(index))
    refused = run(str(file), "--local", "name=other", f"stages.attngan.uses={{damsm: {encoder}}}")
    assert refused.returncode == 2
    assert "does not fit the data" in refused.stderr and len(refused.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_two_ray_workers_train_what_one_trains(finished: Path, tmp_path: Path) -> None:
    done = run(str(recipe(tmp_path, cluster={"workers": 2, "cpus_per_worker": 1})))
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
def test_a_fault_that_a_restart_cannot_mend_ends_the_run_with_its_sentence(finished: Path, tmp_path: Path) -> None:
    file = copied(finished, tmp_path)
    (tmp_path / "runs/tiny/attngan/export/export.json").unlink()
    for marker in (tmp_path / "runs/tiny/attngan/checkpoints").glob("*/commit.json"):
        marker.write_text("{")
    failed = run(str(file))
    assert failed.returncode == 1
    assert "the run failed: " in failed.stderr and "no checkpoint can be used" in failed.stderr


@pytest.mark.whole
def test_more_workers_than_the_machine_has_is_a_sentence(tmp_path: Path) -> None:
    refused = run(str(recipe(tmp_path)), "cluster.gpus_per_worker=1", "cluster.address=auto")
    assert refused.returncode == 2
    assert "and 0 GPU, on 1 machine, which hold 0 of them" in refused.stderr


def images_of(at: Path, stage: str) -> int:
    """Images that a run has told it has seen in a stage."""
    try:
        progress = json.loads((at / "progress.json").read_text())
    except (OSError, ValueError):
        return 0
    return int(progress["images"]) if progress["stage"] == stage else 0


def marked(mark: str) -> dict[int, str]:
    """Process ids, and titles, of the processes that bear `mark` in their environment."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title, env = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:
            continue
        if f"T2IDIST_MARK={mark}".encode() in env:
            found[int(process.name)] = title.decode()
    return found


def train_workers(mark: str) -> list[int]:
    return sorted(process for process, title in marked(mark).items() if title.startswith("ray::RayTrainWorker"))


def train_with_a_kill(folder: Path, *words: str, **top: Any) -> tuple[str, int, dict[str, Any]]:
    """Train the recipe in peace (folder/whole) and on two Ray workers of which one is killed (folder/killed).

    Gives what the second said, the images it had told when it was hurt, and what its second attempt went on from.
    """
    for name in ("whole", "killed"):
        (folder / name).mkdir()
    longer = ["stages.attngan.images=320", "stages.attngan.checkpoint_every_images=320", *words]
    longer += ["checkpoint.memory_every_steps=1"]
    assert run(str(recipe(folder / "whole")), "--local", *longer).returncode == 0
    file = recipe(folder / "killed", cluster={"workers": 2, "cpus_per_worker": 1}, **top)
    mark = f"{os.getpid()}-{time.time_ns()}"
    process = subprocess.Popen(
        command(str(file), *longer),
        cwd=ROOT,
        env={**environment(), "T2IDIST_MARK": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    at = folder / "killed/runs/tiny"
    deadline = time.monotonic() + 200
    while (images := images_of(at, "attngan")) < 80:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(train_workers(mark)[-1], signal.SIGKILL)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err + out
    ours = load_file(at / "attngan/export/generator.safetensors")
    theirs = load_file(folder / "whole/runs/tiny/attngan/export/generator.safetensors")
    for name, value in theirs.items():
        assert float((ours[name].double() - value.double()).norm()) <= 1e-2 * float(value.double().norm()) + 1e-6, name
    (resumed,) = (attempt["resumed"] for attempt in json.loads((at / "attempts.json").read_text())[1:])
    return out, images, resumed["attngan"]


@pytest.mark.whole
def test_a_worker_killed_in_the_middle_is_replaced_and_the_model_is_the_same(tmp_path: Path) -> None:
    out, images, resumed = train_with_a_kill(tmp_path, "report.ledger=true")
    assert "restarts 1" in out
    assert resumed["from"] == "copy in memory" and resumed["images"] >= images - 8
    at = tmp_path / "killed/runs/tiny/attngan"
    lines = [json.loads(line) for line in (at / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == list(range(8, 321, 8))
    assert list(read_ledger(str(at))) == [(step, group) for step in range(40) for group in range(2)]


def interrupted(folder: Path, number: signal.Signals, images: int) -> tuple[int, str]:
    """Send a run of its own Ray cluster a signal once it has seen so many images (0: while its workers start).

    Gives its status, and what it says; nothing that it started is left then.
    """
    mark = f"{os.getpid()}-{time.time_ns()}"
    process = subprocess.Popen(
        command(str(recipe(folder)), "stages.attngan.images=8000", "stages.attngan.checkpoint_every_images=8000"),
        cwd=ROOT,
        env={**environment(), "T2IDIST_MARK": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's background ignores it
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while images_of(folder / "runs/tiny", "attngan") < images or not train_workers(mark):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=60)
    while left := marked(mark):
        assert time.monotonic() < deadline + 60, left
        time.sleep(0.2)
    return process.returncode, said


@pytest.mark.slow
@pytest.mark.parametrize(("number", "images"), [(signal.SIGINT, 80), (signal.SIGINT, 0), (signal.SIGTERM, 0)])
def test_a_signal_ends_the_run_and_all_that_it_started(tmp_path: Path, number: signal.Signals, images: int) -> None:
    status, said = interrupted(tmp_path, number, images)
    assert (status, said) == (128 + number, "interrupted; the same command goes on from the last checkpoint\n")
    assert json.loads((tmp_path / "runs/tiny/outcome.json").read_text())["state"] == "interrupted"


@pytest.mark.slow
def test_sigterm_to_a_run_that_trains_saves_first(tmp_path: Path) -> None:
    status, said = interrupted(tmp_path, signal.SIGTERM, 80)
    found = re.fullmatch(r"ended on request, saved at (\d+) images; the same command goes on\n", said)
    assert status == 143 and found is not None and int(found[1]) >= 80, said
    assert json.loads((tmp_path / "runs/tiny/outcome.json").read_text())["state"] == "stopped"
    done = run(str(recipe(tmp_path)), "--local", f"stages.attngan.images={int(found[1]) + 8}")
    assert done.returncode == 0, done.stderr
    attempts = json.loads((tmp_path / "runs/tiny/attempts.json").read_text())
    assert attempts[-1]["resumed"]["attngan"]["images"] == int(found[1])
