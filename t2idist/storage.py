"""Every byte to and from local disk or an object store: the only file on fsspec.

URLs are fsspec's (``s3://bucket/key``, ``memory://x``, ``gs://``...) or plain local paths. Credentials come from the
usual environment and files and are never taken from, or written to, a URL or a config. `endpoint_url` is the address
of an S3 service other than the environment's; local paths ignore it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from pathlib import Path
from typing import Any

import fsspec

REFUSED = ("pipe", "simplecache", "filecache", "blockcache", "shell", "python")
"""Protocols that would run a program, or that chain to another URL behind the reader's back."""

_SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]*)(::|://|:(?!\\))")


def _scheme(url: str) -> str:
    found = _SCHEME.match(url)
    return found.group(1).lower() if found else ""


def _filesystem(url: str, endpoint_url: str | None = None) -> tuple[Any, str]:
    scheme = _scheme(url)
    options = {}
    if endpoint_url is not None and scheme not in ("", "file"):
        check_endpoint(endpoint_url)
        if scheme not in ("s3", "s3a"):
            raise ValueError(f"{redact(url)}: an endpoint URL goes with s3:// only, not with {scheme}://")
        options = {"endpoint_url": endpoint_url}
    if scheme in REFUSED or "::" in url:
        raise ValueError(
            f"{redact(url)}: the protocol '{scheme}' is not allowed; give a local path or an object store URL"
        )
    if re.search(r"://[^/]*@", url):
        raise ValueError(
            f"{redact(url)}: credentials do not belong in a URL; use the environment or the store's own files"
        )
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **options)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{redact(url)}: no way to open this URL: {error}") from None
    if scheme not in ("", "file", "memory"):
        filesystem.invalidate_cache()
    return filesystem, path


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
    if not is_local(url):
        return None
    return Path(url.removeprefix("file://")).expanduser()


def absolute(url: str) -> str:
    """The URL as another process would need it: local paths made absolute."""
    path = local_path(url)
    return url if path is None else str(path.resolve())


def join(base: str, *parts: str) -> str:
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


def read_bytes(url: str, start: int | None = None, end: int | None = None, *, endpoint_url: str | None = None) -> bytes:
    """The object's bytes, or those of the range [start, end). Raises FileNotFoundError when it is not there."""
    path = local_path(url)
    if path is not None:
        with open(path, "rb") as file:
            file.seek(start or 0)
            return file.read() if end is None else file.read(end - (start or 0))
    filesystem, key = _filesystem(url, endpoint_url)
    data: bytes = filesystem.cat_file(key, start=start, end=end)
    return data


def write_bytes(url: str, data: bytes, *, endpoint_url: str | None = None) -> None:
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
    filesystem.pipe_file(key, data)


def exists(url: str, *, endpoint_url: str | None = None) -> bool:
    path = local_path(url)
    if path is not None:
        return path.exists()
    filesystem, key = _filesystem(url, endpoint_url)
    return bool(filesystem.exists(key))


def size(url: str, *, endpoint_url: str | None = None) -> int:
    path = local_path(url)
    if path is not None:
        return path.stat().st_size
    filesystem, key = _filesystem(url, endpoint_url)
    return int(filesystem.size(key))


def list_dir(url: str, *, endpoint_url: str | None = None) -> list[str]:
    """Names in a folder, sorted; empty when there is no such folder."""
    path = local_path(url)
    if path is not None:
        return sorted(p.name for p in path.iterdir() if not p.name.startswith(".")) if path.is_dir() else []
    filesystem, key = _filesystem(url, endpoint_url)
    try:
        entries = filesystem.ls(key, detail=False)
    except FileNotFoundError:
        return []
    return sorted({str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries} - {"", key.rsplit("/", 1)[-1]})


def remove(url: str, *, endpoint_url: str | None = None) -> None:
    """Remove an object, or a folder with all in it; nothing happens when it is not there."""
    filesystem, key = _filesystem(url, endpoint_url)
    if filesystem.exists(key):
        filesystem.rm(key, recursive=True)


def read_json(url: str, *, endpoint_url: str | None = None) -> Any:
    """Raises ValueError, naming the URL, where the object is not JSON."""
    try:
        return json.loads(read_bytes(url, endpoint_url=endpoint_url))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{redact(url)}: not JSON: {error}") from None


def write_json(url: str, value: Any, *, endpoint_url: str | None = None) -> None:
    write_bytes(url, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(), endpoint_url=endpoint_url)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
