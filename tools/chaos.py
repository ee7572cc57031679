"""A run on several hosts of this machine that are hurt while it trains; then whether it came out the same.

    python tools/chaos.py --schedule "30:kill_host:2 60:stop_worker:1" [--steps 120] [key.path=value ...]
    python tools/chaos.py --random 10 --seed 1 [--json FILE] [--keep FOLDER]

Each host is a network namespace with a Ray node (root and iproute2 needed); the run folder lies in an object store. A
schedule is a list of WHEN:KIND[:HOST]: WHEN is a step ("30"), or seconds after the injury before ("+8s"). Kinds:

  kill_worker, stop_worker   SIGKILL, SIGSTOP of the host's training worker
  kill_raylet, kill_host     SIGKILL of the host's Ray node, of all its processes (with its link down)
  partition                  the host's link is down for a while; its processes run on
  store_errors               the store answers 503 to everybody for a while
  disk_full                  the host's TMPDIR is full for a while
  return_host                a host that is down comes back now

A host that is lost comes back after --return-seconds at the latest. Printed: for each recovery when it was injured,
when workers ended, when the new group trained, its first new step, and steps lost; goodput (steps kept x median step
time / wall time). Checked: the run ends by itself, its ledger is whole, its checkpoints are whole, and its exports
equal those of the same recipe left in peace on one worker (in float64: float32 strays by 0.1 of a norm within 60 steps
on three workers that nobody disturbs). Exit status 1 where a check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from t2idist import storage
from t2idist.config import RunConfig
from t2idist.strict import from_dict, parse_yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the several-host cluster lies among the tests

from tests.fault_proxy import Proxy  # noqa: E402
from tests.hosts import RUNS, TEMPORARY_MIB, Cluster, Missing, cluster  # noqa: E402
from tools.chaos_story import (  # noqa: E402
    RUN,
    STAGE,
    Recovery,
    Story,
    check_checkpoints,
    check_ledger,
    largest_difference,
    median_step_seconds,
)

KINDS = ("kill_worker", "kill_raylet", "kill_host", "stop_worker", "partition", "store_errors", "disk_full")
RETURN = "return_host"
AIMED = ("kill_worker", "stop_worker", "disk_full")
"""Kinds that need a worker on the host."""
PASSING_SECONDS = {"partition": 25.0, "store_errors": 10.0, "disk_full": 15.0}
GROW_SECONDS = 60.0
"""How long after a host's return a restart counts as caused by it."""
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}
POLL_SECONDS = 0.2
IMAGES_PER_STEP = 24


# ------------------------------------------------------------------------------------------------ the schedule
@dataclass
class Injury:
    """step: at which it happens, or after: seconds after the one before. host: which, or None for any with a worker."""

    kind: str
    step: int | None
    after: float
    host: int | None = None


def parse_schedule(text: str, hosts: int) -> list[Injury]:
    """Raises ValueError that names the word."""
    found = []
    for word in text.split():
        parts = re.fullmatch(r"(?:(\d+)|\+([\d.]+)s):([a-z_]+)(?::(\d+))?", word)
        if parts is None:
            raise ValueError(
                f"--schedule: {word!r}; expected WHEN:KIND[:HOST], such as 30:kill_host:2 or +8s:partition"
            )
        step, after, kind, host = parts.groups()
        if kind not in (*KINDS, RETURN):
            raise ValueError(f"--schedule: {word!r}: kind '{kind}'; allowed are {', '.join((*KINDS, RETURN))}")
        if host is not None and not 1 <= int(host) <= hosts:
            raise ValueError(f"--schedule: {word!r}: host {host}; there are hosts 1 to {hosts}")
        found.append(Injury(kind, int(step) if step else None, float(after or 0), int(host) if host else None))
    return found


def random_schedule(count: int, seed: int, first_step: int, gap_steps: int) -> list[Injury]:
    """`count` injuries of mixed kinds, each kind as often; one in five follows within seconds of the one before."""
    draws = random.Random(seed)
    kinds = [kind for _ in range(-(-count // len(KINDS))) for kind in draws.sample(KINDS, len(KINDS))][:count]
    found, step = [], first_step
    for number, kind in enumerate(kinds):
        if number and draws.random() < 0.2:
            found.append(Injury(kind, None, draws.uniform(0.5, 20.0)))
            continue
        found.append(Injury(kind, step, 0.0))
        step += draws.randint(gap_steps // 2, gap_steps)
    return found


# ------------------------------------------------------------------------------------------------ what is done
class Tormentor:
    """Does the schedule's injuries, ends those that pass, and brings lost hosts back."""

    def __init__(self, hosts: Cluster, proxy: Proxy, story: Story, seed: int, return_seconds: float) -> None:
        self.cluster, self.proxy, self.story = hosts, proxy, story
        self.return_seconds = return_seconds
        self._draws = random.Random(f"{seed} hosts")
        self._to_end: list[tuple[float, Any]] = []
        self._down_since: dict[int, float] = {}
        self._cut: set[int] = set()

    def tend(self) -> None:
        """End what has passed, and bring back hosts that have been down for long enough."""
        now = self.story.now()
        for moment, end in [entry for entry in self._to_end if entry[0] <= now]:
            self._to_end.remove((moment, end))
            end()
        for host in self.cluster.hosts:
            if host in self._cut or self.cluster.running(host):
                self._down_since.pop(host, None)
            elif now - self._down_since.setdefault(host, now) >= self.return_seconds:
                self._bring_back(host)

    def _bring_back(self, host: int) -> None:
        self.story.injured(f"host {host} comes back", (), GROW_SECONDS)
        self.cluster.start_host(host)
        del self._down_since[host]

    def end_all(self) -> None:
        for _, end in self._to_end:
            end()
        self._to_end.clear()

    def ready(self, injury: Injury) -> bool:
        """Whether there is somebody to do it to: the aimed ones need a worker, and one host is always left."""
        if injury.kind == RETURN:
            return injury.host in self._down_since
        return injury.kind == "store_errors" or self._host(injury, draw=False) is not None

    def _host(self, injury: Injury, draw: bool = True) -> int | None:
        up = [host for host in self.cluster.hosts if host not in self._cut and self.cluster.running(host)]
        fit = up if len(up) > 1 else []
        if injury.kind in AIMED:
            fit = [host for host in up if self.cluster.workers(host)]
        if injury.host is not None:
            return injury.host if injury.host in fit else None
        return self._draws.choice(fit) if fit and draw else (fit or [None])[0]

    def do(self, injury: Injury) -> None:
        lasts = PASSING_SECONDS.get(injury.kind, 0.0)
        if injury.kind == RETURN:
            assert injury.host is not None
            self._bring_back(injury.host)
            return
        if injury.kind == "store_errors":
            self.proxy.plan = lambda number, method, target: "busy"
            self._later(lasts, self._store_well)
            self.story.injured("store_errors", (), lasts)
            return
        host = self._host(injury)
        assert host is not None
        victims = self.cluster.workers(host)
        if injury.kind == "kill_worker":
            self.cluster.kill_worker(host)
        elif injury.kind == "stop_worker":
            self.cluster.stop_worker(host)
        elif injury.kind == "kill_raylet":
            self.cluster.kill_raylet(host)
        elif injury.kind == "kill_host":
            self.cluster.kill_host(host)
        elif injury.kind == "partition":
            self._cut.add(host)
            self.cluster.partition(host)
            self._later(lasts, lambda: self._heal(host))
        elif injury.kind == "disk_full":
            victims = []
            self._later(lasts, self._fill(host))
        self.story.injured(f"{injury.kind} on host {host}", victims, lasts)

    def _later(self, seconds: float, end: Any) -> None:
        self._to_end.append((self.story.now() + seconds, end))

    def _store_well(self) -> None:
        self.proxy.plan = lambda number, method, target: None

    def _heal(self, host: int) -> None:
        self.cluster.heal(host)
        self._cut.discard(host)

    def _fill(self, host: int) -> Any:
        filler = self.cluster.temporary_seen_from_here(host) / "filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            for _ in range(TEMPORARY_MIB << 4):
                file.write(bytes(1 << 16))

        def empty() -> None:
            with contextlib.suppress(OSError):  # the host may be gone, and its disk with it
                filler.unlink()

        return empty


def torment(
    driver: subprocess.Popen[bytes], schedule: list[Injury], story: Story, by: Tormentor, limit: float
) -> list[str]:
    """Until the driver ends, or for `limit` seconds: watch, injure as scheduled; gives what went wrong."""
    left, last = list(schedule), 0.0
    while driver.poll() is None:
        time.sleep(POLL_SECONDS)
        story.look()
        by.tend()
        if story.now() > limit:
            return [f"the run did not end within {limit:g} s: {last_words(story.cluster)}"]
        if not left or story.stage != STAGE or story.state != "training":
            continue
        first = left[0]
        due = story.now() >= last + first.after if first.step is None else story.step >= first.step
        if first.step is not None and story.recovering:
            continue  # a step's injuries meet a run that trains; seconds' injuries meet it as it is
        if due and by.ready(first):
            by.do(left.pop(0))
            last = story.now()
    story.look()
    story.close()
    by.end_all()
    faults = [f"the run ended before {len(left)} of the injuries; give more --steps"] if left else []
    if driver.returncode != 0:
        faults.insert(0, f"the driver ended with status {driver.returncode}: {last_words(story.cluster)}")
    return faults


def last_words(hosts: Cluster) -> str:
    lines = [line for line in hosts.log.read_text().splitlines() if "PlacementGroupCleaner" not in line]
    return "\n".join(lines[-20:])


# ------------------------------------------------------------------------------------------------ the recipe
def recipe(folder: Path, steps: int, seed: int, failures: int) -> Path:
    """DAMSM and AttnGAN on the emoji that ship: six groups, so that one to three workers share them."""
    scale = {"groups": 6, "group_size": 4, "max_groups_per_worker": 6}
    images = IMAGES_PER_STEP * steps
    damsm = {"embedding_dim": 64, "word_dim": 32, "trunk": "small", "trunk_width": 8, "image_size": 32}
    tree = {"generator_width": 16, "discriminator_width": 16, "base_size": 16, "branches": 2, "residuals": 1}
    tree |= {"z_dim": 32, "condition_dim": 16, "ema_half_life_images": 500}
    tree |= {"generator_lr": 5e-5, "discriminator_lr": 5e-5}  # at 2e-4 rounding grows a million times in 240 steps
    rare = {"pictures_every_images": images}
    values = {
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
    faults += [f"checkpoints: {text}" for text in story.warnings if "passed over" in text]
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
    file = recipe(folder, steps, seed, failures=10 + 10 * len(schedule))
    reference = undisturbed(file, folder / "reference", words)
    with cluster(hosts, keep=folder / "hosts") as (made, proxy):
        driver = made.submit([str(file), *words])
        story = Story(made, images_per_step=IMAGES_PER_STEP)
        by = Tormentor(made, proxy, story, seed, return_seconds)
        faults = torment(driver, schedule, story, by, limit_seconds)
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
        steps = words.steps or max([injury.step or 0 for injury in schedule], default=20) + 40
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
