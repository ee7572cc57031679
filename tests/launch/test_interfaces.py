"""The interface of an address, and what Gloo and NCCL are told of it."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray

from t2idist.launch import interfaces
from tests.helpers.runs import check_finished, write_recipe
from tools.chaos import hosts


def test_addresses_are_those_of_the_ip_command() -> None:
    listed = subprocess.run(["ip", "-o", "address"], capture_output=True, text=True, check=True).stdout
    expected = {match[2]: match[1] for match in re.finditer(r"^\d+: (\S+) +inet6? ([^/ ]+)/", listed, re.MULTILINE)}
    assert interfaces.addresses() == expected
    for address, name in expected.items():
        assert interfaces.interface_of(address) == name


def test_every_loopback_address_is_on_the_loopback_interface() -> None:
    assert interfaces.interface_of("127.0.1.1") == interfaces.interface_of("127.0.0.1") == "lo"


@pytest.mark.parametrize("address", ["10.255.255.1", "head", "", "fd00::ffff:1"])
def test_other_addresses_have_no_interface(address: str) -> None:
    assert interfaces.interface_of(address) is None


@pytest.fixture
def eth7(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node whose address in Ray is on eth7."""
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.1.2.3")
    monkeypatch.setattr(
        interfaces, "addresses", lambda: {"127.0.0.1": "lo", "172.17.0.1": "docker0", "10.1.2.3": "eth7"}
    )
    for library in ("GLOO", "NCCL"):  # set, then removed: restored at the end of the test even if it was not set
        monkeypatch.setenv(f"{library}_SOCKET_IFNAME", "")
        monkeypatch.delenv(f"{library}_SOCKET_IFNAME")


@pytest.mark.usefixtures("eth7")
def test_interface_of_the_node_is_selected() -> None:
    interfaces.select_node_interface()
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("eth7", "=eth7")


@pytest.mark.usefixtures("eth7")
def test_the_users_selection_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker0")
    interfaces.select_node_interface()
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("eth7", "^docker0")


@pytest.mark.usefixtures("eth7")
def test_loopback_is_selected_only_if_the_node_is_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    interfaces.select_node_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


@pytest.mark.usefixtures("eth7")
def test_nothing_is_selected_if_no_interface_has_the_nodes_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "203.0.113.9")  # of a NAT
    interfaces.select_node_interface()
    assert "GLOO_SOCKET_IFNAME" not in os.environ and "NCCL_SOCKET_IFNAME" not in os.environ


class DebianHosts(hosts.Cluster):
    """Hosts whose own name is 127.0.1.1, as Debian sets it, and that have the interface of Docker, too."""

    def add_hosts(self) -> None:
        super().add_hosts()
        for host in range(len(self.addresses)):
            name = self.namespace(host)
            hosts_file = Path("/etc/netns") / name / "hosts"  # `ip netns exec` puts it in the place of /etc/hosts
            hosts_file.parent.mkdir(parents=True)
            hosts_file.write_text(f"127.0.0.1 localhost\n127.0.1.1 {socket.gethostname()}\n")
            for arguments in (
                ("link", "add", "docker0", "type", "bridge"),
                ("address", "add", "172.17.0.1/16", "dev", "docker0"),
                ("link", "set", "docker0", "up"),
            ):
                subprocess.run(["ip", "-n", name, *arguments], check=True)

    def close(self) -> None:
        super().close()
        for host in range(len(self.addresses)):
            shutil.rmtree(Path("/etc/netns") / self.namespace(host), ignore_errors=True)


@contextlib.contextmanager
def debian_hosts() -> Iterator[DebianHosts]:
    """Run a cluster of two such hosts, whose environment selects no interface."""
    try:
        hosts.check_machine()
    except hosts.Unsupported as missing:
        pytest.skip(str(missing))
    folder = Path(tempfile.mkdtemp(prefix="t2h-", dir="/tmp"))  # short: sockets are in it
    env = hosts.environment(secrets.token_hex(32), health_period_ms=2000, health_timeout_ms=2000)
    env = {name: value for name, value in env.items() if not name.endswith("_SOCKET_IFNAME")}
    cluster = DebianHosts(str(os.getpid()), 2, folder, hosts.free_subnet(), env, 1)
    try:
        cluster.make_bridge()
        cluster.start()
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hosts_train_though_their_names_are_127_0_1_1_and_they_have_docker0(tmp_path: Path) -> None:
    file = write_recipe(tmp_path, cluster={"workers": [2, 2], "cpus_per_worker": 1, "max_failures": 0})
    with debian_hosts() as cluster:
        driver = cluster.submit([str(file), "cluster.require_token=true"])
        assert driver.wait(600) == 0, cluster.log.read_text()
        assert "workers 2" in cluster.log.read_text()
    check_finished(tmp_path)


def test_connections_to_lost_addresses_are_closed_and_others_stay() -> None:
    servers = [socket.create_server((address, 0)) for address in ("127.0.0.2", "127.0.0.3")]
    lost, kept = (socket.create_connection(server.getsockname()) for server in servers)
    accepted = [server.accept()[0] for server in servers]
    received: list[bytes] = []
    waiting = threading.Thread(target=lambda: received.append(lost.recv(1)))
    waiting.start()
    interfaces.close_connections({"127.0.0.2"})
    waiting.join(10)
    assert received == [b""], "who waits for an answer is woken"
    accepted[1].sendall(b"x")
    assert kept.recv(1) == b"x"
    for each in (lost, kept, *accepted, *servers):
        each.close()


def test_process_group_is_joined_once_the_first_worker_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as reserved, ThreadPoolExecutor(1) as pool:
        reserved.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(reserved.getsockname()[1]))
        join = pool.submit(
            interfaces.call_once_reachable, lambda rank, *, size: (rank, size, time.monotonic()), 1, size=2
        )
        time.sleep(0.3)
        assert not join.done()
        reserved.listen()
        listening = time.monotonic()
        rank, size, joined = join.result(10)
    assert (rank, size) == (1, 2) and joined >= listening
    monkeypatch.setattr(interfaces, "_REACHABLE_SECONDS", 0.1)
    assert (
        interfaces.call_once_reachable(lambda: "torch reports that nobody listens")
        == "torch reports that nobody listens"
    )
