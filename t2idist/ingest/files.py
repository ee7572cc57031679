"""Names and lines of the user's files, on disk or in an object store, read so that none of them can do harm."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from t2idist import storage
from t2idist.data.sample_format import MAX_FILE_BYTES

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_LINE_BYTES = 16 << 20
_BLOCK_BYTES = 8 << 20
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_UNPRINTABLE = re.compile(r"[\x00-\x1f]")
_KNOWN = (*PICTURES, ".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".pickle", ".pkl", ".md", ".zip", ".tar")


def is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURES)


def is_unsafe(name: str) -> bool:
    """Whether a name from an annotation could leave its folder: absolute, with "..", a URL, or unprintable."""
    parts = name.replace("\\", "/").split("/")
    nowhere = not set(parts) - {"", "."}
    return nowhere or not parts[0] or ".." in parts or bool(_SCHEME.match(name)) or bool(_UNPRINTABLE.search(name))


def walk(url: str) -> Iterator[str]:
    """Relative names of all files below a folder, in an order that does not depend on the file system.

    Hidden names are passed over, and links to folders are not followed.
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


def read_limited(url: str, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The file's bytes; raises OverflowError, with its size, before a larger one is read."""
    name = storage.local_name(url)
    if name is None:
        _check_size(storage.size(url), max_bytes)
        return storage.read_bytes(url)
    with open(name, "rb", buffering=0) as file:  # one system call for each thing to do: there may be millions of files
        _check_size(os.fstat(file.fileno()).st_size, max_bytes)
        return file.readall()


def _check_size(size_bytes: int, max_bytes: int) -> None:
    if size_bytes > max_bytes:
        raise OverflowError(f"{size_bytes} bytes; at most {max_bytes}")


def lines(url: str) -> Iterator[tuple[int, bytes]]:
    """Numbers (from 1) and bytes of the file's lines, ends kept; memory does not grow with the file.

    A line of more than MAX_LINE_BYTES comes cut, with a NUL byte as its last. Raises ValueError for a missing file.
    """
    for number, line in enumerate(_raw_lines(url), start=1):
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _raw_lines(url: str) -> Iterator[bytes]:
    rest = b""
    cut = False
    for block in _blocks(url):
        pieces = block.split(b"\n")
        pieces[0] = rest + pieces[0]
        for piece in pieces[:-1]:
            yield piece[:MAX_LINE_BYTES] + b"\0\n" if cut or len(piece) > MAX_LINE_BYTES else piece + b"\n"
            cut = False
        cut, rest = cut or len(pieces[-1]) > MAX_LINE_BYTES, pieces[-1][: MAX_LINE_BYTES + 1]
    if rest:
        yield rest + b"\0" if cut else rest


def _blocks(url: str) -> Iterator[bytes]:
    size_bytes = size_of(url)
    for start in range(0, size_bytes, _BLOCK_BYTES):
        yield storage.read_bytes(url, start, min(size_bytes, start + _BLOCK_BYTES))


def size_of(url: str) -> int:
    """Raises ValueError, naming the file, where it is missing."""
    try:
        return storage.size(url)
    except FileNotFoundError:
        raise ValueError(f"{storage.redact(url)}: no such file") from None


def first_existing(candidates: list[str], what: str) -> str:
    """The first URL at which there is something; raises ValueError that names all that were tried."""
    for url in candidates:
        if storage.exists(url):
            return url
    tried = ", ".join(storage.redact(url) for url in candidates)
    raise ValueError(f"{what} was not found; looked for {tried}")
