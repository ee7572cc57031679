"""What tools/chaos/chaos.py sees of a run on several hosts, and what it checks afterwards."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t2idist import storage
from t2idist.config import RunConfig
from t2idist.data.order import Order
from t2idist.data.sources import open_dataset
from t2idist.engine.batches import LEDGER, read_ledger
from t2idist.engine.checkpoint import export
from t2idist.engine.checkpoint.format import COMMIT, read_marker, read_part
from t2idist.engine.metrics import read_metrics
from t2idist.engine.noise import key
from tests.helpers.network_hosts import RUNS, progress
from tools.chaos.hosts import Cluster

RUN, STAGE = "chaos", "attngan"
QUIET_STEPS = 4
"""Steps after an injury, and after it has passed, from which on it counts as survived without a restart."""


# ------------------------------------------------------------------------------------------------ what is seen
@dataclass
class Recovery:
    """From an injury (or from a returned host's joining) to the first new step. Moments are seconds of the run.

    step: the latest known then (progress is told every two seconds). lost_steps: steps, by progress and ledger, that
    were done again. pause_seconds: the longest time without a step, where no restart was needed.
    """

    causes: list[str]
    began: float
    step: int
    workers: int
    restarts: int
    ended: float | None = None
    restarted: float | None = None
    resumed_step: int = 0
    first_step: float | None = None
    workers_after: int = 0
    lost_steps: int = 0
    pause_seconds: float = 0.0

    def line(self) -> str:
        head = f"{self.began:7.1f} s  step {self.step:4d}  {' + '.join(self.causes)}: "
        if self.first_step is None:
            return head + (f"no restart, longest pause {self.pause_seconds:.1f} s")
        moments = (("workers ended", self.ended), ("new group", self.restarted), ("first step", self.first_step))
        told = ", ".join(f"{name} +{at - self.began:.1f} s" for name, at in moments if at is not None)
        return head + f"{told}; {self.lost_steps} steps lost, workers {self.workers} -> {self.workers_after}"


@dataclass
class Story:
    """What happened, from the run's progress and from the hosts' processes."""

    cluster: Cluster
    images_per_step: int
    began: float = field(default_factory=time.monotonic)
    recoveries: list[Recovery] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    step: int = 0
    state: str = ""
    stage: str = ""
    workers: int = 0
    restarts: int = -1
    main_began: float | None = None
    main_ended: float | None = None
    _group: set[int] = field(default_factory=set)
    _victims: set[int] = field(default_factory=set)
    _open: Recovery | None = None
    _quiet_from: float = 0.0
    _moved: float = 0.0

    def now(self) -> float:
        return time.monotonic() - self.began

    def injured(self, cause: str, victims: Sequence[int], lasts_seconds: float) -> None:
        self._victims |= set(victims)
        self._quiet_from = max(self._quiet_from, self.now() + lasts_seconds)
        if self._open is None:
            self._begin([])
        assert self._open is not None
        self._open.causes.append(cause)
        print(f"{self.now():7.1f} s  step {self.step:4d}  {cause}", flush=True)

    @property
    def recovering(self) -> bool:
        return self._open is not None

    def look(self) -> None:
        """Take in what can be seen now; call it several times a second."""
        at = self.now()
        self._see_workers(at)
        message = progress(RUN)
        if message is None:
            return
        self.stage, self.state = message["stage"], message["state"]
        for text in message["messages"]:
            if text not in self.warnings:
                self.warnings.append(text)
        if self.stage == STAGE:
            self._see_progress(at, message)

    def _begin(self, causes: list[str]) -> None:
        self._open = Recovery(causes, self.now(), self.step, self.workers, self.restarts)
        self._moved = self._open.began

    def _see_workers(self, at: float) -> None:
        alive = {pid for host in self.cluster.hosts for pid in self.cluster.workers(host)}
        alive |= {pid for pid in self._group if lives(pid)}  # a process that writes its title has none for a moment
        ended = self._group - alive - self._victims
        if ended and self.state != "done":
            if self._open is None:
                self._begin(["a new size"])
            if self._open is not None and self._open.ended is None:
                self._open.ended = at
        self._group = alive

    def _see_progress(self, at: float, message: dict[str, Any]) -> None:
        step = message["images"] // self.images_per_step
        if self.main_began is None:
            self.main_began = at
        if message["restarts"] > self.restarts:
            if self.restarts >= 0:
                self._restarted(at, step)
            self.restarts, self.step, self.workers = message["restarts"], step, message["workers"]
        if step > self.step:
            self._stepped(at, step)
        if self.state == "done" and self.main_ended is None:
            self.main_ended = at

    def _restarted(self, at: float, step: int) -> None:
        if self._open is None:
            self._begin(["a new size"])
        assert self._open is not None
        self._open.restarted, self._open.resumed_step = at, step
        done = max(self.step, self._steps_in_ledger())
        self._open.lost_steps += max(0, done - step)

    def _steps_in_ledger(self) -> int:
        """Steps that some worker has noted: it does so as often as it writes metrics."""
        names = storage.list_dir(storage.join(RUNS, RUN, STAGE, LEDGER))
        return max((int(name[:12]) + 1 for name in names), default=0)

    def _stepped(self, at: float, step: int) -> None:
        self.step = step
        found = self._open
        if found is None:
            return
        found.pause_seconds = max(found.pause_seconds, at - self._moved)
        self._moved = at
        if found.restarted is not None:
            found.first_step, found.workers_after = at, self.workers
        elif found.ended is not None or at < self._quiet_from or step < found.step + QUIET_STEPS:
            return
        self.close()

    def close(self) -> None:
        """What is under way is over: it recovered, or the run ended without a restart for it."""
        if self._open is not None:
            self.recoveries.append(self._open)
            print(self._open.line(), flush=True)
            self._open = None


# ------------------------------------------------------------------------------------------------ the checks
def order_of(config: RunConfig, stage: str) -> tuple[Order, list[str]]:
    """The order of a stage's samples, and their keys."""
    train, scale = open_dataset(config.stage_data(stage)).split("train"), config.stages[stage]
    seed = key(config.stage_seed(stage), stage, "data")
    return Order(seed, train.shard_sizes, scale.groups, scale.group_size), list(train.keys)


def check_ledger(run_url: str, config: RunConfig) -> None:
    """Every step and group took what the order says, and every sample came once an epoch. Raises ValueError."""
    for stage, scale in config.stages.items():
        order, keys = order_of(config, stage)
        taken = read_ledger(storage.join(run_url, stage))
        wanted = [(step, group) for step in range(scale.steps) for group in range(scale.groups)]
        if list(taken) != wanted:
            missing = sorted(set(wanted) - set(taken)) or sorted(set(taken) - set(wanted))
            raise ValueError(f"{stage}: {len(missing)} of {len(wanted)} (step, group) missing or extra: {missing[:3]}")
        for (step, group), ids in taken.items():
            if ids != [keys[i] for i in order.sample_index(step, group)]:
                raise ValueError(f"{stage}: step {step} of group {group} took other samples than the order says")
        stream = [sample for ids in taken.values() for sample in ids]
        for start in range(0, len(stream) - len(keys) + 1, len(keys)):
            if set(Counter(stream[start : start + len(keys)]).values()) != {1}:
                raise ValueError(f"{stage}: a sample came twice in the epoch from place {start} on")


def check_skipped(run_url: str, steps: Sequence[int]) -> None:
    """Of a run that was left in peace: exactly so many steps were skipped. Raises ValueError."""
    skipped = read_metrics(storage.join(run_url, STAGE))[-1]["guard/skipped_steps"]
    if skipped != len(steps):
        raise ValueError(f"the undisturbed run skipped {skipped:g} steps; those with nan are {list(steps)}")


def check_checkpoints(run_url: str, config: RunConfig) -> int:
    """Read every committed checkpoint and check its hashes; gives their number. Raises ValueError."""
    good = 0
    for stage in config.stages:
        folder = storage.join(run_url, stage, "checkpoints")
        for name in storage.list_dir(folder):
            url = storage.join(folder, name)
            if not storage.exists(storage.join(url, COMMIT)):
                continue
            for file, facts in read_marker(url)["files"].items():
                read_part(url, file, facts)
            good += 1
    return good


def largest_difference(ours: str, theirs: str, config: RunConfig) -> tuple[float, str]:
    """Over all tensors of all exports: the largest distance, relative to the tensor's norm, and where it is."""
    largest, where = 0.0, "nowhere"
    for stage in config.stages:
        one, other = (export.read(storage.join(run, stage, "export")).weights for run in (ours, theirs))
        for network, tensors in other.items():
            for name, wanted in tensors.items():
                norm = float(wanted.double().norm())
                apart = float((one[network][name].double() - wanted.double()).norm())
                if apart > largest * max(norm, 1e-12):
                    largest, where = apart / max(norm, 1e-12), f"{stage} {network} {name}"
    return largest, where


def lives(pid: int) -> bool:
    """Whether a process runs, or is stopped: not where it has ended and nobody has asked for its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def median_step_seconds(run_url: str) -> float:
    """Of steps that were done one after the other by one group of workers; nan where there are none."""
    lines = [line for line in read_metrics(storage.join(run_url, STAGE)) if "step" in line]
    spans = [
        (after["seconds"] - before["seconds"]) / (after["step"] - before["step"])
        for before, after in itertools.pairwise(lines)
        if after["restarts"] == before["restarts"] and after["step"] > before["step"]
    ]
    return statistics.median(spans) if spans else float("nan")
