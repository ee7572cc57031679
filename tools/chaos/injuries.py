"""What tools/chaos/chaos.py does to a run on several hosts: schedules of injuries, and who does them."""

from __future__ import annotations

import contextlib
import random
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.helpers.fault_proxy import Proxy
from tools.chaos.hosts import HEAD, TEMPORARY_MIB, Cluster
from tools.chaos.story import STAGE, Story

COMMON = (
    "kill_worker", "kill_raylet", "kill_host", "stop_worker", "partition", "drain_host", "nan", "store_errors",
    "disk_full",
)  # fmt: skip
KINDS = (*COMMON, "kill_driver", "kill_head")
RETURN = "return_host"
AIMED = ("kill_worker", "stop_worker", "disk_full")
"""Kinds that need a worker on the host."""
PLACELESS = ("store_errors", "nan", "kill_driver", "kill_head")
"""Kinds that befall no one host."""
PASSING_SECONDS = {"partition": 25.0, "store_errors": 10.0, "disk_full": 15.0}
DRAIN_SECONDS = 20
"""From a cloud's notice to the host's end."""
SUBMIT_SECONDS = 5.0
"""How long after its driver's end the run is submitted again."""
REBUILD_SECONDS = 10.0
"""How long after its head's end the cluster is built again."""
GROW_SECONDS = 60.0
"""How long after a host's return a restart counts as caused by it."""
POLL_SECONDS = 0.2


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
        if kind == "nan" and step is None:
            raise ValueError(f"--schedule: {word!r}: nan befalls a step, such as 60:nan")
        found.append(Injury(kind, int(step) if step else None, float(after or 0), int(host) if host else None))
    return found


def random_schedule(count: int, seed: int, first_step: int, gap_steps: int) -> list[Injury]:
    """`count` injuries of mixed kinds; one in five follows within seconds of the one before.

    Of twenty, one is kill_head and two are kill_driver, the others come equally often; of the first eleven each kind is
    one.
    """
    draws = random.Random(seed)
    kinds: list[str] = []
    while len(kinds) < count:
        kinds += draws.sample(KINDS, len(KINDS))
        kinds += draws.sample([*draws.sample(COMMON, len(COMMON) - 1), "kill_driver"], len(COMMON))
    found, step = [], first_step
    for number, kind in enumerate(kinds[:count]):
        if number and draws.random() < 0.2 and kind != "nan":
            found.append(Injury(kind, None, draws.uniform(0.5, 20.0)))
            continue
        found.append(Injury(kind, step, 0.0))
        step += draws.randint(gap_steps // 2, gap_steps)
    return found


def nan_steps(schedule: list[Injury]) -> list[int]:
    return [injury.step for injury in schedule if injury.kind == "nan" and injury.step is not None]


# ------------------------------------------------------------------------------------------------ what is done
class Tormentor:
    """Runs the driver, does the schedule's injuries, ends those that pass, and brings back what was lost.

    words: the run's command line; the same is submitted again where its driver is lost.
    """

    def __init__(
        self, hosts: Cluster, words: list[str], proxy: Proxy, story: Story, seed: int, return_seconds: float
    ) -> None:
        self.cluster, self.words, self.proxy, self.story = hosts, words, proxy, story
        self.return_seconds = return_seconds
        self.driver = hosts.submit(words)
        self._submits = self._headless = False
        self._asking: subprocess.Popen[bytes] | None = None
        self._draws = random.Random(f"{seed} hosts")
        self._to_end: list[tuple[float, Callable[[], None]]] = []
        self._down_since: dict[int, float] = {}
        self._cut: set[int] = set()
        self._leaving: set[int] = set()

    # ------------------------------------------------------------ in the course of time
    @property
    def running(self) -> bool:
        """Whether there is a driver, or will be again."""
        return self._submits or self.driver.poll() is None

    def tend(self) -> None:
        """End what has passed, and bring back hosts that have been down for long enough."""
        now = self.story.now()
        for moment, end in [entry for entry in self._to_end if entry[0] <= now]:
            self._to_end.remove((moment, end))
            end()
        self._tend_asking()
        for host in () if self._headless else self.cluster.hosts:
            if host in self._cut or self.cluster.running(host):
                self._down_since.pop(host, None)
            elif now - self._down_since.setdefault(host, now) >= self.return_seconds:
                self._bring_back(host)

    def _tend_asking(self) -> None:
        """Submit again when all hosts have joined the new head."""
        if self._asking is None or self._asking.poll() is None:
            return
        if self._asking.returncode == 0:
            self._asking, self._headless = None, False
            self._submit()
        elif not self.cluster.running(HEAD):
            raise RuntimeError(f"the new head did not start: {(self.cluster.folder / 'host0.log').read_text()[-500:]}")
        else:
            self._asking = self.cluster.ask_for_hosts(len(self.cluster.hosts))

    def _submit(self) -> None:
        self.driver, self._submits = self.cluster.submit(self.words), False
        print(f"{self.story.now():7.1f} s  step {self.story.step:4d}  submitted again", flush=True)

    def _bring_back(self, host: int) -> None:
        self.story.injured(f"host {host} comes back", (), GROW_SECONDS)
        self.cluster.start_host(host)
        del self._down_since[host]

    def end_all(self) -> None:
        pending, self._to_end = self._to_end, []
        for _, end in pending:
            end()

    def _later(self, seconds: float, end: Callable[[], None]) -> None:
        self._to_end.append((self.story.now() + seconds, end))

    # ------------------------------------------------------------ what is done
    def ready(self, injury: Injury) -> bool:
        """Whether there is somebody to do it to: the aimed ones need a worker, and one host is always left."""
        if self._headless or (injury.kind in ("kill_driver", "kill_head") and self._submits):
            return False
        if injury.kind == RETURN:
            return injury.host in self._down_since
        return injury.kind in PLACELESS or self._host(injury, draw=False) is not None

    def _host(self, injury: Injury, draw: bool = True) -> int | None:
        apart = self._cut | self._leaving
        up = [host for host in self.cluster.hosts if host not in apart and self.cluster.running(host)]
        fit = up if len(up) > 1 else []
        if injury.kind in AIMED:
            fit = [host for host in up if self.cluster.workers(host)]
        if injury.host is not None:
            return injury.host if injury.host in fit else None
        if not fit:
            return None
        return self._draws.choice(fit) if draw else fit[0]

    def do(self, injury: Injury) -> None:
        if injury.kind == RETURN:
            assert injury.host is not None
            self._bring_back(injury.host)
        elif injury.kind in PLACELESS:
            self._befall(injury.kind)
        else:
            host = self._host(injury)
            assert host is not None
            self._hurt(injury.kind, host)

    def _befall(self, kind: str) -> None:
        """All hosts at once."""
        if kind == "store_errors":
            self.proxy.plan = lambda number, method, target: "busy"
            self._later(PASSING_SECONDS[kind], self._store_well)
        elif kind == "kill_driver":
            self.driver.kill()
            self._submits = True
            self._later(SUBMIT_SECONDS, self._submit)
        elif kind == "kill_head":
            self._submits = self._headless = True
            self.cluster.kill_host(HEAD)
            self._later(REBUILD_SECONDS, self._rebuild)
        self.story.injured(kind, (), PASSING_SECONDS.get(kind, 0.0))  # nan is in the recipe

    def _hurt(self, kind: str, host: int) -> None:
        victims, lasts = self.cluster.workers(host), PASSING_SECONDS.get(kind, 0.0)
        if kind == "kill_worker":
            self.cluster.kill_worker(host)
        elif kind == "stop_worker":
            self.cluster.stop_worker(host)
        elif kind == "kill_raylet":
            self.cluster.kill_raylet(host)
        elif kind == "kill_host":
            self.cluster.kill_host(host)
        elif kind == "partition":
            self._cut.add(host)
            self.cluster.partition(host)
            self._later(lasts, lambda: self._heal(host))
        elif kind == "drain_host":
            victims, lasts = [], 2.0 * DRAIN_SECONDS
            self._leaving.add(host)
            telling = self.cluster.drain(host, DRAIN_SECONDS)
            self._later(0.0, lambda: self._leave(host, telling))
        elif kind == "disk_full":
            victims = []
            self._later(lasts, self._fill(host))
        self.story.injured(f"{kind} on host {host}", victims, lasts)

    # ------------------------------------------------------------ and what follows from it
    def _store_well(self) -> None:
        self.proxy.plan = lambda number, method, target: None

    def _heal(self, host: int) -> None:
        self.cluster.heal(host)
        self._cut.discard(host)

    def _leave(self, host: int, telling: subprocess.Popen[bytes]) -> None:
        """The notice's time begins when Ray has been told."""
        if telling.poll() is None:
            self._later(0.0, lambda: self._leave(host, telling))
        elif telling.returncode == 0:
            self._later(DRAIN_SECONDS, lambda: self._take(host))
        elif self._headless or not self.cluster.running(host):  # it was lost before Ray could be told
            self._leaving.discard(host)
        else:
            raise RuntimeError(f"ray drain-node ended with status {telling.returncode}")

    def _take(self, host: int) -> None:
        if host in self._leaving and self.cluster.running(host):
            victims = self.cluster.workers(host)
            self.cluster.kill_host(host)
            self.story.injured(f"host {host} goes", victims, 0.0)
        self._leaving.discard(host)

    def _rebuild(self) -> None:
        """A new head and new hosts where the old ones were; nothing of them is left but the store."""
        self._leaving.clear()
        self._down_since.clear()
        for host in self.cluster.hosts:  # all first: Ray starts no head at an address that a node still looks for
            self.cluster.kill_host(host)
        self.cluster.start_head()
        for host in self.cluster.hosts:
            self.cluster.start_host(host)
        self._asking = self.cluster.ask_for_hosts(len(self.cluster.hosts))

    def _fill(self, host: int) -> Callable[[], None]:
        filler = self.cluster.temporary_seen_from_here(host) / "filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            for _ in range(TEMPORARY_MIB << 4):
                file.write(bytes(1 << 16))

        def empty() -> None:
            with contextlib.suppress(OSError):  # the host may be gone, and its disk with it
                filler.unlink()

        return empty


def torment(schedule: list[Injury], story: Story, by: Tormentor, limit: float) -> list[str]:
    """Until the last driver ends, or for `limit` seconds: watch, injure as scheduled; gives what went wrong."""
    left, last = list(schedule), 0.0
    while by.running:
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
    if by.driver.returncode != 0:
        faults.insert(0, f"the driver ended with status {by.driver.returncode}: {last_words(story.cluster)}")
    return faults


def last_words(hosts: Cluster) -> str:
    lines = [line for line in hosts.log.read_text().splitlines() if "PlacementGroupCleaner" not in line]
    return "\n".join(lines[-20:])
