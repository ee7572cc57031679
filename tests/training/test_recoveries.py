"""Workers are killed when recovery is hardest, one injury after the other, in one run of four workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from t2idist.engine.batches import read_ledger
from tests.helpers import small_systems
from tests.helpers.runs import (
    ROOT,
    command_environment,
    command_line,
    images_in_progress,
    pids_by_rank,
    run_command,
    write_recipe,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
WORKERS, STEPS, IMAGES_PER_STEP, LIMIT_SECONDS = 4, 1000, 16, 1200.0
# at the published rates rounding errors grow by a factor of a million in 240 steps
SLOW = {"generator_lr": 1e-5, "discriminator_lr": 1e-5}


@dataclass
class Injury:
    """What was done to the run, and what became of it."""

    killed: list[int]
    survivors: set[int]
    after: set[int]
    """Processes that trained after the recovery."""
    attempts: int
    recoveries: list[dict[str, Any]]
    """Their records in attempts.json."""


class _Run:
    """A run on four workers of a Ray cluster of its own."""

    def __init__(self, folder: Path) -> None:
        self.at = folder / "runs/tiny"
        self._mark = f"{os.getpid()}-{time.time_ns()}"
        self._log = (folder / "log").open("w")
        self.process = subprocess.Popen(
            command_line(str(recipe(folder, {"workers": WORKERS, "cpus_per_worker": 1, "spares": 1}))), cwd=ROOT,
            env={**command_environment(), "T2IDIST_MARK": self._mark}, stdout=self._log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._deadline = time.monotonic() + LIMIT_SECONDS

    def wait(self, condition: Callable[[], Any], seconds: float = 0.05) -> None:
        while not condition():
            assert self.process.poll() is None and time.monotonic() < self._deadline, Path(self._log.name).read_text()
            time.sleep(seconds)

    def pids(self) -> dict[int, int]:
        return pids_by_rank(self._mark)

    def kill(self, *ranks: int) -> list[int]:
        self.wait(lambda: len(self.pids()) == WORKERS)
        pids = [self.pids()[rank] for rank in ranks]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return pids

    def read_attempts(self) -> list[dict[str, Any]]:
        return list(json.loads((self.at / "attempts.json").read_text()))

    def attempts(self) -> int:
        return len(self.read_attempts())

    def has_recovered(self, attempts: int) -> bool:
        """Return whether there were more attempts than these, and the last one has done a step."""
        later = self.read_attempts()[attempts:]
        return bool(later) and "restore" in later[-1].get("recovery", {"seconds": {"restore"}})["seconds"]

    def steps(self) -> int:
        return images_in_progress(self.at, "attngan") // IMAGES_PER_STEP

    def injure(self, kill: Callable[[_Run], list[int]]) -> Injury:
        """Wait for some steps, kill workers, and wait until the run has done new steps."""
        done = self.steps()
        self.wait(lambda: self.steps() > done + 5)
        before, attempts = self.pids(), self.attempts()
        killed = kill(self)
        done = self.steps()
        self.wait(lambda: self.has_recovered(attempts) and self.steps() > done + 5 and len(self.pids()) == WORKERS)
        new = self.read_attempts()[attempts:]
        recoveries = [attempt["recovery"] for attempt in new if "recovery" in attempt]
        survivors = set(before.values()) - set(killed)
        return Injury(killed, survivors, set(self.pids().values()), len(new), recoveries)


def recipe(folder: Path, cluster: dict[str, Any]) -> Path:
    file = write_recipe(folder, precision="float64", report={"ledger": True}, cluster=cluster)
    scale = {"groups": WORKERS, "group_size": 4, "pictures_every_images": 10**6, "checkpoint_every_images": 160}
    values = yaml.safe_load(file.read_text())
    values["stages"]["damsm"] |= {**scale, "images": 64}
    values["stages"]["attngan"] |= {**scale, "images": STEPS * IMAGES_PER_STEP}
    values["stages"]["attngan"]["model"] = {**small_systems.MODELS["attngan"], **SLOW}
    values["checkpoint"] = {"memory_every_steps": 1}
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def kill_during_a_save(run: _Run) -> list[int]:
    folder = run.at / "attngan/checkpoints"
    run.wait(lambda: any(not (each / "commit.json").exists() for each in folder.iterdir()), 0.0)
    return run.kill(1)


def kill_during_a_recovery(run: _Run) -> list[int]:
    attempts, killed = run.attempts(), run.kill(2)
    run.wait(lambda: run.attempts() > attempts)
    return killed + run.kill(0)


INJURIES: dict[str, Callable[[_Run], list[int]]] = {
    "in the middle": lambda run: run.kill(2),
    "two at once": lambda run: run.kill(1, 3),
    "the first": lambda run: run.kill(0),
    "during a save": kill_during_a_save,
    "during a recovery": kill_during_a_recovery,
}


@pytest.fixture(scope="module")
def injured() -> Iterator[tuple[Path, Path, dict[str, Injury], bool]]:
    """Folders of the undisturbed and the injured run; the injuries; whether there was no report yet at the last one."""
    with tempfile.TemporaryDirectory(prefix="r") as temporary:
        folders = [Path(temporary) / name for name in ("whole", "injured")]
        for folder in folders:
            folder.mkdir()
        run = _Run(folders[1])
        try:
            run.wait(lambda: run.steps() > 3)
            injuries = {name: run.injure(kill) for name, kill in INJURIES.items()}
            run.wait((run.at / "attngan/export/export.json").exists, 0.0)
            page = run.at / "report.html"
            page.unlink(missing_ok=True)  # written every minute, and now by the first worker
            run.kill(0)
            was_absent = not page.exists()
            assert run.process.wait(120) == 0
        finally:
            run.process.kill()
            run.process.wait()
        done = run_command(str(recipe(folders[0], {"workers": 1})), "--local", timeout=LIMIT_SECONDS)
        assert done.returncode == 0, done.stderr
        yield folders[0], folders[1], injuries, was_absent


@pytest.mark.parametrize("name", INJURIES)
def test_survivors_serve_the_next_group(injured: tuple[Any, ...], name: str) -> None:
    injury = injured[2][name]
    assert not set(injury.killed) & injury.after
    for record in injury.recoveries:
        assert record["cause"] == "worker lost" and record["images_repeated"] >= 0
        assert name == "during a recovery" or set(record["seconds"]) == {"end", "start", "restore"}
    if name == "during a recovery":  # a worker that waits for the first one to open the group is replaced too
        assert injury.attempts >= 2
        return
    assert injury.attempts == 1
    # not all of them on a busy machine: one whose training does not end within 3 s is replaced
    assert injury.survivors & injury.after, "all survivors were replaced"


def test_the_report_is_whole_although_its_writer_was_killed(injured: tuple[Any, ...]) -> None:
    _, folder, _, was_absent = injured
    assert was_absent, "the report was there before its writer was killed"
    assert (folder / "runs/tiny/report.html").read_text().rstrip().endswith("</html>")


def test_no_sample_is_lost_or_repeated_and_the_weights_are_the_same(injured: tuple[Any, ...]) -> None:
    whole, folder, *_ = injured
    at = folder / "runs/tiny/attngan"
    assert list(read_ledger(str(at))) == [(step, group) for step in range(STEPS) for group in range(WORKERS)]
    ours = load_file(at / "export/generator.safetensors")
    theirs = load_file(whole / "runs/tiny/attngan/export/generator.safetensors")
    for name, value in theirs.items():
        distance = float((ours[name].double() - value.double()).norm())
        assert distance <= 1e-9 * float(value.double().norm()) + 1e-15, name
