"""Faults that tools/chaos/chaos.py injects into a run on several hosts: schedules, and the injector."""

from __future__ import annotations

import contextlib
import random
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.helpers.fault_proxy import FaultProxy
from tools.chaos.history import STAGE, RunHistory
from tools.chaos.hosts import HEAD, TEMPORARY_MIB, Cluster

COMMON = (
    "kill_worker", "kill_raylet", "kill_host", "stop_worker", "partition", "drain_host", "nan", "store_errors",
    "disk_full",
)  # fmt: skip
KINDS = (*COMMON, "kill_driver", "kill_head")
RETURN = "return_host"
NEEDS_WORKER = ("kill_worker", "stop_worker", "disk_full")
"""Kinds that need a host with a worker."""
CLUSTER_WIDE = ("store_errors", "nan", "kill_driver", "kill_head")
"""Kinds that do not target one host."""
DURATION_SECONDS = {"partition": 25.0, "store_errors": 10.0, "disk_full": 15.0}
DRAIN_SECONDS = 20
"""From a cloud's notice to the shutdown of the host."""
SUBMIT_SECONDS = 5.0
"""From the end of the driver to the next submission of the run."""
REBUILD_SECONDS = 10.0
"""From the loss of the head to the start of a new cluster."""
GROW_SECONDS = 60.0
"""A restart this long after a host's return counts as caused by it."""
POLL_SECONDS = 0.2


# ------------------------------------------------------------------------------------------------ the schedule
@dataclass
class Fault:
    """One fault of a schedule."""

    kind: str
    step: int | None
    """step at which it happens; None if it happens `after` the previous fault"""
    after: float
    """seconds after the previous fault"""
    host: int | None = None
    """target; None is any host with a worker"""


def parse_schedule(text: str, hosts: int) -> list[Fault]:
    """Parse WHEN:KIND[:HOST] entries; raises ValueError that names the entry."""
    schedule = []
    for entry in text.split():
        parts = re.fullmatch(r"(?:(\d+)|\+([\d.]+)s):([a-z_]+)(?::(\d+))?", entry)
        if parts is None:
            raise ValueError(
                f"--schedule: {entry!r}; expected WHEN:KIND[:HOST], such as 30:kill_host:2 or +8s:partition"
            )
        step, after, kind, host = parts.groups()
        if kind not in (*KINDS, RETURN):
            raise ValueError(f"--schedule: {entry!r}: kind '{kind}'; allowed are {', '.join((*KINDS, RETURN))}")
        if host is not None and not 1 <= int(host) <= hosts:
            raise ValueError(f"--schedule: {entry!r}: host {host}; there are hosts 1 to {hosts}")
        if kind == "nan" and step is None:
            raise ValueError(f"--schedule: {entry!r}: nan needs a step, such as 60:nan")
        schedule.append(Fault(kind, int(step) if step else None, float(after or 0), int(host) if host else None))
    return schedule


def random_schedule(count: int, seed: int, first_step: int, gap_steps: int, gap_seconds: float = 0.0) -> list[Fault]:
    """Draw `count` faults of mixed kinds.

    Of twenty, one is kill_head, two are kill_driver, and the others are equally frequent; the first eleven have every
    kind once.

    Args:
        gap_steps: Most steps between two faults; one in five follows within seconds of the previous one.
        gap_seconds: If not 0, every fault but nan follows this long after the previous one, about every `gap_steps`.
    """
    generator = random.Random(seed)
    kinds: list[str] = []
    while len(kinds) < count:
        kinds += generator.sample(KINDS, len(KINDS))
        kinds += generator.sample([*generator.sample(COMMON, len(COMMON) - 1), "kill_driver"], len(COMMON))
    schedule: list[Fault] = []
    step = first_step
    for number, kind in enumerate(kinds[:count]):
        if gap_seconds:
            at = first_step + gap_steps * number if kind == "nan" else None
            schedule.append(Fault(kind, at, 0.0 if kind == "nan" else gap_seconds))
            continue
        if number and generator.random() < 0.2 and kind != "nan":
            schedule.append(Fault(kind, None, generator.uniform(0.5, 20.0)))
            continue
        schedule.append(Fault(kind, step, 0.0))
        step += generator.randint(gap_steps // 2, gap_steps)
    return schedule


def nan_steps(schedule: list[Fault]) -> list[int]:
    return [fault.step for fault in schedule if fault.kind == "nan" and fault.step is not None]


# ------------------------------------------------------------------------------------------------ the injector
class FaultInjector:
    """Runs the driver, injects faults, ends temporary ones, and restores lost hosts, driver and head.

    Args:
        arguments: the run's command line, submitted again if the driver is lost.
        return_seconds: how long a lost host stays down.
    """

    def __init__(
        self,
        hosts: Cluster,
        arguments: list[str],
        proxy: FaultProxy,
        history: RunHistory,
        seed: int,
        return_seconds: float,
    ) -> None:
        self.cluster, self.arguments, self.proxy, self.history = hosts, arguments, proxy, history
        self.return_seconds = return_seconds
        self.driver = hosts.submit(arguments)
        self._resubmitting = self._head_lost = False
        self._joining: subprocess.Popen[bytes] | None = None
        self._random = random.Random(f"{seed} hosts")
        self._to_end: list[tuple[float, Callable[[], None]]] = []
        self._down_since: dict[int, float] = {}
        self._partitioned: set[int] = set()
        self._draining: set[int] = set()

    # ------------------------------------------------------------ regular updates
    @property
    def running(self) -> bool:
        """Whether there is a driver, or will be one again."""
        return self._resubmitting or self.driver.poll() is None

    def update(self) -> None:
        """End faults whose time is over, and start hosts that have been down for `return_seconds`."""
        now = self.history.now()
        for moment, end in [entry for entry in self._to_end if entry[0] <= now]:
            self._to_end.remove((moment, end))
            end()
        self._check_joined()
        for host in () if self._head_lost else self.cluster.hosts:
            if host in self._partitioned or self.cluster.running(host):
                self._down_since.pop(host, None)
            elif now - self._down_since.setdefault(host, now) >= self.return_seconds:
                self._start_again(host)

    def _check_joined(self) -> None:
        """Submit again when all hosts have joined the new head."""
        if self._joining is None or self._joining.poll() is None:
            return
        if self._joining.returncode == 0:
            self._joining, self._head_lost = None, False
            self._submit()
        elif not self.cluster.running(HEAD):
            raise RuntimeError(f"the new head did not start: {(self.cluster.folder / 'host0.log').read_text()[-500:]}")
        else:
            self._joining = self.cluster.watch_for_hosts(len(self.cluster.hosts))

    def _submit(self) -> None:
        self.driver, self._resubmitting = self.cluster.submit(self.arguments), False
        print(f"{self.history.now():7.1f} s  step {self.history.step:4d}  submitted again", flush=True)

    def _start_again(self, host: int) -> None:
        self.history.record_fault(f"host {host} comes back", (), GROW_SECONDS)
        self.cluster.start_host(host)
        del self._down_since[host]

    def end_all(self) -> None:
        pending, self._to_end = self._to_end, []
        for _, end in pending:
            end()

    def _later(self, seconds: float, end: Callable[[], None]) -> None:
        self._to_end.append((self.history.now() + seconds, end))

    # ------------------------------------------------------------ injection
    def can_inject(self, fault: Fault) -> bool:
        """Return whether the fault has a target: some kinds need a worker, and one host always stays up."""
        if self._head_lost or (fault.kind in ("kill_driver", "kill_head") and self._resubmitting):
            return False
        if fault.kind == RETURN:
            return fault.host in self._down_since
        return fault.kind in CLUSTER_WIDE or self._host(fault, draw=False) is not None

    def _host(self, fault: Fault, draw: bool = True) -> int | None:
        unavailable = self._partitioned | self._draining
        up = [host for host in self.cluster.hosts if host not in unavailable and self.cluster.running(host)]
        targets = up if len(up) > 1 else []
        if fault.kind in NEEDS_WORKER:
            targets = [host for host in up if self.cluster.workers(host)]
        if fault.host is not None:
            return fault.host if fault.host in targets else None
        if not targets:
            return None
        return self._random.choice(targets) if draw else targets[0]

    def inject(self, fault: Fault) -> None:
        if fault.kind == RETURN:
            assert fault.host is not None
            self._start_again(fault.host)
        elif fault.kind in CLUSTER_WIDE:
            self._inject_everywhere(fault.kind)
        else:
            host = self._host(fault)
            assert host is not None
            self._inject_on(fault.kind, host)

    def _inject_everywhere(self, kind: str) -> None:
        if kind == "store_errors":
            self.proxy.plan = lambda number, method, target: "busy"
            self._later(DURATION_SECONDS[kind], self._restore_store)
        elif kind == "kill_driver":
            self.driver.kill()
            self._resubmitting = True
            self._later(SUBMIT_SECONDS, self._submit)
        elif kind == "kill_head":
            self._resubmitting = self._head_lost = True
            self.cluster.kill_host(HEAD)
            self._later(REBUILD_SECONDS, self._rebuild)
        self.history.record_fault(kind, (), DURATION_SECONDS.get(kind, 0.0))  # nan is in the recipe

    def _inject_on(self, kind: str, host: int) -> None:
        victims, seconds = self.cluster.workers(host), DURATION_SECONDS.get(kind, 0.0)
        if kind == "kill_worker":
            self.cluster.kill_worker(host)
        elif kind == "stop_worker":
            self.cluster.stop_worker(host)
        elif kind == "kill_raylet":
            self.cluster.kill_raylet(host)
        elif kind == "kill_host":
            self.cluster.kill_host(host)
        elif kind == "partition":
            self._partitioned.add(host)
            self.cluster.partition(host)
            self._later(seconds, lambda: self._heal(host))
        elif kind == "drain_host":
            victims, seconds = [], 2.0 * DRAIN_SECONDS
            self._draining.add(host)
            notice = self.cluster.drain(host, DRAIN_SECONDS)
            self._later(0.0, lambda: self._after_notice(host, notice))
        elif kind == "disk_full":
            victims = []
            self._later(seconds, self._fill(host))
        self.history.record_fault(f"{kind} on host {host}", victims, seconds)

    # ------------------------------------------------------------ consequences
    def _restore_store(self) -> None:
        self.proxy.plan = lambda number, method, target: None

    def _heal(self, host: int) -> None:
        self.cluster.heal(host)
        self._partitioned.discard(host)

    def _after_notice(self, host: int, notice: subprocess.Popen[bytes]) -> None:
        """Shut the host down DRAIN_SECONDS after Ray has been notified."""
        if notice.poll() is None:
            self._later(0.0, lambda: self._after_notice(host, notice))
        elif notice.returncode == 0:
            self._later(DRAIN_SECONDS, lambda: self._shut_down(host))
        elif self._head_lost or not self.cluster.running(host):  # it was lost before Ray could be notified
            self._draining.discard(host)
        else:
            raise RuntimeError(f"t2idist drain ended with status {notice.returncode}")

    def _shut_down(self, host: int) -> None:
        if host in self._draining and self.cluster.running(host):
            victims = self.cluster.workers(host)
            self.cluster.kill_host(host)
            self.history.record_fault(f"host {host} shuts down", victims, 0.0)
        self._draining.discard(host)

    def _rebuild(self) -> None:
        """Start a new head and new hosts at the same addresses; only the store survives."""
        self._draining.clear()
        self._down_since.clear()
        # hosts before the head: Ray starts no head at an address that a node still tries to reach
        for host in self.cluster.hosts:
            self.cluster.kill_host(host)
        self.cluster.start_head()
        for host in self.cluster.hosts:
            self.cluster.start_host(host)
        self._joining = self.cluster.watch_for_hosts(len(self.cluster.hosts))

    def _fill(self, host: int) -> Callable[[], None]:
        filler = self.cluster.temporary_from_outside(host) / "filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            for _ in range(TEMPORARY_MIB << 4):
                file.write(bytes(1 << 16))

        def empty() -> None:
            with contextlib.suppress(OSError):  # the host may be lost, and its disk with it
                filler.unlink()

        return empty


def inject_faults(schedule: list[Fault], history: RunHistory, injector: FaultInjector, limit: float) -> list[str]:
    """Inject the scheduled faults until the last driver ends, at most `limit` seconds; returns what failed.

    They are injected in the order of the schedule, except for nan: it is in the recipe, and needs no other fault.
    """
    pending, last = [fault for fault in schedule if fault.kind != "nan"], 0.0
    nan = sorted(nan_steps(schedule))
    while injector.running:
        time.sleep(POLL_SECONDS)
        history.poll()
        injector.update()
        if history.now() > limit:
            return [f"the run did not end within {limit:g} s: {log_tail(history.cluster)}"]
        if nan and history.stage == STAGE and history.step >= nan[0]:
            injector.inject(Fault("nan", nan.pop(0), 0.0))
        if not pending or history.stage != STAGE or history.state != "training":
            continue
        first = pending[0]
        due = history.now() >= last + first.after if first.step is None else history.step >= first.step
        if first.step is not None and history.recovering:
            continue  # a fault at a step waits until the run trains; a fault after some seconds does not
        if due and injector.can_inject(first):
            injector.inject(pending.pop(0))
            last = history.now()
    history.poll()
    history.close()
    injector.end_all()
    pending += [Fault("nan", step, 0.0) for step in nan]
    failures = [f"the run ended before {len(pending)} of the faults; use more --steps"] if pending else []
    if injector.driver.returncode != 0:
        failures.insert(0, f"the driver ended with status {injector.driver.returncode}: {log_tail(history.cluster)}")
    return failures


def log_tail(hosts: Cluster) -> str:
    return "\n".join(hosts.log.read_text().splitlines()[-20:])
