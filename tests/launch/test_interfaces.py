"""The interface of an address, and what Gloo and NCCL are told of it."""

from __future__ import annotations

import os
import re
import subprocess

import pytest
import ray

from t2idist.launch import interfaces


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
