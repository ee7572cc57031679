"""A real object store on loopback for tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import s3fs

from tools.chaos import seaweedfs as weed

KEY, SECRET = "testkey", "testsecret-that-must-not-leak"
NEW_KEY, NEW_SECRET = "renewedkey", "renewedsecret-that-must-not-leak"
"""Keys that the store accepts too, as if they had been issued later."""


@contextmanager
def seaweedfs(host: str = "127.0.0.1") -> Iterator[dict[str, str]]:
    """Run a store with a bucket `bucket`; yields the environment of its users."""
    with tempfile.TemporaryDirectory(prefix="t2idist-store-", ignore_cleanup_errors=True) as folder:
        process, address = weed.start(Path(folder), host, KEY, SECRET, {NEW_KEY: NEW_SECRET})
        try:
            weed.make_bucket(address, KEY, SECRET)
            yield {**os.environ, **weed.environment(address, KEY, SECRET)}
        finally:
            process.kill()  # a graceful shutdown takes half a minute, and the data is not needed
            process.wait(30)


def store(address: str) -> s3fs.S3FileSystem:
    return s3fs.S3FileSystem(key=KEY, secret=SECRET, endpoint_url=address, skip_instance_cache=True)
