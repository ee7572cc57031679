"""A cluster of several hosts on this one Linux machine: what cluster/local.sh runs. Root and iproute2 are needed.

    cluster/local.sh up [--hosts 3] [--cpus 1]   a head, hosts and an object store
    eval "$(cluster/local.sh env)"               where they are and the keys to them, for this shell
    cluster/local.sh kill N                      host N is gone: its link, then all that runs on it
    cluster/local.sh partition N                 host N's link is down; its processes run on
    cluster/local.sh heal N                      the link is up again
    cluster/local.sh drain N [--seconds 20]      host N goes in so many seconds, and is told before
    cluster/local.sh start N                     host N comes (back) up
    cluster/local.sh down                        all of it is ended and removed

Every host is a network namespace with an address and a Ray node of its own; the head takes no workers. The dashboard
listens on the head's loopback address and is reached through a port of this machine's, as `kubectl port-forward` and
`ray dashboard` do. Ray asks for a token. The store (SeaweedFS) has a bucket named "bucket".
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
from tools.chaos.hosts import DASHBOARD_PORT, HEAD, Cluster, Missing, check_machine, environment, free_subnet

STATE = "state.json"
HEALTH_MS = 2000
"""Of a check's period and of its time-out: README.md, "When machines go"."""
MOST_HOSTS = 50
_NAME_LETTERS = 8  # names of network links have at most 15


# ------------------------------------------------------------ what is kept between two commands
def folder_of(name: str) -> Path:
    """Short, for sockets lie in it."""
    return Path(tempfile.gettempdir()) / f"t2idist-{name}"


def load(name: str) -> tuple[Cluster, dict[str, str], int]:
    """The cluster of this name, what its users have in their environment, and its store's process."""
    try:
        state = json.loads((folder_of(name) / STATE).read_text())
    except FileNotFoundError:
        raise ValueError(f"there is no local cluster named {name}; cluster/local.sh up makes one") from None
    made = Cluster(
        name,
        state["hosts"],
        folder_of(name),
        ipaddress.IPv4Network(state["subnet"]),
        state["env"],
        state["cpus"],
        dashboard=True,
    )
    return made, state["users"], state["store"]


def write_state(made: Cluster, subnet: ipaddress.IPv4Network, users: dict[str, str], store: int) -> None:
    state = {"hosts": len(made.hosts), "cpus": made.cpus, "subnet": str(subnet), "env": dict(made.env)}
    file = made.folder / STATE
    file.touch(mode=0o600)
    file.write_text(json.dumps({**state, "users": users, "store": store}))


# ------------------------------------------------------------ up and down
def up(name: str, hosts: int, cpus: int, port: int) -> None:
    """Raises ValueError where one of this name is up, `Missing` where this machine cannot have one."""
    folder = folder_of(name)
    if folder.exists():
        raise ValueError(f"{folder} is there: cluster/local.sh down ends the cluster that it belongs to")
    check_machine()
    with _listen(port) as listening:
        folder.mkdir(mode=0o700)
        token, key, secret = (secrets.token_hex(32) for _ in range(3))
        subnet = free_subnet()
        env = environment(token, health_period_ms=HEALTH_MS, health_timeout_ms=HEALTH_MS)
        env["PATH"] = f"{Path(sys.executable).parent}:{env.get('PATH', os.defpath)}"
        made = Cluster(name, hosts, folder, subnet, env, cpus, dashboard=True)
        write_state(made, subnet, {}, 0)
        try:
            made.make_bridge()
            (folder / "store").mkdir(mode=0o700)
            store, endpoint = seaweedfs.start(folder / "store", made.gate, key, secret)
            reach = seaweedfs.environment(endpoint, key, secret)
            made.env = {**env, **reach}
            address = f"http://127.0.0.1:{listening.getsockname()[1]}"
            users = {"RAY_API_SERVER_ADDRESS": address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, **reach}
            write_state(made, subnet, users, store.pid)
            seaweedfs.make_bucket(endpoint, key, secret)
            made.start()
            line = [sys.executable, str(Path(__file__).resolve()), "forward", "--listening", str(listening.fileno())]
            made.popen(HEAD, line, folder / "forward.log", pass_fds=(listening.fileno(),))
            _wait_for_dashboard(address, token)
        except BaseException:
            down(name)
            raise
    print(f'{hosts} hosts of {cpus} CPU are up. In a shell that submits: eval "$(cluster/local.sh env)"')


def down(name: str) -> None:
    """End and remove all that `up` made, as far as it came."""
    made, _, store = load(name)
    made.close()
    if seaweedfs.serves(store, made.folder / "store"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(store, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while seaweedfs.serves(store, made.folder / "store") and time.monotonic() < deadline:
            time.sleep(0.05)
    shutil.rmtree(made.folder)


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise ValueError(f"--port {port}: {error.strerror}; 0 takes any that is free") from None


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
                raise RuntimeError(f"the head's dashboard did not answer within {seconds:g} s: {error}") from None
            time.sleep(0.5)


# ------------------------------------------------------------ the way to the dashboard
def forward(listening: socket.socket, target: tuple[str, int]) -> None:
    """Pass on every connection; the socket may have been made in another network namespace. Does not end."""
    while True:
        client, _ = listening.accept()
        threading.Thread(target=_pass_on, args=(client, target), daemon=True).start()


def _pass_on(client: socket.socket, target: tuple[str, int]) -> None:
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
def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="cluster/local.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--name", default="local", help="of one of several clusters on this machine (%(default)s)")
    doing = made.add_subparsers(dest="do", required=True, metavar="COMMAND")
    starting = doing.add_parser("up")
    starting.add_argument("--hosts", type=int, default=3, metavar="N", help="beside the head (%(default)s)")
    starting.add_argument("--cpus", type=int, default=1, metavar="N", help="that Ray counts on each (%(default)s)")
    starting.add_argument(
        "--port", type=int, default=DASHBOARD_PORT, help="of the dashboard here (%(default)s; 0: any)"
    )
    doing.add_parser("env")
    doing.add_parser("down")
    for command in ("kill", "partition", "heal", "start", "drain"):
        doing.add_parser(command).add_argument("host", type=int, metavar="N")
    doing.choices["drain"].add_argument("--seconds", type=int, default=20, metavar="N")
    passing = doing.add_parser("forward")  # not for people: how `up` reaches into the head's namespace
    passing.add_argument("--listening", type=int, required=True)
    return made


def main(words: list[str] | None = None) -> int:
    """Gives the exit status: 0 done, 1 failed, 2 bad input."""
    arguments = parser().parse_args(words)
    try:
        return _do(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Missing, RuntimeError, OSError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _do(arguments: argparse.Namespace) -> int:
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
    made, users, _ = load(name)
    if arguments.do == "env":
        print("\n".join(f"export {key}={shlex.quote(value)}" for key, value in users.items()))
        return 0
    if arguments.host not in made.hosts:
        raise ValueError(f"host {arguments.host}; there are hosts 1 to {len(made.hosts)}")
    return _befall(made, arguments)


def _befall(made: Cluster, arguments: argparse.Namespace) -> int:
    host: int = arguments.host
    if arguments.do == "kill":
        made.kill_host(host)
    elif arguments.do == "partition":
        made.partition(host)
    elif arguments.do == "heal":
        made.heal(host)
    elif arguments.do == "start":
        made.start_host(host)
    else:
        if made.drain(host, arguments.seconds).wait() != 0:
            raise RuntimeError(f"Ray was not told: {made.folder / 'drain.log'}")
        time.sleep(arguments.seconds)
        made.kill_host(host)
    return 0


if __name__ == "__main__":
    sys.exit(main())
