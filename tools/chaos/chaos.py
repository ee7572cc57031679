"""A run on several hosts of this machine that are hurt while it trains; then whether it came out the same.

    python tools/chaos/chaos.py --schedule "30:kill_host:2 60:stop_worker:1" [--steps 120] [key.path=value ...]
    python tools/chaos/chaos.py --random 10 --seed 1 [--json FILE] [--keep FOLDER]

Each host is a network namespace with a Ray node (root and iproute2 needed); the run folder lies in an object store. A
schedule is a list of WHEN:KIND[:HOST]: WHEN is a step ("30"), or seconds after the injury before ("+8s"). Kinds:

  kill_worker, stop_worker   SIGKILL, SIGSTOP of the host's training worker
  kill_raylet, kill_host     SIGKILL of the host's Ray node, of all its processes (with its link down)
  partition                  the host's link is down for a while; its processes run on
  drain_host                 Ray is told that the host goes in 20 s, and then it goes
  kill_driver                SIGKILL of the run's driver; some seconds later it is submitted again
  kill_head                  the head is lost, and the Ray cluster with it; both are built again and the run submitted
  nan                        the step's loss is not a number in one group (of the undisturbed run too: all skip it)
  store_errors               the store answers 503 to everybody for a while
  disk_full                  the host's TMPDIR is full for a while
  return_host                a host that is down comes back now

A host that is lost comes back after --return-seconds at the latest. Printed: for each recovery when it was injured,
when workers ended, when the new group trained, its first new step, and steps lost; goodput (steps kept x median step
time / wall time). Checked: the run ends by itself (its last driver with 0), its ledger is whole, its checkpoints are
whole, and its exports equal those of the same recipe left in peace on one worker (in float64: float32 strays by 0.1 of
a norm within 60 steps on three workers that nobody disturbs). Exit status 1 where a check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
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

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the several-host cluster lies among the tests

from tests.helpers.network_hosts import RUNS, cluster
from tools.chaos.hosts import Missing
from tools.chaos.injuries import Injury, Tormentor, nan_steps, parse_schedule, random_schedule, torment
from tools.chaos.story import (
    RUN,
    STAGE,
    Recovery,
    Story,
    check_checkpoints,
    check_ledger,
    check_skipped,
    largest_difference,
    median_step_seconds,
    order_of,
)

TOLERANCE = {"float64": 1e-9, "float32": 1e-4}
IMAGES_PER_STEP = 24


# ------------------------------------------------------------------------------------------------ the recipe
def recipe(folder: Path, words: Sequence[str], steps: int, seed: int, failures: int, nan: list[int]) -> Path:
    """DAMSM and AttnGAN on the emoji that ship: six groups, so that one to three workers share them.

    nan: steps in which the loss of one group is not a number.
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
    tree |= {"generator_lr": 5e-5, "discriminator_lr": 5e-5}  # at 2e-4 rounding grows a million times in 240 steps
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
        order, keys = order_of(configuration.load(str(file), words), STAGE)
        poison = {"nan_steps": nan, "nan_samples": [keys[order.sample_index(step, step % 6)[0]] for step in nan]}
        values["stages"][STAGE] |= {"system": "tests.helpers.nan_system", "model": tree | poison}
        file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def undisturbed(file: Path, folder: Path, words: Sequence[str]) -> str:
    """The same recipe on one worker in one process; gives its run folder."""
    line = [sys.executable, "-m", "t2idist.run", str(file), *words, f"storage={folder}", "--local"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the undisturbed run failed: {done.stderr[-2000:]}")
    return str(folder / RUN)


# ------------------------------------------------------------------------------------------------ the verdict
@dataclass
class Verdict:
    """What came of the run. faults: checks that failed, a sentence each."""

    faults: list[str]
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


def judge(story: Story, faults: list[str], reference: str) -> Verdict:
    """faults: what is known already."""
    run_url = storage.join(RUNS, RUN)
    text = storage.read_bytes(storage.join(run_url, "config.yaml")).decode()
    config = from_dict(RunConfig, parse_yaml(text, "config.yaml"))
    good, apart, where = 0, float("inf"), "no export"
    with _noted(faults, "ledger"):
        check_ledger(run_url, config)
    with _noted(faults, "checkpoints"):
        good = check_checkpoints(run_url, config)
    with _noted(faults, "exports"):
        apart, where = largest_difference(run_url, reference, config)
        tolerance = TOLERANCE[config.precision]
        if apart > tolerance:
            raise ValueError(f"{where} is {apart:.2g} of its norm away from the undisturbed run's, above {tolerance:g}")
    bad = [text for text in story.warnings if "passed over" in text and "was never completed" not in text]
    faults += [f"checkpoints: {text}" for text in bad]  # one that was being written when its workers died is none
    each = median_step_seconds(run_url)
    wall = (story.main_ended or story.now()) - (story.main_began or 0.0)
    steps = config.stages[STAGE].steps
    return Verdict(
        faults,
        story.recoveries,
        steps * each / wall,
        each,
        wall,
        steps,
        story.restarts,
        good,
        apart,
        where,
        story.warnings,
    )


@contextlib.contextmanager
def _noted(faults: list[str], what: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, KeyError) as error:
        faults.append(f"{what}: {error}")


def tell(verdict: Verdict, story: Story) -> None:
    for text in verdict.warnings:
        print(text)
    print(
        f"{verdict.steps} steps of {verdict.median_step_seconds:.3f} s in {verdict.wall_seconds:.1f} s: "
        f"goodput {verdict.goodput:.1%}; {verdict.restarts} restarts; {verdict.checkpoints_read} checkpoints whole; "
        f"largest difference {verdict.largest_difference:.2g} of its norm ({verdict.largest_at})"
    )
    for fault in verdict.faults:
        print(f"FAULT {fault}")
    print("all checks passed" if not verdict.faults else f"{len(verdict.faults)} checks failed", flush=True)


# ------------------------------------------------------------------------------------------------ the program
def run(
    words: Sequence[str],
    schedule: list[Injury],
    *,
    folder: Path,
    steps: int,
    seed: int = 0,
    hosts: int = 3,
    return_seconds: float = 15.0,
    limit_seconds: float = 3600.0,
) -> Verdict:
    """The undisturbed run, then the injured one on a cluster of `hosts`; logs and the reference stay in `folder`."""
    nan = nan_steps(schedule)
    file = recipe(folder, words, steps, seed, 10 + 10 * len(schedule), nan)
    reference = undisturbed(file, folder / "reference", words)
    check_skipped(reference, nan)
    with cluster(hosts, keep=folder / "hosts") as (made, proxy):
        story = Story(made, images_per_step=IMAGES_PER_STEP)
        by = Tormentor(made, [str(file), *words], proxy, story, seed, return_seconds)
        faults = torment(schedule, story, by, limit_seconds)
        verdict = judge(story, faults, reference)
        tell(verdict, story)
    return verdict


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key.path=value", help="over the tool's recipe")
    parser.add_argument("--schedule", default="", help="WHEN:KIND[:HOST] words")
    parser.add_argument("--random", type=int, default=0, metavar="COUNT", help="so many injuries of mixed kinds")
    parser.add_argument("--seed", type=int, default=0, help="of the random schedule, of drawn hosts and of the run")
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of the GAN (default: enough for the schedule)")
    parser.add_argument("--gap-steps", type=int, default=24, help="most steps between two random injuries")
    parser.add_argument("--return-seconds", type=float, default=15.0, help="how long a lost host stays away")
    parser.add_argument("--limit-seconds", type=float, default=7200.0, help="a run that takes longer has failed")
    parser.add_argument("--keep", type=Path, help="folder for the reference run and the hosts' logs")
    parser.add_argument("--json", type=Path, help="file for all figures")
    words = parser.parse_intermixed_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the hosts are taken down
    folder = words.keep or Path(tempfile.mkdtemp(prefix="t2idist-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        schedule = parse_schedule(words.schedule, words.hosts)
        schedule += random_schedule(words.random, words.seed, 12, words.gap_steps) if words.random else []
        # training goes on while an injury waits for its moment, so that those after it come later than scheduled
        steps = words.steps or max([injury.step or 0 for injury in schedule], default=20) + 40 + 15 * len(schedule)
        verdict = run(
            words.settings, schedule, folder=folder.resolve(), steps=steps, seed=words.seed, hosts=words.hosts,
            return_seconds=words.return_seconds, limit_seconds=words.limit_seconds,
        )  # fmt: skip
    except (ValueError, Missing) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"FAULT {error}", file=sys.stderr)
        return 1
    finally:
        if words.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    if words.json is not None:
        words.json.write_text(json.dumps(asdict(verdict), indent=1) + "\n")
    return 1 if verdict.faults else 0


if __name__ == "__main__":
    sys.exit(main())
