"""Safe access to user files, on disk or in an object store."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from t2idist import storage
from t2idist.data.sample_format import MAX_FILE_BYTES

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_LINE_BYTES = 16 << 20
_BLOCK_BYTES = 8 << 20
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_UNPRINTABLE = re.compile(r"[\x00-\x1f]")
_KNOWN = (
    *IMAGE_SUFFIXES,
    ".txt",
    ".caption",
    ".json",
    ".jsonl",
    ".csv",
    ".tsv",
    ".parquet",
    ".pickle",
    ".pkl",
    ".md",
    ".zip",
    ".tar",
)


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_unsafe(name: str) -> bool:
    """Check whether a name from an annotation could leave its folder: absolute, with "..", a URL, or unprintable."""
    parts = name.replace("\\", "/").split("/")
    empty = not set(parts) - {"", "."}
    return empty or not parts[0] or ".." in parts or bool(_SCHEME.match(name)) or bool(_UNPRINTABLE.search(name))


def walk(url: str) -> Iterator[str]:
    """Yield the relative names of all files below a folder, in an order that does not depend on the file system.

    Hidden names are skipped; links to folders are not followed.
    """
    root = storage.local_path(url)
    if root is None:
        yield from _walk_store(url, "")
        return
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = os.path.relpath(folder, root)
        for name in sorted(names):
            if not name.startswith("."):
                yield name if below == "." else f"{below}/{name}"


def _walk_store(url: str, below: str) -> Iterator[str]:
    for name in storage.list_dir(storage.join(url, below) if below else url):
        if name.startswith("."):
            continue
        path = f"{below}/{name}" if below else name
        inside = [] if name.lower().endswith(_KNOWN) else storage.list_dir(storage.join(url, path))
        if inside:
            yield from _walk_store(url, path)
        else:
            yield path


@dataclass(frozen=True)
class ByteRange:
    """A part of a file, in bytes."""

    start: int
    length: int


def read_limited(url: str, max_bytes: int = MAX_FILE_BYTES, part: ByteRange | None = None) -> bytes:
    """Read a file, or a part of it. Raises OverflowError, with the size, if that is larger than `max_bytes`."""
    if part is not None:
        _check_size(part.length, max_bytes)
        return storage.read_bytes(url, part.start, part.start + part.length) if part.length else b""
    name = storage.local_name(url)
    if name is None:
        _check_size(storage.size(url), max_bytes)
        return storage.read_bytes(url)
    with open(name, "rb", buffering=0) as file:  # few system calls: there may be millions of files
        _check_size(os.fstat(file.fileno()).st_size, max_bytes)
        return file.readall()


def _check_size(size_bytes: int, max_bytes: int) -> None:
    if size_bytes > max_bytes:
        raise OverflowError(f"{size_bytes} bytes; at most {max_bytes}")


def read_lines(url: str) -> Iterator[tuple[int, bytes]]:
    """Yield the number (from 1) and the bytes of each line, line ends included, in constant memory.

    Lines end in LF or CRLF, or in CR if the first 8 MiB contain no LF.

    Lines longer than MAX_LINE_BYTES are cut and end in a NUL byte. Raises ValueError if the file is missing.
    """
    for number, line in enumerate(_raw_lines(url), start=1):
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _raw_lines(url: str) -> Iterator[bytes]:
    rest = b""
    cut = False
    end = b""
    for block in _blocks(url):
        end = end or (b"\r" if b"\r" in block[:-1] and b"\n" not in block else b"\n")
        parts = block.split(end)
        parts[0] = rest + parts[0]
        for line in parts[:-1]:
            yield line[:MAX_LINE_BYTES] + b"\0" + end if cut or len(line) > MAX_LINE_BYTES else line + end
            cut = False
        cut, rest = cut or len(parts[-1]) > MAX_LINE_BYTES, parts[-1][: MAX_LINE_BYTES + 1]
    if rest:
        yield rest + b"\0" if cut else rest


def _blocks(url: str) -> Iterator[bytes]:
    size_bytes = file_size(url)
    for start in range(0, size_bytes, _BLOCK_BYTES):
        yield storage.read_bytes(url, start, min(size_bytes, start + _BLOCK_BYTES))


def file_size(url: str) -> int:
    """Return the size of a file in bytes. Raises ValueError if it is missing."""
    try:
        return storage.size(url)
    except FileNotFoundError:
        raise ValueError(f"{storage.redact(url)}: no such file") from None


def first_existing(candidates: list[str], description: str) -> str:
    """Return the first URL that exists. Raises ValueError that lists the URLs if there is none."""
    for url in candidates:
        if storage.exists(url):
            return url
    tried = ", ".join(storage.redact(url) for url in candidates)
    raise ValueError(f"{description} was not found; tried {tried}")
