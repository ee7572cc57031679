"""Observation of a run by tools/chaos/chaos.py, and the checks afterwards."""

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
from t2idist.engine.noise import derive_seed
from tests.helpers.network_hosts import RUNS, progress
from tools.chaos.hosts import Cluster

RUN, STAGE = "chaos", "attngan"
QUIET_STEPS = 4
"""After this many steps, and after the fault is over, the run counts as not restarted by it."""
RESTART_SECONDS = 15.0
"""A worker that was hit counts as lost without a restart only after this time."""


# ------------------------------------------------------------------------------------------------ observation
@dataclass
class Recovery:
    """From a fault (or the return of a host) to the first new step. Times are seconds since the start of the run."""

    causes: list[str]
    began: float
    step: int
    """the latest step known at `began`; progress is reported every two seconds"""
    workers: int
    restarts: int
    ended: float | None = None
    """when workers ended"""
    restarted: float | None = None
    """when the new group trained"""
    resumed_step: int = 0
    first_step: float | None = None
    """when the first new step was done"""
    workers_after: int = 0
    lost_steps: int = 0
    """steps that were repeated, according to progress and ledger"""
    pause_seconds: float = 0.0
    """longest time without a step, if no restart was needed"""

    def line(self) -> str:
        head = f"{self.began:7.1f} s  step {self.step:4d}  {' + '.join(self.causes)}: "
        if self.first_step is None:
            return head + (f"no restart, longest pause {self.pause_seconds:.1f} s")
        times = (("workers ended", self.ended), ("new group", self.restarted), ("first step", self.first_step))
        events = ", ".join(f"{name} +{at - self.began:.1f} s" for name, at in times if at is not None)
        return head + f"{events}; {self.lost_steps} steps lost, workers {self.workers} -> {self.workers_after}"


@dataclass
class RunHistory:
    """Events of a run, from its progress messages and the processes of the hosts."""

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

    def record_fault(self, cause: str, victims: Sequence[int], duration_seconds: float) -> None:
        self._victims |= set(victims)
        quiet_after = max(duration_seconds, RESTART_SECONDS if victims else 0.0)
        self._quiet_from = max(self._quiet_from, self.now() + quiet_after)
        if self._open is None:
            self._begin([])
        assert self._open is not None
        self._open.causes.append(cause)
        print(f"{self.now():7.1f} s  step {self.step:4d}  {cause}", flush=True)

    @property
    def recovering(self) -> bool:
        return self._open is not None

    def poll(self) -> None:
        """Record the present state; call this several times per second."""
        at = self.now()
        self._poll_workers(at)
        message = progress(RUN)
        if message is None:
            return
        self.stage, self.state = message["stage"], message["state"]
        for text in message["messages"]:
            if text not in self.warnings:
                self.warnings.append(text)
        if self.stage == STAGE:
            self._read_progress(at, message)

    def _begin(self, causes: list[str]) -> None:
        self._open = Recovery(causes, self.now(), self.step, self.workers, self.restarts)
        self._moved = self._open.began

    def _poll_workers(self, at: float) -> None:
        alive = {pid for host in self.cluster.hosts for pid in self.cluster.workers(host)}
        # a worker is missing above for a moment while it changes the title of its process
        alive |= {pid for pid in self._group if is_running(pid)}
        ended = self._group - alive - self._victims
        if ended and self.state != "done":
            if self._open is None:
                self._begin(["a resize"])
            if self._open is not None and self._open.ended is None:
                self._open.ended = at
        self._group = alive

    def _read_progress(self, at: float, message: dict[str, Any]) -> None:
        step = message["images"] // self.images_per_step
        if self.main_began is None:
            self.main_began = at
        if message["restarts"] > self.restarts:
            if self.restarts >= 0:
                self._record_restart(at, step)
            self.restarts, self.step, self.workers = message["restarts"], step, message["workers"]
        if step > self.step:
            self._record_step(at, step)
        if self.state == "done" and self.main_ended is None:
            self.main_ended = at

    def _record_restart(self, at: float, step: int) -> None:
        if self._open is None:
            self._begin(["a resize"])
        assert self._open is not None
        self._open.restarted, self._open.resumed_step = at, step
        completed = max(self.step, self._steps_in_ledger())
        self._open.lost_steps += max(0, completed - step)

    def _steps_in_ledger(self) -> int:
        """Return the number of steps in the ledger, which workers write as often as metrics."""
        names = storage.list_dir(storage.join(RUNS, RUN, STAGE, LEDGER))
        return max((int(name[:12]) + 1 for name in names), default=0)

    def _record_step(self, at: float, step: int) -> None:
        self.step = step
        recovery = self._open
        if recovery is None:
            return
        recovery.pause_seconds = max(recovery.pause_seconds, at - self._moved)
        self._moved = at
        if recovery.restarted is not None:
            recovery.first_step, recovery.workers_after = at, self.workers
        elif recovery.ended is not None or at < self._quiet_from or step < recovery.step + QUIET_STEPS:
            return
        self.close()

    def close(self) -> None:
        """Close the open recovery: the run recovered, or ended without a restart."""
        if self._open is not None:
            self.recoveries.append(self._open)
            print(self._open.line(), flush=True)
            self._open = None


# ------------------------------------------------------------------------------------------------ the checks
def order_of(config: RunConfig, stage: str) -> tuple[Order, list[str]]:
    """Return the order of a stage's samples, and the sample keys."""
    train, scale = open_dataset(config.stage_data(stage)).split("train"), config.stages[stage]
    seed = derive_seed(config.stage_seed(stage), stage, "data")
    return Order(seed, train.shard_sizes, scale.groups, scale.group_size), list(train.keys)


def check_ledger(run_url: str, config: RunConfig) -> None:
    """Check that every step and group used the samples of the order, each once per epoch; raises ValueError."""
    for stage, scale in config.stages.items():
        order, keys = order_of(config, stage)
        taken = read_ledger(storage.join(run_url, stage))
        expected = [(step, group) for step in range(scale.steps) for group in range(scale.groups)]
        if list(taken) != expected:
            missing = sorted(set(expected) - set(taken)) or sorted(set(taken) - set(expected))
            raise ValueError(
                f"{stage}: {len(missing)} of {len(expected)} (step, group) missing or extra: {missing[:3]}"
            )
        for (step, group), ids in taken.items():
            if ids != [keys[i] for i in order.sample_indices(step, group)]:
                raise ValueError(f"{stage}: step {step} of group {group} used other samples than the order says")
        stream = [sample for ids in taken.values() for sample in ids]
        for start in range(0, len(stream) - len(keys) + 1, len(keys)):
            if set(Counter(stream[start : start + len(keys)]).values()) != {1}:
                raise ValueError(f"{stage}: a sample is repeated in the epoch that starts at position {start}")


def check_skipped(run_url: str, steps: Sequence[int]) -> None:
    """Check that the reference run skipped exactly the steps with a NaN loss; raises ValueError."""
    skipped = read_metrics(storage.join(run_url, STAGE))[-1]["guard/skipped_steps"]
    if skipped != len(steps):
        raise ValueError(f"the reference run skipped {skipped:g} steps; the steps with a NaN loss are {list(steps)}")


def check_checkpoints(run_url: str, config: RunConfig) -> int:
    """Check the hashes of every committed checkpoint; returns their number, raises ValueError."""
    count = 0
    for stage in config.stages:
        folder = storage.join(run_url, stage, "checkpoints")
        for name in storage.list_dir(folder):
            url = storage.join(folder, name)
            if not storage.exists(storage.join(url, COMMIT)):
                continue
            for file, facts in read_marker(url)["files"].items():
                read_part(url, file, facts)
            count += 1
    return count


def largest_difference(ours: str, theirs: str, config: RunConfig) -> tuple[float, str]:
    """Return the largest distance of two exports' tensors, relative to the tensor's norm, and its position."""
    largest, where = 0.0, "nowhere"
    for stage in config.stages:
        one, other = (export.read(storage.join(run, stage, "export")).weights for run in (ours, theirs))
        for network, tensors in other.items():
            for name, expected in tensors.items():
                norm = float(expected.double().norm())
                distance = float((one[network][name].double() - expected.double()).norm())
                if distance > largest * max(norm, 1e-12):
                    largest, where = distance / max(norm, 1e-12), f"{stage} {network} {name}"
    return largest, where


def is_running(pid: int) -> bool:
    """Return whether a process runs or is stopped; a zombie does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def median_step_seconds(run_url: str) -> float:
    """Return the median over consecutive steps of one worker group; nan if there are none."""
    lines = [line for line in read_metrics(storage.join(run_url, STAGE)) if "step" in line]
    spans = [
        (after["seconds"] - before["seconds"]) / (after["step"] - before["step"])
        for before, after in itertools.pairwise(lines)
        if after["restarts"] == before["restarts"] and after["step"] > before["step"]
    ]
    return statistics.median(spans) if spans else float("nan")
