"""Inject faults into a run on several hosts of this machine, and compare the result with an undisturbed run.

    python tools/chaos/chaos.py --schedule "30:kill_host:2 60:stop_worker:1" [--steps 120] [key.path=value ...]
    python tools/chaos/chaos.py --random 10 --seed 1 [--gap-seconds 30] [--json FILE] [--keep FOLDER]

Each host is a network namespace with a Ray node (needs root and iproute2); the run folder is in an object store. A
schedule is a list of WHEN:KIND[:HOST]: WHEN is a step ("30"), or seconds after the previous fault ("+8s"). Kinds:

  kill_worker, stop_worker   SIGKILL, SIGSTOP of the host's training worker
  kill_raylet, kill_host     SIGKILL of the host's Ray node, of all its processes (with its link down)
  partition                  the host's link is down for a while; its processes keep running
  drain_host                 Ray is notified that the host shuts down in 20 s; then it does
  kill_driver                SIGKILL of the run's driver; some seconds later the run is submitted again
  kill_head                  the head and with it the Ray cluster are lost, started again, and the run submitted again
  nan                        the loss of one group is NaN in this step (also in the undisturbed run: both skip it)
  store_errors               the store responds 503 to every request for a while
  disk_full                  the host's TMPDIR is full for a while
  return_host                a host that is down comes back now

A lost host comes back after --return-seconds at the latest. Printed for each recovery: when the fault was injected,
when workers ended, when the new group trained, its first new step, and lost steps; then the goodput (steps kept x
median step time / wall time) and the median for each kind of fault that came alone and for each cause in attempts.json.
Checked: the run ends by itself (its last driver with status 0); its ledger and its checkpoints are complete; its
exports equal those of an undisturbed run of the same recipe on one worker. Both runs are in float64: in float32, even
undisturbed runs on three workers differ by 0.1 of a norm after 60 steps. Exit status 1 if a check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from t2idist import config as configuration
from t2idist import storage
from t2idist.config import RunConfig
from t2idist.config.strict import from_dict, parse_yaml
from t2idist.observability.command import command
from t2idist.training.attempts import ATTEMPTS

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the cluster of several hosts is a test helper

from tests.helpers.network_hosts import RUNS, cluster
from tools.chaos.faults import Fault, FaultInjector, inject_faults, nan_steps, parse_schedule, random_schedule
from tools.chaos.history import (
    RUN,
    STAGE,
    Recovery,
    RunHistory,
    check_checkpoints,
    check_ledger,
    check_skipped,
    largest_difference,
    median_step_seconds,
    order_of,
)
from tools.chaos.hosts import Unsupported

TOLERANCE = {"float64": 1e-9, "float32": 1e-4}
IMAGES_PER_STEP = 24


# ------------------------------------------------------------------------------------------------ the recipe
def recipe(folder: Path, arguments: Sequence[str], steps: int, seed: int, failures: int, nan: list[int]) -> Path:
    """Write the recipe: DAMSM and AttnGAN on the shipped emoji, in six groups for one to three workers.

    Args:
        nan: steps in which the loss of one group is NaN.
    """
    scale = {"groups": 6, "group_size": 4, "max_groups_per_worker": 6}
    images = IMAGES_PER_STEP * steps
    damsm = {"embedding_dim": 64, "word_dim": 32, "trunk": "small", "trunk_width": 8, "image_size": 32}
    tree: dict[str, Any] = {
        "generator_width": 16,
        "discriminator_width": 16,
        "base_size": 16,
        "branches": 2,
        "residuals": 1,
    }
    tree |= {"z_dim": 32, "condition_dim": 16, "ema_half_life_images": 500}
    # at 2e-4 rounding errors grow by a factor of a million in 240 steps
    tree |= {"generator_lr": 5e-5, "discriminator_lr": 5e-5}
    rare: dict[str, Any] = {"pictures_every_images": images}
    values: dict[str, Any] = {
        "name": RUN,
        "storage": RUNS,
        "precision": "float64",
        "seed": seed,
        "data": {"source": "emoji", "max_words": 10, "size": 32, "threads": 1},
        "cluster": {"workers": [1, 3], "cpus_per_worker": 1, "max_failures": failures, "grow_after_seconds": 15},
        "report": {"ledger": True},
        "stages": {
            "damsm": {"system": "damsm", **scale, "images": IMAGES_PER_STEP * 6, "checkpoint_every_images": 240, **rare,
                      "model": damsm},
            STAGE: {"system": "attngan", **scale, "images": images, "checkpoint_every_images": 240, **rare,
                    "uses": {"damsm": "damsm"}, "model": tree},
        },
    }  # fmt: skip
    file = folder / f"{RUN}.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    if nan:
        order, keys = order_of(configuration.load(str(file), arguments), STAGE)
        poison = {"nan_steps": nan, "nan_samples": [keys[order.sample_indices(step, step % 6)[0]] for step in nan]}
        values["stages"][STAGE] |= {"system": "tests.helpers.nan_system", "model": tree | poison}
        file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def reference_run(file: Path, folder: Path, arguments: Sequence[str]) -> str:
    """Run the same recipe undisturbed on one worker in one process; returns its run folder."""
    line = [sys.executable, "-m", "t2idist.run", str(file), *arguments, f"storage={folder}", "--local"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run with other settings
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the undisturbed run failed: {done.stderr[-2000:]}")
    return str(folder / RUN)


# ------------------------------------------------------------------------------------------------ the result
@dataclass
class Result:
    """Result of the run."""

    failures: list[str]
    """failed checks, a sentence each"""
    recoveries: list[Recovery]
    goodput: float
    median_step_seconds: float
    wall_seconds: float
    steps: int
    restarts: int
    checkpoints_read: int
    largest_difference: float
    largest_at: str
    warnings: list[str]
    attempts: list[dict[str, Any]]
    """contents of attempts.json"""


def check_run(history: RunHistory, failures: list[str], reference: str) -> Result:
    """Check the run against the reference; failed checks are added to `failures`."""
    run_url = storage.join(RUNS, RUN)
    text = storage.read_bytes(storage.join(run_url, "config.yaml")).decode()
    config = from_dict(RunConfig, parse_yaml(text, "config.yaml"))
    checkpoints, distance, where = 0, float("inf"), "no export"
    with _collect(failures, "ledger"):
        check_ledger(run_url, config)
    with _collect(failures, "checkpoints"):
        checkpoints = check_checkpoints(run_url, config)
    with _collect(failures, "exports"):
        distance, where = largest_difference(run_url, reference, config)
        tolerance = TOLERANCE[config.precision]
        if distance > tolerance:
            raise ValueError(
                f"{where} differs from the undisturbed run by {distance:.2g} of its norm, above {tolerance:g}"
            )
    bad = [text for text in history.warnings if "not used: " in text and "was never completed" not in text]
    failures += [f"checkpoints: {text}" for text in bad]  # a save cut short by the death of its workers is no failure
    step_seconds = median_step_seconds(run_url)
    wall = (history.main_ended or history.now()) - (history.main_began or 0.0)
    steps = config.stages[STAGE].steps
    return Result(
        failures,
        history.recoveries,
        steps * step_seconds / wall,
        step_seconds,
        wall,
        steps,
        history.restarts,
        checkpoints,
        distance,
        where,
        history.warnings,
        storage.read_json(storage.join(run_url, ATTEMPTS)),
    )


@contextlib.contextmanager
def _collect(failures: list[str], what: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, KeyError) as error:
        failures.append(f"{what}: {error}")


def medians(recoveries: Sequence[Recovery]) -> list[str]:
    """Return a line for each kind of fault that came alone: seconds to the first new step, steps lost."""
    kinds: dict[str, list[Recovery]] = {}
    for recovery in recoveries:
        if len(recovery.causes) == 1 and recovery.first_step is not None:
            kinds.setdefault(re.sub(r" on host \d+| \d+", "", recovery.causes[0]), []).append(recovery)
    lines = []
    for kind, them in kinds.items():
        seconds = [each.first_step - each.began for each in them if each.first_step is not None]
        lines.append(
            f"{kind}: {len(them)} times, first new step after {_median_and_range(seconds)}, "
            f"at most {max(each.lost_steps for each in them)} steps lost"
        )
    return lines


def _median_and_range(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.1f} s (median; {min(seconds):.1f} to {max(seconds):.1f})"


def recorded_recoveries(attempts: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each cause in attempts.json: seconds up to the first step of the new group."""
    causes: dict[str, list[float]] = {}
    for attempt in attempts:
        recovery = attempt.get("recovery", {"seconds": {}})
        if "restore" in recovery["seconds"]:
            causes.setdefault(recovery["cause"], []).append(sum(recovery["seconds"].values()))
    return [
        f"attempts.json: {cause}: {len(seconds)} times, {_median_and_range(seconds)}"
        for cause, seconds in causes.items()
    ]


def print_result(result: Result) -> None:
    for text in (*result.warnings, *medians(result.recoveries), *recorded_recoveries(result.attempts)):
        print(text)
    print(
        f"{result.steps} steps of {result.median_step_seconds:.3f} s in {result.wall_seconds:.1f} s: "
        f"goodput {result.goodput:.1%}; {result.restarts} restarts; {result.checkpoints_read} complete checkpoints; "
        f"largest difference {result.largest_difference:.2g} of its norm ({result.largest_at})"
    )
    for failure in result.failures:
        print(f"FAILED {failure}")
    print("all checks passed" if not result.failures else f"{len(result.failures)} checks failed", flush=True)


# ------------------------------------------------------------------------------------------------ the program
def run(
    arguments: Sequence[str],
    schedule: list[Fault],
    *,
    folder: Path,
    steps: int,
    seed: int = 0,
    hosts: int = 3,
    return_seconds: float = 15.0,
    limit_seconds: float = 3600.0,
) -> Result:
    """Do the undisturbed run, then the one with faults on a cluster of `hosts`; `folder` takes logs and reference."""
    nan = nan_steps(schedule)
    file = recipe(folder, arguments, steps, seed, 10 + 10 * len(schedule), nan)
    reference = reference_run(file, folder / "reference", arguments)
    check_skipped(reference, nan)
    with cluster(hosts, keep=folder / "hosts") as (several, proxy):
        history = RunHistory(several, images_per_step=IMAGES_PER_STEP)
        injector = FaultInjector(several, [str(file), *arguments], proxy, history, seed, return_seconds)
        failures = inject_faults(schedule, history, injector, limit_seconds)
        result = check_run(history, failures, reference)
        print_result(result)
    return result


@command("error")
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key.path=value", help="overrides of the tool's recipe")
    parser.add_argument("--schedule", default="", help="WHEN:KIND[:HOST] entries")
    parser.add_argument("--random", type=int, default=0, metavar="COUNT", help="number of random faults")
    parser.add_argument("--seed", type=int, default=0, help="of the random schedule, of drawn hosts and of the run")
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of the GAN (default: enough for the schedule)")
    parser.add_argument("--gap-steps", type=int, default=24, help="most steps between two random faults")
    parser.add_argument(
        "--gap-seconds", type=float, default=0.0, help="time between two random faults (default: counted in steps)"
    )
    parser.add_argument("--return-seconds", type=float, default=15.0, help="how long a lost host stays down")
    parser.add_argument("--limit-seconds", type=float, default=7200.0, help="a run that takes longer fails")
    parser.add_argument("--keep", type=Path, help="folder for the reference run and the hosts' logs")
    parser.add_argument("--json", type=Path, help="file for all figures")
    arguments = parser.parse_intermixed_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the hosts are removed
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="t2idist-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        schedule = parse_schedule(arguments.schedule, arguments.hosts)
        if arguments.random:
            schedule += random_schedule(
                arguments.random, arguments.seed, 12, arguments.gap_steps, arguments.gap_seconds
            )
        # training continues while a fault waits for its target, so that later faults come later than scheduled
        steps = arguments.steps or max([fault.step or 0 for fault in schedule], default=20) + 40 + 15 * len(schedule)
        result = run(
            arguments.settings, schedule, folder=folder.resolve(), steps=steps, seed=arguments.seed,
            hosts=arguments.hosts, return_seconds=arguments.return_seconds, limit_seconds=arguments.limit_seconds,
        )  # fmt: skip
    except (ValueError, Unsupported) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"FAILED {error}", file=sys.stderr)
        return 1
    finally:
        if arguments.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    if arguments.json is not None:
        figures = asdict(result)
        arguments.json.write_text(json.dumps({"faults": figures.pop("failures"), **figures}, indent=1) + "\n")
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
