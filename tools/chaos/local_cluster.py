"""A cluster of several hosts on one Linux machine, run by cluster/local.sh. Needs root and iproute2.

    cluster/local.sh up [--hosts 3] [--cpus 1]   a head, hosts and an object store
    eval "$(cluster/local.sh env)"               addresses, token and keys, for this shell
    cluster/local.sh kill N                      lose host N: its link, then all its processes
    cluster/local.sh partition N                 take host N's link down; its processes keep running
    cluster/local.sh heal N                      take the link up again
    cluster/local.sh drain N [--seconds 20]      shut host N down in that time, with notice
    cluster/local.sh start N                     start host N (again)
    cluster/local.sh down                        end and remove everything

Every host is a network namespace with an address and a Ray node of its own; the head runs no workers. The dashboard
listens on the head's loopback address and is forwarded to a port of this machine, as `kubectl port-forward` and
`ray dashboard` do. Ray requires a token. The store (SeaweedFS) has a bucket named "bucket".
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tools.chaos import seaweedfs
from tools.chaos.hosts import DASHBOARD_PORT, HEAD, Cluster, Unsupported, check_machine, environment, free_subnet

STATE = "state.json"
HEALTH_MS = 2000
"""Period and timeout of Ray's health checks; three failed checks declare a node dead."""
MOST_HOSTS = 50
_NAME_LETTERS = 8  # names of network links have at most 15 characters


# ------------------------------------------------------------ state between two commands
def folder_of(name: str) -> Path:
    """Return the cluster's folder; its path is short because sockets are in it."""
    return Path(tempfile.gettempdir()) / f"t2idist-{name}"


def load(name: str) -> tuple[Cluster, dict[str, str], int]:
    """Load a cluster by its name; returns it, the environment of its users, and its store's process id."""
    try:
        state = json.loads((folder_of(name) / STATE).read_text())
    except FileNotFoundError:
        raise ValueError(f"there is no local cluster named {name}; cluster/local.sh up creates one") from None
    cluster = Cluster(
        name,
        state["hosts"],
        folder_of(name),
        ipaddress.IPv4Network(state["subnet"]),
        state["env"],
        state["cpus"],
        dashboard=True,
    )
    return cluster, state["users"], state["store"]


def write_state(cluster: Cluster, subnet: ipaddress.IPv4Network, users: dict[str, str], store: int) -> None:
    state = {"hosts": len(cluster.hosts), "cpus": cluster.cpus, "subnet": str(subnet), "env": dict(cluster.env)}
    file = cluster.folder / STATE
    file.touch(mode=0o600)
    file.write_text(json.dumps({**state, "users": users, "store": store}))


# ------------------------------------------------------------ up and down
def up(name: str, hosts: int, cpus: int, port: int) -> None:
    """Start a cluster; raises ValueError if it is up already, `Unsupported` if this machine cannot run one."""
    folder = folder_of(name)
    if folder.exists():
        raise ValueError(f"{folder} exists: end its cluster with cluster/local.sh down")
    check_machine()
    with _listen(port) as listening:
        folder.mkdir(mode=0o700)
        token, key, secret = (secrets.token_hex(32) for _ in range(3))
        subnet = free_subnet()
        env = environment(token, health_period_ms=HEALTH_MS, health_timeout_ms=HEALTH_MS)
        env["PATH"] = f"{Path(sys.executable).parent}:{env.get('PATH', os.defpath)}"
        cluster = Cluster(name, hosts, folder, subnet, env, cpus, dashboard=True)
        write_state(cluster, subnet, {}, 0)
        try:
            cluster.make_bridge()
            (folder / "store").mkdir(mode=0o700)
            store, endpoint = seaweedfs.start(folder / "store", cluster.gateway, key, secret)
            reach = seaweedfs.environment(endpoint, key, secret)
            cluster.env = {**env, **reach}
            address = f"http://127.0.0.1:{listening.getsockname()[1]}"
            users = {"RAY_API_SERVER_ADDRESS": address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, **reach}
            write_state(cluster, subnet, users, store.pid)
            seaweedfs.make_bucket(endpoint, key, secret)
            cluster.start()
            line = [sys.executable, str(Path(__file__).resolve()), "forward", "--listening", str(listening.fileno())]
            cluster.popen(HEAD, line, folder / "forward.log", pass_fds=(listening.fileno(),))
            _wait_for_dashboard(address, token)
        except BaseException:
            down(name)
            raise
    print(f'{hosts} hosts of {cpus} CPU are up. In a shell that submits: eval "$(cluster/local.sh env)"')


def down(name: str) -> None:
    """End and remove everything that `up` created, even if it did not finish."""
    cluster, _, store = load(name)
    cluster.close()
    if seaweedfs.serves(store, cluster.folder / "store"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(store, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while seaweedfs.serves(store, cluster.folder / "store") and time.monotonic() < deadline:
            time.sleep(0.05)
    shutil.rmtree(cluster.folder)


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise ValueError(f"--port {port}: {error.strerror}; 0 selects any free port") from None


def _wait_for_dashboard(address: str, token: str, seconds: float = 120.0) -> None:
    request = urllib.request.Request(f"{address}/api/version", headers={"Authorization": f"Bearer {token}"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + seconds
    while True:
        try:
            direct.open(request, timeout=5).close()
            return
        except (OSError, urllib.error.URLError) as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the head's dashboard did not respond within {seconds:g} s: {error}") from None
            time.sleep(0.5)


# ------------------------------------------------------------ forwarding to the dashboard
def forward(listening: socket.socket, target: tuple[str, int]) -> None:
    """Forward every connection, forever; the socket may have been created in another network namespace."""
    while True:
        client, _ = listening.accept()
        threading.Thread(target=_forward_one, args=(client, target), daemon=True).start()


def _forward_one(client: socket.socket, target: tuple[str, int]) -> None:
    with client, contextlib.suppress(OSError), socket.create_connection(target) as server:
        back = threading.Thread(target=_pump, args=(server, client), daemon=True)
        back.start()
        _pump(client, server)
        back.join()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


# ------------------------------------------------------------ the command
def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cluster/local.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", default="local", help="name of the cluster on this machine (%(default)s)")
    commands = parser.add_subparsers(dest="do", required=True, metavar="COMMAND")
    up_parser = commands.add_parser("up")
    up_parser.add_argument("--hosts", type=int, default=3, metavar="N", help="number without the head (%(default)s)")
    up_parser.add_argument("--cpus", type=int, default=1, metavar="N", help="CPUs of each host (%(default)s)")
    up_parser.add_argument(
        "--port", type=int, default=DASHBOARD_PORT, help="port of the dashboard on this machine (%(default)s; 0: any)"
    )
    commands.add_parser("env")
    commands.add_parser("down")
    for command in ("kill", "partition", "heal", "start", "drain"):
        commands.add_parser(command).add_argument("host", type=int, metavar="N")
    commands.choices["drain"].add_argument("--seconds", type=int, default=20, metavar="N")
    forward_parser = commands.add_parser("forward")  # internal: started by `up` in the head's namespace
    forward_parser.add_argument("--listening", type=int, required=True)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 failed, 2 bad input."""
    try:
        return _run(build_parser().parse_args(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Unsupported, RuntimeError, OSError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(arguments: argparse.Namespace) -> int:
    name: str = arguments.name
    if not (name.isascii() and name.isalpha() and len(name) <= _NAME_LETTERS):
        raise ValueError(f"--name {name!r}; allowed are 1 to {_NAME_LETTERS} letters")
    if arguments.do == "forward":
        forward(socket.socket(fileno=arguments.listening), ("127.0.0.1", DASHBOARD_PORT))
    if arguments.do == "up":
        if not 1 <= arguments.hosts <= MOST_HOSTS or arguments.cpus < 1:
            raise ValueError(f"--hosts {arguments.hosts} --cpus {arguments.cpus}; allowed are 1 to {MOST_HOSTS} hosts")
        up(name, arguments.hosts, arguments.cpus, arguments.port)
        return 0
    if arguments.do == "down":
        down(name)
        return 0
    cluster, users, _ = load(name)
    if arguments.do == "env":
        print("\n".join(f"export {key}={shlex.quote(value)}" for key, value in users.items()))
        return 0
    if arguments.host not in cluster.hosts:
        raise ValueError(f"host {arguments.host}; there are hosts 1 to {len(cluster.hosts)}")
    return _change_host(cluster, arguments)


def _change_host(cluster: Cluster, arguments: argparse.Namespace) -> int:
    host: int = arguments.host
    if arguments.do == "kill":
        cluster.kill_host(host)
    elif arguments.do == "partition":
        cluster.partition(host)
    elif arguments.do == "heal":
        cluster.heal(host)
    elif arguments.do == "start":
        cluster.start_host(host)
    else:
        if cluster.drain(host, arguments.seconds).wait() != 0:
            raise RuntimeError(f"Ray could not be notified: {cluster.folder / 'drain.log'}")
        time.sleep(arguments.seconds)
        cluster.kill_host(host)
    return 0


if __name__ == "__main__":
    sys.exit(main())
