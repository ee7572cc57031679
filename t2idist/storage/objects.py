"""Read and write local files and objects in a store: the only file that uses fsspec and the S3 client.

URLs are fsspec's (``s3://bucket/key``, ``memory://x``, ``gs://``...) or plain local paths. Credentials come from the
usual environment and files and are never taken from, or written to, a URL or a config. `endpoint_url` is the address
of an S3 service other than the environment's; local paths ignore it. Requests to a store are retried (`retry.retry`).
S3 objects are read with botocore, which needs half of s3fs's CPU time; everything else uses fsspec.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import json
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import fsspec.asyn

from t2idist.storage import hub
from t2idist.storage.renewal import Renewal, generation
from t2idist.storage.retry import retry

T = TypeVar("T")

REFUSED = ("pipe", "simplecache", "filecache", "blockcache", "shell", "python")
"""Protocols that run a program or chain to another URL."""

BLOCK_BYTES = 4 << 20
"""Longer reads are split into blocks of this size; each is retried on its own, so that a fault costs one block."""
_BLOCKS_IN_FLIGHT = 4
_CONNECTIONS = 32
CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0
"""After this long without a connection, or without a byte on it, a request fails and is retried."""
_S3 = ("s3", "s3a")
_CLIENTS_CACHED = 8
_GENERATIONS: dict[str, int] = {}
"""The generation of the clients that fsspec keeps, by protocol."""

_SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]*)(::|://|:(?!\\))")
_FEW_SLASHES = re.compile(r"^(?:([a-zA-Z][a-zA-Z0-9+.-]+):/|(s3a?|gs|gcs|az|abfs|https?):)(?!/)")


def _scheme(url: str) -> str:
    match = _SCHEME.match(url)
    return match.group(1).lower() if match else ""


def check_url(url: str, endpoint_url: str | None = None) -> None:
    """Raise ValueError for a refused protocol, for credentials in a URL, and for an endpoint without an S3 URL."""
    scheme = _scheme(url)
    if scheme in REFUSED or "::" in url:
        raise ValueError(
            f"{redact(url)}: the protocol '{scheme}' is not allowed; use a local path or an object store URL"
        )
    if match := _FEW_SLASHES.match(url):
        raise ValueError(
            f"{redact(url)}: two slashes follow the protocol: {match[1] or match[2]}://{redact(url[match.end() :])}"
        )
    if re.search(r"://[^/]*@", url):
        raise ValueError(
            f"{redact(url)}: credentials do not belong in a URL; use the environment or the store's own files"
        )
    if endpoint_url is not None and scheme not in ("", "file"):
        check_endpoint(endpoint_url)
        if scheme not in _S3:
            raise ValueError(f"{redact(url)}: an endpoint URL is for s3:// only, not for {scheme}://")


def _filesystem(url: str, endpoint_url: str | None) -> tuple[Any, str]:
    check_url(url, endpoint_url)
    scheme = _scheme(url)
    if scheme == hub.SCHEME:
        raise ValueError(f"{url}: only exports are read from the Hub; give a folder or bucket for what is written")
    if scheme in _S3:
        return _s3_filesystem(endpoint_url, _identity()), url.partition("://")[2].rstrip("/")
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{redact(url)}: this URL cannot be opened: {error}") from None
    if scheme not in ("", "file", "memory"):
        if _GENERATIONS.setdefault(scheme, 0) != generation():
            _GENERATIONS[scheme] = generation()
            type(filesystem).clear_instance_cache()
            filesystem, path = fsspec.core.url_to_fs(url)
        filesystem.invalidate_cache()
    return filesystem, path


def _request(
    url: str, endpoint_url: str | None, call: Callable[[Any, str], T], stop: threading.Event | None = None
) -> T:
    """Return `call(filesystem, key)`, with retries, and with new clients where the keys have expired."""
    _filesystem(url, endpoint_url)  # refuses a wrong URL at once
    renewal = _renewal(url, endpoint_url)
    return retry(lambda: call(*_filesystem(url, endpoint_url)), redact(url), stop, renewal)


def _renewal(url: str, endpoint_url: str | None) -> Renewal:
    bucket = url.partition("://")[2].partition("/")[0]
    return Renewal((_scheme(url), bucket, endpoint_url, *_environment()), redact(url))


def _environment() -> tuple[object, ...]:
    """Return this process, and the environment's keys and endpoint."""
    return (os.getpid(), *sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))


def _identity() -> tuple[object, ...]:
    """Return what a client depends on: the environment, and how often clients were replaced."""
    return (generation(), *_environment())


def _client_settings() -> dict[str, Any]:
    once = {"total_max_attempts": 1, "mode": "standard"}  # we retry ourselves
    return {"retries": once, "connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}


@functools.lru_cache(_CLIENTS_CACHED)
def _s3_filesystem(endpoint_url: str | None, identity: tuple[object, ...]) -> Any:
    filesystem = fsspec.filesystem(
        "s3", endpoint_url=endpoint_url, config_kwargs=_client_settings(), use_listings_cache=False,
        skip_instance_cache=True,
    )  # fmt: skip
    filesystem.retries = 1
    return filesystem


@functools.lru_cache(_CLIENTS_CACHED)
def _s3_client(endpoint_url: str | None, identity: tuple[object, ...]) -> Any:
    import botocore.session  # slow to import, and not needed for local files
    from botocore.config import Config

    config = Config(
        **_client_settings(), max_pool_connections=_CONNECTIONS, response_checksum_validation="when_required"
    )
    return botocore.session.get_session().create_client("s3", endpoint_url=endpoint_url, config=config)


def redact(url: str) -> str:
    """Return the URL without user name, password and query, for messages."""
    return re.sub(r"\?.*$", "", re.sub(r"(://)[^/]*@", r"\1", url))


def check_endpoint(endpoint_url: str) -> None:
    """Raise ValueError unless this is a plain http(s) address without credentials."""
    if re.search(r"://[^/]*@", endpoint_url):
        raise ValueError(
            f"endpoint_url {redact(endpoint_url)}: credentials do not belong in it; use the environment or files"
        )
    if not re.fullmatch(r"https?://[A-Za-z0-9.:\[\]_-]+(/[^?#\s]*)?", endpoint_url):
        raise ValueError(f"endpoint_url {redact(endpoint_url)!r}: expected an address such as http://host:9000")


def is_local(url: str) -> bool:
    return _scheme(url) in ("", "file")


def local_path(url: str) -> Path | None:
    """Return the path of a local URL, else None."""
    name = local_name(url)
    return None if name is None else Path(name)


def local_name(url: str) -> str | None:
    """Return the path of a local URL as a string, else None; much faster than `local_path`."""
    if not is_local(url):
        return None
    if url.startswith("file:") and not url.startswith("file://"):
        raise ValueError(f"{url}: two slashes follow the protocol: file:///path")
    path = url.removeprefix("file://")
    return str(Path(path).expanduser()) if path.startswith("~") else path


def absolute(url: str) -> str:
    """Return the URL with a local path made absolute, for use by other processes."""
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
    """Return the object's bytes, or those of the range [start, end) as far as the object goes.

    Args:
        stop: if set, a read raises `Cancelled` instead of retrying.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: as `retry.retry`.
    """
    path = hub.local_file(url) if _scheme(url) == hub.SCHEME else local_path(url)
    if path is not None:
        with open(path, "rb") as file:
            file.seek(start or 0)
            return file.read() if end is None else file.read(end - (start or 0))
    if _scheme(url) in _S3:
        return _S3Object(url, endpoint_url, stop).read(start or 0, end)
    return _request(url, endpoint_url, lambda files, key: bytes(files.cat_file(key, start=start, end=end)), stop)


@dataclass(frozen=True)
class _Block:
    """A range of an object's bytes."""

    data: bytes
    object_bytes: int
    """size of the whole object"""
    tag: str
    """ETag of the object's version"""


class _S3Object:
    """An S3 object that is read in blocks, several in parallel."""

    def __init__(self, url: str, endpoint_url: str | None, stop: threading.Event | None) -> None:
        check_url(url, endpoint_url)
        self._name = redact(url)
        self._bucket, _, self._key = url.partition("://")[2].partition("/")
        self._endpoint_url = endpoint_url
        self._renewal = functools.partial(_renewal, url, endpoint_url)
        self._stop = stop

    def read(self, start: int, end: int | None) -> bytes:
        blocks = []
        if end is None:
            blocks = [self._block(start, start + BLOCK_BYTES)]  # its response has the size of the object
            start, end = start + BLOCK_BYTES, blocks[0].object_bytes
        starts = range(start, end, BLOCK_BYTES)
        if len(starts) > 1:
            with ThreadPoolExecutor(min(_BLOCKS_IN_FLIGHT, len(starts)), "block") as pool:
                blocks += pool.map(lambda at: self._block(at, min(at + BLOCK_BYTES, end)), starts)
        else:
            blocks += [self._block(at, end) for at in starts]
        if len({block.tag for block in blocks if block.data}) > 1:
            raise OSError(f"{self._name}: the object was overwritten while it was read; read it again")
        return blocks[0].data if len(blocks) == 1 else b"".join(block.data for block in blocks)

    def _block(self, start: int, end: int) -> _Block:
        return retry(lambda: self._get(start, end), self._name, self._stop, self._renewal())

    def _get(self, start: int, end: int) -> _Block:
        from botocore.exceptions import ClientError

        if start >= end:
            return _Block(b"", 0, "")
        try:
            client = _s3_client(self._endpoint_url, _identity())
            response = client.get_object(Bucket=self._bucket, Key=self._key, Range=f"bytes={start}-{end - 1}")
        except ClientError as error:
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 416:
                return _Block(b"", 0, "")  # the object ends before this range
            raise
        data: bytes = response["Body"].read()
        tag = str(response.get("ETag", ""))
        if "ContentRange" not in response:  # a store without range requests sends everything
            return _Block(data[start:end], len(data), tag)
        total = int(response["ContentRange"].rpartition("/")[2])
        expected = min(end, total) - start
        if len(data) != expected:
            raise EOFError(f"received {len(data)} bytes instead of {expected}")
        return _Block(data, total, tag)


def write_bytes(url: str, data: bytes | memoryview, *, endpoint_url: str | None = None) -> None:
    """Write the whole object atomically: a reader sees the old bytes or the new ones, never a part."""
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
        except OSError as error:
            error.filename = str(path)  # the error of a full disk names no file, others the temporary one
            raise
        finally:
            temporary.unlink(missing_ok=True)
        return
    body = data if isinstance(data, bytes) else bytes(data)  # clients accept nothing else
    _request(url, endpoint_url, lambda filesystem, key: filesystem.pipe_file(key, body))


def start_event_loop() -> None:
    """Start the thread of all requests but reads; it keeps the priority of the thread that calls this."""
    fsspec.asyn.get_loop()


def start_clients(url: str) -> None:
    """Make the clients of a URL's store, which takes a second or less, so that the first request need not wait."""
    filesystem, _ = _filesystem(url, None)
    if _scheme(url) in _S3:
        filesystem.connect()
        _s3_client(None, _identity())


def exists(url: str, *, endpoint_url: str | None = None) -> bool:
    if _scheme(url) == hub.SCHEME:
        with contextlib.suppress(FileNotFoundError):
            return hub.local_file(url).exists()
        return False
    if (path := local_path(url)) is not None:
        return path.exists()
    return _request(url, endpoint_url, lambda filesystem, key: bool(filesystem.exists(key)))


def size(url: str, *, endpoint_url: str | None = None) -> int:
    if (path := local_path(url)) is not None:
        return path.stat().st_size
    return _request(url, endpoint_url, lambda filesystem, key: int(filesystem.size(key)))


def list_dir(url: str, *, endpoint_url: str | None = None) -> list[str]:
    """Return the sorted names in a folder, without hidden ones; empty if there is no such folder."""
    return sorted(_entries(url, endpoint_url))


def copy_folder(source: str, target: str, last: str) -> None:
    """Copy the files of a folder; file `last`, copied last, makes the copy complete."""
    names = [name for name in list_dir(source) if name != last]
    for name in [*names, last]:
        write_bytes(join(target, name), read_bytes(join(source, name)))


def list_files_and_folders(url: str, *, endpoint_url: str | None = None) -> tuple[list[str], list[str]]:
    """Return the sorted names of the files and of the folders in a folder, without hidden ones.

    In a store a name can be both.
    """
    entries = _entries(url, endpoint_url)
    files, folders = (sorted(n for n in entries if kind in entries[n]) for kind in ("file", "directory"))
    return files, folders


def _entries(url: str, endpoint_url: str | None) -> dict[str, set[str]]:
    """Return the kinds, "file" and "directory", of each name in a folder."""
    path = local_path(url)
    if path is not None:
        found = path.iterdir() if path.is_dir() else ()
        return {p.name: {"directory" if p.is_dir() else "file"} for p in found if not p.name.startswith(".")}
    try:
        key, listed = _request(
            url, endpoint_url, lambda filesystem, key: (key.rstrip("/"), filesystem.ls(key, detail=True))
        )
    except FileNotFoundError:
        return {}
    entries: dict[str, set[str]] = {}
    for entry in listed:
        inside, _, name = str(entry["name"]).partition(key + "/")
        if not inside and name.rstrip("/") and not name.startswith(".") and "/" not in name.rstrip("/"):
            folder = entry["type"] == "directory" or name.endswith("/")
            entries.setdefault(name.rstrip("/"), set()).add("directory" if folder else "file")
    return entries


def remove(url: str, *, endpoint_url: str | None = None) -> None:
    """Remove an object, or a folder with its content, if it exists."""
    path = local_path(url)
    if path is not None:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return
    if exists(url, endpoint_url=endpoint_url):
        with contextlib.suppress(FileNotFoundError):  # removed by an earlier attempt
            _request(url, endpoint_url, _remove)


def _remove(filesystem: Any, key: str) -> None:
    if not glob.has_magic(key):
        filesystem.rm(key, recursive=True)
        return
    for name in filesystem.find(key):  # rm() takes the name for a pattern
        filesystem.rm_file(name)


def read_json(url: str, *, endpoint_url: str | None = None) -> Any:
    """Parse an object as JSON; raises ValueError that names the URL if it is not JSON."""
    try:
        return json.loads(read_bytes(url, endpoint_url=endpoint_url))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{redact(url)}: not JSON: {error}") from None


def read_json_if_present(url: str) -> Any:
    """Return `read_json` of an object, or None if there is none; one request, where `exists` would be another."""
    try:
        return read_json(url)
    except (FileNotFoundError, NotADirectoryError):
        return None


def write_json(url: str, value: Any, *, endpoint_url: str | None = None) -> None:
    write_bytes(url, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(), endpoint_url=endpoint_url)


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
