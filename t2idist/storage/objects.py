"""Every byte to and from local disk or an object store: the only file on fsspec and on S3's client.

URLs are fsspec's (``s3://bucket/key``, ``memory://x``, ``gs://``...) or plain local paths. Credentials come from the
usual environment and files and are never taken from, or written to, a URL or a config. `endpoint_url` is the address
of an S3 service other than the environment's; local paths ignore it. Requests to a store are tried again as
`retry.persist` says. S3 objects are read by S3's own client, which needs half of s3fs's CPU time, the rest by fsspec.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from t2idist.storage.retry import persist

REFUSED = ("pipe", "simplecache", "filecache", "blockcache", "shell", "python")
"""Protocols that would run a program, or that chain to another URL behind the reader's back."""

BLOCK_BYTES = 4 << 20
"""A longer read is cut in such blocks; each is tried again alone, so that a fault costs no more than one."""
_BLOCKS_IN_FLIGHT = 4
_CONNECTIONS = 32
CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0
"""Without a connection, or a byte on it, for so long: a fault."""
_S3 = ("s3", "s3a")
_VALUES_KEPT = 8

_SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]*)(::|://|:(?!\\))")


def _scheme(url: str) -> str:
    found = _SCHEME.match(url)
    return found.group(1).lower() if found else ""


def check_url(url: str, endpoint_url: str | None = None) -> None:
    """Raises ValueError for a refused protocol, credentials in URL or endpoint, and an endpoint of no S3 URL."""
    scheme = _scheme(url)
    if scheme in REFUSED or "::" in url:
        raise ValueError(
            f"{redact(url)}: the protocol '{scheme}' is not allowed; give a local path or an object store URL"
        )
    if re.search(r"://[^/]*@", url):
        raise ValueError(
            f"{redact(url)}: credentials do not belong in a URL; use the environment or the store's own files"
        )
    if endpoint_url is not None and scheme not in ("", "file"):
        check_endpoint(endpoint_url)
        if scheme not in _S3:
            raise ValueError(f"{redact(url)}: an endpoint URL goes with s3:// only, not with {scheme}://")


def _filesystem(url: str, endpoint_url: str | None) -> tuple[Any, str]:
    check_url(url, endpoint_url)
    scheme = _scheme(url)
    if scheme in _S3:
        return _s3_filesystem(endpoint_url, _identity()), url.partition("://")[2].rstrip("/")
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{redact(url)}: no way to open this URL: {error}") from None
    if scheme not in ("", "file", "memory"):
        filesystem.invalidate_cache()
    return filesystem, path


def _identity() -> tuple[object, ...]:
    """What a client depends on: this process, and the environment that names keys and endpoint."""
    return (os.getpid(), *sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))


def _client_settings() -> dict[str, Any]:
    once = {"total_max_attempts": 1, "mode": "standard"}  # trying again is ours
    return {"retries": once, "connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}


@functools.lru_cache(_VALUES_KEPT)
def _s3_filesystem(endpoint_url: str | None, identity: tuple[object, ...]) -> Any:
    filesystem = fsspec.filesystem(
        "s3", endpoint_url=endpoint_url, config_kwargs=_client_settings(), use_listings_cache=False,
        skip_instance_cache=True,
    )  # fmt: skip
    filesystem.retries = 1
    return filesystem


@functools.lru_cache(_VALUES_KEPT)
def _s3_client(endpoint_url: str | None, identity: tuple[object, ...]) -> Any:
    import botocore.session  # slow to import, and of no use to who reads local files
    from botocore.config import Config

    config = Config(
        **_client_settings(), max_pool_connections=_CONNECTIONS, response_checksum_validation="when_required"
    )
    return botocore.session.get_session().create_client("s3", endpoint_url=endpoint_url, config=config)


def redact(url: str) -> str:
    """The URL without user name, password and query, for messages."""
    return re.sub(r"\?.*$", "", re.sub(r"(://)[^/]*@", r"\1", url))


def check_endpoint(endpoint_url: str) -> None:
    """Raises ValueError where this is not a plain http(s) address, or holds credentials."""
    if re.search(r"://[^/]*@", endpoint_url):
        raise ValueError(
            f"endpoint_url {redact(endpoint_url)}: credentials do not belong in it; use the environment or files"
        )
    if not re.fullmatch(r"https?://[A-Za-z0-9.:\[\]_-]+(/[^?#\s]*)?", endpoint_url):
        raise ValueError(f"endpoint_url {redact(endpoint_url)!r}: give an address such as http://host:9000")


def is_local(url: str) -> bool:
    return _scheme(url) in ("", "file")


def local_path(url: str) -> Path | None:
    """The path of a local URL, else None."""
    name = local_name(url)
    return None if name is None else Path(name)


def local_name(url: str) -> str | None:
    """The path of a local URL as a text, in a fraction of the time, else None."""
    if not is_local(url):
        return None
    path = url.removeprefix("file://")
    return str(Path(path).expanduser()) if path.startswith("~") else path


def absolute(url: str) -> str:
    """The URL as another process would need it: local paths made absolute."""
    path = local_path(url)
    return url if path is None else str(path.resolve())


def join(base: str, *parts: str) -> str:
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


def read_bytes(
    url: str,
    start: int | None = None,
    end: int | None = None,
    *,
    endpoint_url: str | None = None,
    stop: threading.Event | None = None,
) -> bytes:
    """The object's bytes, or those of the range [start, end), fewer where the object ends before.

    stop: when it is set, a read that would be tried again ends with retry.Cancelled. Raises FileNotFoundError,
    PermissionError and ConnectionError as `retry.persist` does.
    """
    path = local_path(url)
    if path is not None:
        with open(path, "rb") as file:
            file.seek(start or 0)
            return file.read() if end is None else file.read(end - (start or 0))
    if _scheme(url) in _S3:
        return _S3Object(url, endpoint_url, stop).read(start or 0, end)
    filesystem, key = _filesystem(url, endpoint_url)
    data: bytes = persist(lambda: filesystem.cat_file(key, start=start, end=end), redact(url), stop)
    return data


@dataclass(frozen=True)
class _Block:
    """Bytes of an object, and of the whole object: its size and its version's tag."""

    data: bytes
    object_bytes: int
    tag: str


class _S3Object:
    """An object that is read in blocks, several at a time."""

    def __init__(self, url: str, endpoint_url: str | None, stop: threading.Event | None) -> None:
        check_url(url, endpoint_url)
        self._where = redact(url)
        self._bucket, _, self._key = url.partition("://")[2].partition("/")
        self._client = _s3_client(endpoint_url, _identity())
        self._stop = stop

    def read(self, start: int, end: int | None) -> bytes:
        blocks = []
        if end is None:
            blocks = [self._block(start, start + BLOCK_BYTES)]  # tells how long the object is
            start, end = start + BLOCK_BYTES, blocks[0].object_bytes
        firsts = range(start, end, BLOCK_BYTES)
        if len(firsts) > 1:
            with ThreadPoolExecutor(min(_BLOCKS_IN_FLIGHT, len(firsts)), "block") as pool:
                blocks += pool.map(lambda first: self._block(first, min(first + BLOCK_BYTES, end)), firsts)
        else:
            blocks += [self._block(first, end) for first in firsts]
        if len({block.tag for block in blocks if block.data}) > 1:
            raise OSError(f"{self._where}: was written anew while it was read; read it again")
        return blocks[0].data if len(blocks) == 1 else b"".join(block.data for block in blocks)

    def _block(self, start: int, end: int) -> _Block:
        return persist(lambda: self._try(start, end), self._where, self._stop)

    def _try(self, start: int, end: int) -> _Block:
        from botocore.exceptions import ClientError

        if start >= end:
            return _Block(b"", 0, "")
        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key, Range=f"bytes={start}-{end - 1}")
        except ClientError as error:
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 416:
                return _Block(b"", 0, "")  # the object ends before this range
            raise
        data: bytes = answer["Body"].read()
        tag = str(answer.get("ETag", ""))
        if "ContentRange" not in answer:  # a store without ranges sends all
            return _Block(data[start:end], len(data), tag)
        total = int(answer["ContentRange"].rpartition("/")[2])
        wanted = min(end, total) - start
        if len(data) != wanted:
            raise EOFError(f"{len(data)} bytes came where {wanted} were asked for")
        return _Block(data, total, tag)


def write_bytes(url: str, data: bytes | memoryview, *, endpoint_url: str | None = None) -> None:
    """Write the whole object: a reader sees the old bytes or the new ones, never a part."""
    path = local_path(url)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return
    filesystem, key = _filesystem(url, endpoint_url)
    body = data if isinstance(data, bytes) else bytes(data)  # clients take nothing else
    persist(lambda: filesystem.pipe_file(key, body), redact(url))


def exists(url: str, *, endpoint_url: str | None = None) -> bool:
    path = local_path(url)
    if path is not None:
        return path.exists()
    filesystem, key = _filesystem(url, endpoint_url)
    return bool(persist(lambda: filesystem.exists(key), redact(url)))


def size(url: str, *, endpoint_url: str | None = None) -> int:
    path = local_path(url)
    if path is not None:
        return path.stat().st_size
    filesystem, key = _filesystem(url, endpoint_url)
    return int(persist(lambda: filesystem.size(key), redact(url)))


def list_dir(url: str, *, endpoint_url: str | None = None) -> list[str]:
    """Names in a folder, sorted; empty when there is no such folder."""
    path = local_path(url)
    if path is not None:
        return sorted(p.name for p in path.iterdir() if not p.name.startswith(".")) if path.is_dir() else []
    filesystem, key = _filesystem(url, endpoint_url)
    try:
        entries = persist(lambda: filesystem.ls(key, detail=False), redact(url))
    except FileNotFoundError:
        return []
    return sorted({str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries} - {"", key.rsplit("/", 1)[-1]})


def remove(url: str, *, endpoint_url: str | None = None) -> None:
    """Remove an object, or a folder with all in it; nothing happens when it is not there."""
    filesystem, key = _filesystem(url, endpoint_url)
    if persist(lambda: filesystem.exists(key), redact(url)):
        with contextlib.suppress(FileNotFoundError):  # gone in an earlier try
            persist(lambda: filesystem.rm(key, recursive=True), redact(url))


def read_json(url: str, *, endpoint_url: str | None = None) -> Any:
    """Raises ValueError, naming the URL, where the object is not JSON."""
    try:
        return json.loads(read_bytes(url, endpoint_url=endpoint_url))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{redact(url)}: not JSON: {error}") from None


def write_json(url: str, value: Any, *, endpoint_url: str | None = None) -> None:
    write_bytes(url, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(), endpoint_url=endpoint_url)


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
