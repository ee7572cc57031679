"""A real object store on loopback: SeaweedFS's S3 server, started and ended by the test that asks for it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import s3fs

KEY, SECRET = "testkey", "testsecret-that-must-not-leak"


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Ports that are free, and so is each one plus 10,000 (SeaweedFS takes that for its own calls)."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as low, socket.socket() as high:
            low.bind((host, 0))
            port = low.getsockname()[1]
            if port + 10_000 > 65_000 or port in found:
                continue
            try:
                high.bind((host, port + 10_000))
            except OSError:
                continue
            found.append(port)
    return found


@contextmanager
def seaweedfs(host: str = "127.0.0.1") -> Iterator[dict[str, str]]:
    """A running store with a bucket `bucket` at an address of this machine: the environment that reaches it."""
    with tempfile.TemporaryDirectory(prefix="t2idist-store-", ignore_cleanup_errors=True) as folder:
        master, volume, filer, s3 = free_ports(4, host)
        identities = {
            "identities": [
                {
                    "name": "test",
                    "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
                    "actions": ["Admin", "Read", "Write", "List", "Tagging"],
                }
            ]
        }
        (Path(folder) / "s3.json").write_text(json.dumps(identities))
        weed = Path(sys.executable).parent / "weed"
        ports = {"s3": s3, "master": master, "volume": volume, "filer": filer}
        options = [f"-{kind}.port={port}" for kind, port in ports.items()]
        options += [f"-dir={folder}", f"-s3.config={folder}/s3.json", "-volume.max=20", "-master.volumeSizeLimitMB=64"]
        # no servers on fixed ports, so that two stores never meet; nothing is told to anybody
        options += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
        process = subprocess.Popen(
            [str(weed), "server", "-s3", f"-ip={host}", f"-ip.bind={host}", *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        address = f"http://{host}:{s3}"
        try:
            _make_bucket(address)
            yield {
                **os.environ,
                "AWS_ACCESS_KEY_ID": KEY,
                "AWS_SECRET_ACCESS_KEY": SECRET,
                "AWS_ENDPOINT_URL": address,
                "AWS_DEFAULT_REGION": "us-east-1",
            }
        finally:
            process.kill()  # a polite end takes it half a minute, and its data go with it
            process.wait(30)


def store(address: str) -> s3fs.S3FileSystem:
    return s3fs.S3FileSystem(key=KEY, secret=SECRET, endpoint_url=address, skip_instance_cache=True)


def _make_bucket(address: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            store(address).mkdir("bucket")
            return
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.3)
