"""Several hosts on one machine: a network namespace each, with an address, a link and a Ray node of its own.

The hosts, a head that takes no workers, and an object store meet on a bridge. What befalls real hosts can be done to
these: processes killed or stopped, a host lost, a link cut. Root and iproute2 are needed.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")
GCS_PORT = 6379
HEAD = 0
"""The head's number among the hosts; the others count from 1."""
DASHBOARD_PORT = 8265
"""On the loopback address of the head."""
TEMPORARY_MIB = 32
"""Room in a host's own TMPDIR."""
_PREFIX = "t2idist"
_NODES_ALIVE = """
import ray, sys, time
ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
while sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes()) < int(sys.argv[1]):
    time.sleep(0.3)
"""


class Missing(RuntimeError):
    """This machine cannot have hosts of this kind; the message says what it lacks."""


class Cluster:
    """A head and `hosts` hosts. addresses: by number, the head's first. gate: this machine's own on their bridge.

    name: tells it from others of this machine; a process's id where it ends with that process. env: of every process on
    the hosts. dashboard: whether the head has one, on its own loopback address. log: what the driver said.
    """

    def __init__(
        self,
        name: str,
        hosts: int,
        folder: Path,
        subnet: ipaddress.IPv4Network,
        env: Mapping[str, str],
        cpus: int,
        *,
        dashboard: bool = False,
    ) -> None:
        self.name, self.hosts, self.folder, self.cpus = name, range(1, hosts + 1), folder, cpus
        self.addresses = [str(subnet[10 + n]) for n in range(hosts + 1)]
        self.gate = str(subnet[1])
        self.log = folder / "driver.log"
        self.env = env
        self._subnet, self._dashboard = subnet, dashboard
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        self._others: list[subprocess.Popen[bytes]] = []

    # ------------------------------------------------------------ the network
    def namespace(self, host: int) -> str:
        return f"{_PREFIX}-{self.name}-{host}"

    @property
    def bridge(self) -> str:
        return f"t2b{self.name}"

    def make_bridge(self) -> None:
        """Make the network that this machine and the hosts share."""
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("address", "add", f"{self.gate}/{self._subnet.prefixlen}", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")

    def wire(self) -> None:
        """Make the hosts, each with its link to the bridge."""
        for host, address in enumerate(self.addresses):
            name, outer = self.namespace(host), self._link(host)
            _ip("netns", "add", name)
            _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", outer, "master", self.bridge, "up")
            _ip("-n", name, "address", "add", f"{address}/{self._subnet.prefixlen}", "dev", "eth0")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "eth0", "up")

    def _link(self, host: int) -> str:
        return f"t2v{self.name}n{host}"

    def popen(
        self, host: int, words: list[str], log: Path, *, pass_fds: tuple[int, ...] = (), **env: str
    ) -> subprocess.Popen[bytes]:
        """A process on a host; what it says goes to `log`."""
        with open(log, "ab") as out:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace(host), *words],
                cwd=ROOT,
                env={**self.env, **env},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                pass_fds=pass_fds,
            )

    # ------------------------------------------------------------ hosts
    def start(self) -> None:
        """Bring head and hosts up, and wait until all have joined."""
        self.wire()
        self.start_head()
        for host in self.hosts:
            self.start_host(host)
        self.wait_for_hosts(len(self.hosts))

    def start_head(self) -> None:
        """Bring the head (back) up; it knows nothing of an earlier one."""
        self._kill_all(HEAD)
        self.heal(HEAD)
        words = ["--head", f"--port={GCS_PORT}", "--num-cpus=0", "--disable-usage-stats"]
        words.append(f"--include-dashboard={str(self._dashboard).lower()}")
        if self._dashboard:
            words += ["--dashboard-host=127.0.0.1", f"--dashboard-port={DASHBOARD_PORT}"]
        self._start_node(HEAD, words)

    def start_host(self, host: int) -> None:
        """Bring a host (back) up: link and Ray node; whatever still runs there of an earlier one is ended first."""
        self._kill_all(host)
        self.heal(host)
        self._start_node(host, [f"--address={self.addresses[HEAD]}:{GCS_PORT}", f"--num-cpus={self.cpus}"])

    def _start_node(self, host: int, words: list[str]) -> None:
        temporary = self.temporary(host)
        temporary.mkdir(exist_ok=True)
        start = [RAY, "start", "--block", f"--node-ip-address={self.addresses[host]}", *words]
        start += [f"--temp-dir={self.folder}/ray{host}", f"--object-store-memory={128 << 20}", f"--memory={2 << 30}"]
        # a file system of the host's own, which goes with its last process
        mounted = f'mount -t tmpfs -o size={TEMPORARY_MIB}m tmpfs "$TMPDIR" && exec "$@"'
        log = self.folder / f"host{host}.log"
        self._nodes[host] = self.popen(host, ["sh", "-c", mounted, "sh", *start], log, TMPDIR=str(temporary))

    def ask_for_hosts(self, count: int) -> subprocess.Popen[bytes]:
        """A process that ends with 0 when so many hosts have joined, and with 1 where there is no head to ask."""
        words = [sys.executable, "-c", _NODES_ALIVE, str(count)]
        return self.popen(HEAD, words, self.folder / "nodes.log", RAY_ADDRESS=self._gcs())

    def wait_for_hosts(self, count: int, seconds: float = 120.0) -> None:
        """Wait until so many hosts have joined. Raises RuntimeError with the nodes' last words where they do not."""
        asking = self.ask_for_hosts(count)
        try:
            if asking.wait(seconds) == 0:
                return
        except subprocess.TimeoutExpired:
            pass
        finally:
            asking.kill()
            asking.wait()
        said = "".join(log.read_text()[-2000:] for log in sorted(self.folder.glob("*.log")))
        raise RuntimeError(f"{count} hosts did not join within {seconds:g} s: {said}")

    def running(self, host: int) -> bool:
        """Whether the host's Ray node has not ended (it may be cut off)."""
        return self._nodes[host].poll() is None if host in self._nodes else bool(self.pids(host, b"/raylet/raylet"))

    def temporary(self, host: int) -> Path:
        """The host's TMPDIR, as its own processes see it."""
        return self.folder / f"tmp{host}"

    def temporary_seen_from_here(self, host: int) -> Path:
        """The same folder, as this process sees it; raises ProcessLookupError where the host is down."""
        pids = self.pids(host, b"/raylet/raylet")
        if not pids:
            raise ProcessLookupError(f"host {host} has no raylet")
        return Path(f"/proc/{pids[0]}/root{self.temporary(host)}")

    # ------------------------------------------------------------ what befalls them
    def kill_raylet(self, host: int) -> list[int]:
        """SIGKILL of the Ray node's own process; gives the ids killed."""
        return _kill(self.pids(host, b"/raylet/raylet"), signal.SIGKILL)

    def kill_host(self, host: int) -> list[int]:
        """The host is gone between two packets: its link is down, then everything on it is killed."""
        self.partition(host)
        return self._kill_all(host)

    def drain(self, host: int, seconds: int) -> subprocess.Popen[bytes]:
        """Tell Ray that the host goes in so many seconds, as a cloud's notice does.

        Gives a process that ends with 0 when Ray has been told. Raises ProcessLookupError where the host is down.
        """
        if not self.pids(host, b"/raylet/raylet"):
            raise ProcessLookupError(f"host {host} has no raylet")
        words = [sys.executable, "-m", "t2idist.launch.drain", f"--seconds={seconds}", "--no-wait"]
        return self.popen(host, words, self.folder / "drain.log")

    def partition(self, host: int) -> None:
        """Cut the host's link; its processes run on."""
        _ip("link", "set", self._link(host), "down")

    def heal(self, host: int) -> None:
        _ip("link", "set", self._link(host), "up")

    def workers(self, host: int) -> list[int]:
        """Process ids of the training's workers on a host."""
        return self.pids(host, b"ray::RayTrainWorker")

    def kill_worker(self, host: int) -> list[int]:
        return _kill(self.workers(host), signal.SIGKILL)

    def stop_worker(self, host: int) -> list[int]:
        """SIGSTOP: the worker hangs."""
        return _kill(self.workers(host), signal.SIGSTOP)

    def pids(self, host: int, words: bytes = b"") -> list[int]:
        """Processes of a host whose command line holds `words`."""
        try:
            space = os.stat(f"/run/netns/{self.namespace(host)}").st_ino
        except FileNotFoundError:
            return []
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.stat(process / "ns/net").st_ino == space and words in (process / "cmdline").read_bytes():
                    found.append(int(process.name))
        return sorted(found)

    def _kill_all(self, host: int) -> list[int]:
        killed: list[int] = []
        while pids := self.pids(host):  # a process may have started another one meanwhile
            killed += _kill(pids, signal.SIGKILL)
            if host in self._nodes:
                self._nodes[host].poll()
            time.sleep(0.02)
        return killed

    # ------------------------------------------------------------ the run
    def _gcs(self) -> str:
        return f"{self.addresses[HEAD]}:{GCS_PORT}"

    def submit(self, words: list[str]) -> subprocess.Popen[bytes]:
        """The driver of a run, on the head; what it says goes to `log`."""
        line = [sys.executable, "-m", "t2idist.run", *words]
        temporary = self.folder / "driver"  # where one that is killed leaves its notes
        temporary.mkdir(exist_ok=True)
        self._others.append(self.popen(HEAD, line, self.log, RAY_ADDRESS=self._gcs(), TMPDIR=str(temporary)))
        return self._others[-1]

    def close(self) -> None:
        """End all that runs on the hosts, the hosts, and their network."""
        for host in range(len(self.addresses)):
            self._kill_all(host)
            subprocess.run(["ip", "netns", "delete", self.namespace(host)], check=False, capture_output=True)
            subprocess.run(["ip", "link", "delete", self._link(host)], check=False, capture_output=True)
        for process in [*self._nodes.values(), *self._others]:
            process.wait(30)
        subprocess.run(["ip", "link", "delete", self.bridge], check=False, capture_output=True)


def environment(token: str, *, health_period_ms: int, health_timeout_ms: int) -> dict[str, str]:
    """Of every process on the hosts. Ray gives a node up after three checks, each of a period and a time-out."""
    drop = ("RAY_", "AWS_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(drop) and not k.lower().endswith("_proxy")}
    return {
        **env,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": str(health_period_ms),
        "RAY_health_check_timeout_ms": str(health_timeout_ms),
        "RAY_health_check_failure_threshold": "3",
        "RAY_memory_monitor_refresh_ms": "0",  # each node would count the whole machine's memory as its own
        "RAY_worker_niceness": "0",
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }


def check_machine() -> None:
    """Raises `Missing` where there can be no hosts; removes what dead processes have left of theirs."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise Missing("several hosts on one machine need root and iproute2 (network namespaces)")
    _sweep()
    probe = f"{_PREFIX}-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], check=False, capture_output=True, text=True)
    if made.returncode != 0:
        raise Missing(f"this machine gives no network namespaces: {made.stderr.strip()}")
    _ip("netns", "delete", probe)


def _sweep() -> None:
    """Remove what a process that was itself killed has left."""
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    for name in [line.split()[0] for line in listed.splitlines() if line.startswith(f"{_PREFIX}-")]:
        pid, host = name.split("-")[1:]
        if not pid.isdigit() or Path(f"/proc/{pid}").exists():
            continue
        left = subprocess.run(["ip", "netns", "pids", name], check=True, capture_output=True, text=True).stdout
        _kill([int(found) for found in left.split()], signal.SIGKILL)
        for words in (
            ["netns", "delete", name],
            ["link", "delete", f"t2v{pid}n{host}"],
            ["link", "delete", f"t2b{pid}"],
        ):
            subprocess.run(["ip", *words], check=False, capture_output=True)


def free_subnet() -> ipaddress.IPv4Network:
    """A private range that this machine does not use."""
    words = [["ip", "-4", "-o", "address"], ["ip", "-4", "route"]]
    said = " ".join(subprocess.run(w, check=True, capture_output=True, text=True).stdout for w in words)
    used = []
    for word in said.split():
        with contextlib.suppress(ValueError):
            used.append(ipaddress.ip_network(word, strict=False))
    draws = random.SystemRandom()
    while True:
        found = ipaddress.ip_network(f"10.{draws.randrange(64, 250)}.{draws.randrange(256)}.0/24")
        if not any(found.overlaps(other) for other in used if other.version == 4):
            return found  # type: ignore[return-value]


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _kill(pids: list[int], what: signal.Signals) -> list[int]:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, what)
    return pids
