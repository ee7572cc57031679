"""Write, start and examine small whole runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from t2idist.config import RunConfig, load
from t2idist.engine.checkpoint import export
from t2idist.engine.metrics import MetricLogger
from t2idist.training.stages import with_absolute_paths
from tests.helpers import small_systems
from tools.chaos.hosts import rank_of

ROOT = Path(__file__).parents[2]


def write_recipe(folder: Path, system: str = "attngan", **top: Any) -> Path:
    """Write the recipe of a run of a few seconds: a DAMSM and a GAN on the embedded emoji.

    Args:
        top: top-level config keys that replace the ones here.
    """
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


def load_config(folder: Path, *settings: str) -> RunConfig:
    """Write the recipe and load it with `settings`, its paths made absolute as the command does."""
    return with_absolute_paths(load(str(write_recipe(folder)), settings))


def command_line(*arguments: str) -> list[str]:
    """Return the command that runs a recipe in another process."""
    return [sys.executable, "-m", "t2idist.run", *arguments]


def command_environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run_command(*arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command_line(*arguments),
        cwd=ROOT,
        env=command_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def export_bytes(folder: Path, stage: str) -> dict[str, bytes]:
    """Return the weight files of a stage's export by name."""
    return {f.name: f.read_bytes() for f in sorted((folder / "runs/tiny" / stage / "export").glob("*.safetensors"))}


def check_finished(folder: Path, system: str = "attngan") -> None:
    """Check the exports, metrics, images and report page of a finished run."""
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


def copy_run(finished: Path, folder: Path) -> Path:
    """Copy the finished run into another folder and return the recipe there."""
    shutil.copytree(finished / "runs", folder / "runs")
    return write_recipe(folder)


def copy_without_last_stage(finished: Path, folder: Path) -> Path:
    """Copy the finished run without its last stage and return the recipe there."""
    file = copy_run(finished, folder)
    shutil.rmtree(folder / "runs/tiny/attngan")
    return file


def images_in_progress(at: Path, stage: str) -> int:
    """Return the images seen in a stage according to the run's progress.json (0: none or another stage)."""
    try:
        progress = json.loads((at / "progress.json").read_text())
    except (OSError, ValueError):
        return 0
    return int(progress["images"]) if progress["stage"] == stage else 0


def processes_with_mark(mark: str) -> dict[int, str]:
    """Return process ids and titles of the processes with T2IDIST_MARK=`mark` in their environment."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title, env = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:
            continue
        if f"T2IDIST_MARK={mark}".encode() in env:
            found[int(process.name)] = title.decode()
    return found


def worker_pids(mark: str) -> list[int]:
    """Return the process ids of all workers: that start, that train, and spare ones."""
    return [pid for pid, title in processes_with_mark(mark).items() if title.startswith("ray::PooledWorker")]


def pids_by_rank(mark: str) -> dict[int, int]:
    """Return the process ids of the workers that train, by rank."""
    ranks = {rank_of(pid): pid for pid in worker_pids(mark)}
    return {rank: ranks[rank] for rank in sorted(rank for rank in ranks if rank is not None)}


def train_worker_pids(mark: str) -> list[int]:
    return list(pids_by_rank(mark).values())


def train_with_killed_worker(folder: Path, *settings: str, **top: Any) -> tuple[str, int, dict[str, Any]]:
    """Train undisturbed (folder/whole) and on two Ray workers of which one is killed; compare the weights.

    Returns:
        Output of the second run, images in its progress.json when the worker was killed, and the checkpoint that its
        second attempt resumed from.
    """
    for name in ("whole", "killed"):
        (folder / name).mkdir()
    longer = ["stages.attngan.images=320", "stages.attngan.checkpoint_every_images=320", *settings]
    longer += ["checkpoint.memory_every_steps=1"]
    assert run_command(str(write_recipe(folder / "whole")), "--local", *longer).returncode == 0
    file = write_recipe(folder / "killed", cluster={"workers": 2, "cpus_per_worker": 1}, **top)
    mark = f"{os.getpid()}-{time.time_ns()}"
    process = subprocess.Popen(
        command_line(str(file), *longer),
        cwd=ROOT,
        env={**command_environment(), "T2IDIST_MARK": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    at = folder / "killed/runs/tiny"
    deadline = time.monotonic() + 200
    while (images := images_in_progress(at, "attngan")) < 80:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    survivor, killed = train_worker_pids(mark)
    os.kill(killed, signal.SIGKILL)
    while len(pids := set(train_worker_pids(mark)) - {killed}) != 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    assert (survivor in pids) is (top.get("strategy") != "deepspeed"), "the survivor serves the new group"
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err + out
    ours = load_file(at / "attngan/export/generator.safetensors")
    theirs = load_file(folder / "whole/runs/tiny/attngan/export/generator.safetensors")
    for name, value in theirs.items():
        assert float((ours[name].double() - value.double()).norm()) <= 1e-2 * float(value.double().norm()) + 1e-6, name
    (resumed,) = (attempt["resumed"] for attempt in json.loads((at / "attempts.json").read_text())[1:])
    return out, images, resumed["attngan"]


def progress_message(folder: Path, **more: Any) -> dict[str, Any]:
    """A progress message as MetricLogger sends it."""
    sent: list[dict[str, Any]] = []
    facts: dict[str, Any] = {
        "run": "x",
        "stage": "gan",
        "stage_index": 0,
        "stages": 1,
        "restarts": 2,
        "workers": 3,
        "messages": [],
    }
    facts["recovery"] = {"cause": "worker lost", "seconds": {"end": 0.5, "start": 2.0}, "images_repeated": 16}
    facts["checkpoint"] = {"images": 8, "time": "2026-11-22T05:00:00+00:00", "stall_seconds": 0.25}
    log = MetricLogger(str(folder), "gan", images=0, step=0, budget_images=80, metadata=facts, on_progress=sent.append)
    log.log_step(16)
    others = {"data/wait_share": 0.25, "data/bad_samples": 1.0, "data/quarantined": 4.0, "guard/skipped_steps": 5.0}
    others |= {"time/step": 2.0, "time/data": 0.5, "time/pictures": 0.25, "time/checkpoint": 0.25}
    log.log_metrics({"generator/adversarial_64": 1.5}, others | more, 2)
    log.log_state("training")
    log.close()
    return sent[-1]


def received_events(program: Path) -> list[dict[str, Any]]:
    """Return the events that the program of fixture `hook_program` received."""
    return [json.loads(line) for line in (program.parent / "events").read_text().splitlines()]
