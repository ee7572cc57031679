"""Several hosts on one machine, each a network namespace with an address, a link and a Ray node of its own.

The hosts, a head without workers and an object store are connected by a bridge. Processes can be killed or stopped,
hosts shut down and links cut. Needs root and iproute2.
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

from t2idist.observability.process import TRAINING_THREAD

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")
GCS_PORT = 6379
HEAD = 0
"""The head's number; the other hosts count from 1."""
DASHBOARD_PORT = 8265
"""Port of the dashboard on the head's loopback address."""
TEMPORARY_MIB = 32
"""Size of a host's own TMPDIR."""
_PREFIX = "t2idist"
_NODES_ALIVE = """
import ray, sys, time
ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
while sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes()) < int(sys.argv[1]):
    time.sleep(0.3)
"""


class Unsupported(RuntimeError):
    """This machine cannot run such hosts; the message names what is missing."""


class Cluster:
    """A head and several hosts.

    Args:
        name: unique on this machine; the id of the process if the cluster ends with it.
        hosts: number of hosts without the head.
        env: environment of every process on the hosts.
        cpus: number of CPUs of each host, as Ray counts them.
        dashboard: whether the head runs a dashboard on its loopback address.

    Attributes:
        addresses: of the head, then of the hosts.
        gateway: this machine's address on the bridge.
        log: file for the driver's output.
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
        self.gateway = str(subnet[1])
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
        """Create the network that connects this machine and the hosts."""
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("address", "add", f"{self.gateway}/{self._subnet.prefixlen}", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")

    def add_hosts(self) -> None:
        """Create the hosts, each with a link to the bridge."""
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
        self, host: int, arguments: list[str], log: Path, *, pass_fds: tuple[int, ...] = (), **env: str
    ) -> subprocess.Popen[bytes]:
        """Start a process on a host; its output is appended to `log`."""
        with open(log, "ab") as out:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace(host), *arguments],
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
        """Start head and hosts, and wait until all have joined."""
        self.add_hosts()
        self.start_head()
        for host in self.hosts:
            self.start_host(host)
        self.wait_for_hosts(len(self.hosts))

    def start_head(self) -> None:
        """Start the head (again), without any state of an earlier one."""
        self._kill_all(HEAD)
        self.heal(HEAD)
        arguments = ["--head", f"--port={GCS_PORT}", "--num-cpus=0", "--disable-usage-stats"]
        arguments.append(f"--include-dashboard={str(self._dashboard).lower()}")
        if self._dashboard:
            arguments += ["--dashboard-host=127.0.0.1", f"--dashboard-port={DASHBOARD_PORT}"]
        self._start_node(HEAD, arguments)

    def start_host(self, host: int) -> None:
        """Start a host (again), its link and its Ray node; processes left on it are killed first."""
        self._kill_all(host)
        self.heal(host)
        self._start_node(host, [f"--address={self.addresses[HEAD]}:{GCS_PORT}", f"--num-cpus={self.cpus}"])

    def _start_node(self, host: int, arguments: list[str]) -> None:
        temporary = self.temporary(host)
        temporary.mkdir(exist_ok=True)
        start = [RAY, "start", "--block", f"--node-ip-address={self.addresses[host]}", *arguments]
        start += [f"--temp-dir={self.folder}/ray{host}", f"--object-store-memory={128 << 20}", f"--memory={2 << 30}"]
        # a file system that ends with the last process of the host
        mounted = f'mount -t tmpfs -o size={TEMPORARY_MIB}m tmpfs "$TMPDIR" && exec "$@"'
        log = self.folder / f"host{host}.log"
        self._nodes[host] = self.popen(host, ["sh", "-c", mounted, "sh", *start], log, TMPDIR=str(temporary))

    def watch_for_hosts(self, count: int) -> subprocess.Popen[bytes]:
        """Start a process that ends with 0 once `count` hosts have joined, with 1 if the head is down."""
        arguments = [sys.executable, "-c", _NODES_ALIVE, str(count)]
        return self.popen(HEAD, arguments, self.folder / "nodes.log", RAY_ADDRESS=self._gcs())

    def wait_for_hosts(self, count: int, seconds: float = 120.0) -> None:
        """Wait until `count` hosts have joined; raises RuntimeError with the end of the nodes' logs."""
        watcher = self.watch_for_hosts(count)
        try:
            if watcher.wait(seconds) == 0:
                return
        except subprocess.TimeoutExpired:
            pass
        finally:
            watcher.kill()
            watcher.wait()
        logs = "".join(log.read_text()[-2000:] for log in sorted(self.folder.glob("*.log")))
        raise RuntimeError(f"{count} hosts did not join within {seconds:g} s: {logs}")

    def running(self, host: int) -> bool:
        """Return whether the host's Ray node runs (its link may be down)."""
        return self._nodes[host].poll() is None if host in self._nodes else bool(self.pids(host, b"/raylet/raylet"))

    def temporary(self, host: int) -> Path:
        """Return the host's TMPDIR as a path for its own processes."""
        return self.folder / f"tmp{host}"

    def temporary_from_outside(self, host: int) -> Path:
        """Return the same folder as a path for this process; raises ProcessLookupError if the host is down."""
        pids = self.pids(host, b"/raylet/raylet")
        if not pids:
            raise ProcessLookupError(f"host {host} has no raylet")
        return Path(f"/proc/{pids[0]}/root{self.temporary(host)}")

    # ------------------------------------------------------------ faults
    def kill_raylet(self, host: int) -> list[int]:
        """Send SIGKILL to the raylet; returns the ids of the killed processes."""
        return _kill(self.pids(host, b"/raylet/raylet"), signal.SIGKILL)

    def kill_host(self, host: int) -> list[int]:
        """Lose the host between two packets: its link goes down, then all its processes are killed."""
        self.partition(host)
        return self._kill_all(host)

    def drain(self, host: int, seconds: int) -> subprocess.Popen[bytes]:
        """Notify Ray that the host shuts down in `seconds`, as a cloud's notice does.

        Returns a process that ends with 0 once Ray is notified. Raises ProcessLookupError if the host is down.
        """
        if not self.pids(host, b"/raylet/raylet"):
            raise ProcessLookupError(f"host {host} has no raylet")
        arguments = [sys.executable, "-m", "t2idist.cli", "drain", f"--seconds={seconds}", "--no-wait"]
        return self.popen(host, arguments, self.folder / "drain.log")

    def partition(self, host: int) -> None:
        """Take the host's link down; its processes keep running."""
        _ip("link", "set", self._link(host), "down")

    def heal(self, host: int) -> None:
        _ip("link", "set", self._link(host), "up")

    def workers(self, host: int) -> list[int]:
        """Return the process ids of the training workers on a host."""
        return [pid for pid in self.pids(host, b"ray::PooledWorker") if rank_of(pid) is not None]

    def kill_worker(self, host: int) -> list[int]:
        return _kill(self.workers(host), signal.SIGKILL)

    def stop_worker(self, host: int) -> list[int]:
        """Send SIGSTOP: the worker hangs."""
        return _kill(self.workers(host), signal.SIGSTOP)

    def pids(self, host: int, pattern: bytes = b"") -> list[int]:
        """Return the processes of a host whose command line contains `pattern`."""
        try:
            namespace = os.stat(f"/run/netns/{self.namespace(host)}").st_ino
        except FileNotFoundError:
            return []
        pids = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.stat(process / "ns/net").st_ino == namespace and pattern in (process / "cmdline").read_bytes():
                    pids.append(int(process.name))
        return sorted(pids)

    def _kill_all(self, host: int) -> list[int]:
        killed: list[int] = []
        while pids := self.pids(host):  # a process may have started another one in the meantime
            killed += _kill(pids, signal.SIGKILL)
            if host in self._nodes:
                self._nodes[host].poll()
            time.sleep(0.02)
        return killed

    # ------------------------------------------------------------ the run
    def _gcs(self) -> str:
        return f"{self.addresses[HEAD]}:{GCS_PORT}"

    def submit(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        """Start the driver of a run on the head; its output is appended to `log`."""
        line = [sys.executable, "-m", "t2idist.run", *arguments]
        temporary = self.folder / "driver"  # a killed driver leaves files there
        temporary.mkdir(exist_ok=True)
        self._others.append(self.popen(HEAD, line, self.log, RAY_ADDRESS=self._gcs(), TMPDIR=str(temporary)))
        return self._others[-1]

    def close(self) -> None:
        """Kill all processes on the hosts, and remove the hosts and their network."""
        for host in range(len(self.addresses)):
            self._kill_all(host)
            subprocess.run(["ip", "netns", "delete", self.namespace(host)], check=False, capture_output=True)
            subprocess.run(["ip", "link", "delete", self._link(host)], check=False, capture_output=True)
        for process in [*self._nodes.values(), *self._others]:
            process.wait(30)
        subprocess.run(["ip", "link", "delete", self.bridge], check=False, capture_output=True)


def environment(token: str, *, health_period_ms: int, health_timeout_ms: int) -> dict[str, str]:
    """Return the environment of the hosts' processes. Ray declares a node dead after 3 x (period + timeout)."""
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
        "RAY_memory_monitor_refresh_ms": "0",  # each node would count the memory of the whole machine
        "RAY_worker_niceness": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }


def check_machine() -> None:
    """Raise `Unsupported` if this machine cannot run hosts; remove hosts whose process has died."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise Unsupported("several hosts on one machine need root and iproute2 (network namespaces)")
    _sweep()
    probe = f"{_PREFIX}-{os.getpid()}-probe"
    done = subprocess.run(["ip", "netns", "add", probe], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise Unsupported(f"this machine allows no network namespaces: {done.stderr.strip()}")
    _ip("netns", "delete", probe)


def _sweep() -> None:
    """Remove namespaces and links that a killed process left behind."""
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    for name in [line.split()[0] for line in listed.splitlines() if line.startswith(f"{_PREFIX}-")]:
        owner, host = name.split("-")[1:]
        if not owner.isdigit() or Path(f"/proc/{owner}").exists():
            continue
        pids = subprocess.run(["ip", "netns", "pids", name], check=True, capture_output=True, text=True).stdout
        _kill([int(pid) for pid in pids.split()], signal.SIGKILL)
        for arguments in (
            ["netns", "delete", name],
            ["link", "delete", f"t2v{owner}n{host}"],
            ["link", "delete", f"t2b{owner}"],
        ):
            subprocess.run(["ip", *arguments], check=False, capture_output=True)


def free_subnet() -> ipaddress.IPv4Network:
    """Draw a private subnet that this machine does not use."""
    commands = [["ip", "-4", "-o", "address"], ["ip", "-4", "route"]]
    output = " ".join(subprocess.run(c, check=True, capture_output=True, text=True).stdout for c in commands)
    used = []
    for word in output.split():
        with contextlib.suppress(ValueError):
            used.append(ipaddress.ip_network(word, strict=False))
    generator = random.SystemRandom()
    while True:
        subnet = ipaddress.ip_network(f"10.{generator.randrange(64, 250)}.{generator.randrange(256)}.0/24")
        if not any(subnet.overlaps(other) for other in used if other.version == 4):
            return subnet  # type: ignore[return-value]


def rank_of(pid: int) -> int | None:
    """Return the rank of the worker that trains in a process; None: it does not train."""
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError):
            name = (thread / "comm").read_text().strip()
            if name.startswith(TRAINING_THREAD):
                return int(name.removeprefix(TRAINING_THREAD))
    return None


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _kill(pids: list[int], number: signal.Signals) -> list[int]:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return pids
