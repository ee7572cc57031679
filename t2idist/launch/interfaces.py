"""Network interfaces of this machine, and connections over them: which interface carries the traffic between workers.

Gloo and NCCL select one by the host's name or by order. Debian maps the name to 127.0.1.1, and docker0 may come first:
other nodes cannot reach either. The interface of the node's address in Ray is reachable, because Ray uses it.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import ipaddress
import os
import socket
import stat
import struct
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
_SIOCGIFCONF = 0x8912  # Linux: all IPv4 addresses, with the names of their interfaces
_IFREQ_BYTES = 40
_MOST_ADDRESSES = 4096
_REACHABLE_SECONDS, _CONNECT_SECONDS, _REACHABLE_POLL_SECONDS = 5.0, 0.5, 0.01
_IPV6_TABLE = Path("/proc/net/if_inet6")


def select_node_interface() -> None:
    """Let Gloo and NCCL use the interface of this node's address in Ray, unless the user has selected one."""
    import ray  # not needed by the command, which only asks for the machine's addresses

    name = interface_of(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # without "=", it is a prefix of names


def call_once_reachable(function: Callable[..., T], *arguments: Any, **settings: Any) -> T:
    """Call a function that joins a process group, once the group's first worker listens, or after about 5 s.

    torch tries to connect at once, and again only after half a second.
    """
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + _REACHABLE_SECONDS
    while time.monotonic() < deadline:
        try:
            socket.create_connection(address, timeout=_CONNECT_SECONDS).close()
            break
        except OSError:
            time.sleep(_REACHABLE_POLL_SECONDS)
    return function(*arguments, **settings)


def interface_of(address: str) -> str | None:
    """Return the name of the interface that has this IP address; None if none has it or it is not an IP address."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return None
    own = addresses()
    if ip.version == 4 and ip.is_loopback and str(ip) not in own:  # 127.0.0.0/8 is one address of the interface
        return own.get("127.0.0.1")
    return own.get(str(ip))


def addresses() -> dict[str, str]:
    """Return the interface of each IP address of this machine. Empty where the kernel is not Linux's."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        found |= _ipv4_addresses()
    with contextlib.suppress(OSError):
        for line in _IPV6_TABLE.read_text().splitlines():
            digits, *_, name = line.split()
            found[str(ipaddress.IPv6Address(bytes.fromhex(digits)))] = name
    return found


def _ipv4_addresses() -> dict[str, str]:
    buffer = array.array("B", bytes(_IFREQ_BYTES * _MOST_ADDRESSES))
    start, length = buffer.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        filled = fcntl.ioctl(any_socket.fileno(), _SIOCGIFCONF, struct.pack("iL", length, start))
    found = {}
    for at in range(0, struct.unpack("iL", filled)[0], _IFREQ_BYTES):
        entry = buffer[at : at + _IFREQ_BYTES].tobytes()
        name = os.fsdecode(entry[:16].split(b"\0", 1)[0])
        found[socket.inet_ntoa(entry[20:24])] = name.partition(":")[0]  # "eth0:1" is a second address of eth0
    return found


def close_connections(addresses: Collection[str]) -> None:
    """Close this process's TCP connections to these addresses: who waits for an answer gets an error instead."""
    if not addresses:
        return
    for entry in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):  # it has been closed meanwhile
            if stat.S_ISSOCK(entry.stat().st_mode):
                _close_if_to(addresses, os.dup(int(entry.name)))


def _close_if_to(addresses: Collection[str], descriptor: int) -> None:
    with socket.socket(fileno=descriptor) as connection:
        is_tcp = connection.family in (socket.AF_INET, socket.AF_INET6)
        if is_tcp and connection.getpeername()[0].removeprefix("::ffff:") in addresses:
            connection.shutdown(socket.SHUT_RDWR)
