"""Safe access to user files, on disk or in an object store."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

from t2idist import storage
from t2idist.data.sample_format import MAX_FILE_BYTES
from t2idist.data.shards import DESCRIPTION, MANIFEST
from t2idist.data.text_files import blocks_to_utf8, to_utf8, undecodable

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CAPTION_SUFFIXES = (".txt", ".caption")
"""Of files with captions beside the images. In this order: an image with both takes the first."""
MAX_LINE_BYTES = 16 << 20
PROGRESS = "progress"
"""Folder in an unfinished shard set."""
SHARD_NAME = re.compile(r"[A-Za-z0-9_-]+-\d{5}\.tar")
_BLOCK_BYTES = 8 << 20
_NAMED = 12
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_UNPRINTABLE = re.compile(r"[\x00-\x1f]")
_ENCODING: ContextVar[str | None] = ContextVar("encoding", default=None)


class UndecodableText(ValueError):
    """Text has a byte that is not of its encoding; the message names both."""


@contextlib.contextmanager
def text_encoding(encoding: str | None) -> Iterator[None]:
    """Read text files in this encoding (None: as they say themselves) within the block, in this thread."""
    token = _ENCODING.set(encoding)
    try:
        yield
    finally:
        _ENCODING.reset(token)


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_unsafe(name: str) -> bool:
    """Check whether a name from an annotation could leave its folder: absolute, with "..", a URL, or unprintable."""
    parts = name.replace("\\", "/").split("/")
    empty = not set(parts) - {"", "."}
    return empty or not parts[0] or ".." in parts or bool(_SCHEME.match(name)) or bool(_UNPRINTABLE.search(name))


def walk(url: str, skipped: list[str] | None = None) -> Iterator[str]:
    """Yield the relative names of all files below a folder, in an order that is the same on disk and in a store.

    Hidden names are skipped; links to folders are not followed. Shard sets of this package below the folder are
    skipped, and so is what an interrupted run left in the folder itself: they are output, perhaps of this command.

    Args:
        skipped: gets the names of the folders with shard sets.
    """
    skipped = [] if skipped is None else skipped
    root = storage.local_path(url)
    if root is None:
        yield from _walk_store(url, "", skipped)
        return
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = os.path.relpath(folder, root)
        below = "" if below == "." else f"{below}/"
        visible = sorted(name for name in names if not name.startswith("."))
        yield from (f"{below}{name}" for name in _inputs(below, visible, folders, skipped))


def _walk_store(url: str, below: str, skipped: list[str]) -> Iterator[str]:
    files, folders = storage.list_files_and_folders(storage.join(url, below) if below else url)
    yield from (f"{below}{name}" for name in _inputs(below, files, folders, skipped))
    for name in folders:
        yield from _walk_store(url, f"{below}{name}/", skipped)


def _inputs(below: str, files: list[str], folders: list[str], skipped: list[str]) -> list[str]:
    """Return the files of one folder that are not of a shard set; remove the folders that are."""
    shards = {name for name in files if SHARD_NAME.fullmatch(name)}
    unfinished = bool(shards) and PROGRESS in folders
    if not unfinished and not (below and shards and {DESCRIPTION, MANIFEST} <= set(files)):
        return files
    skipped.append(below or ".")
    if below:
        folders.clear()
        return []
    folders.remove(PROGRESS)
    return [name for name in files if name not in (*shards, DESCRIPTION, MANIFEST)]


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

    The bytes are UTF-8, whatever the encoding of the file; those that are no text are invalid UTF-8.

    Lines end in LF or CRLF, or in CR if the first 8 MiB contain no LF.

    Lines longer than MAX_LINE_BYTES are cut and end in a NUL byte. Raises ValueError if the file is missing.
    """
    yield from enumerate(_raw_lines(url), start=1)


def text_of_line(line: bytes) -> str:
    """Decode a line of `read_lines`. Raises UndecodableText."""
    if (problem := undecodable(line, _ENCODING.get())) is not None:
        raise UndecodableText(problem)
    return line.decode()


def text_lines(data: bytes, encoding: str | None = None) -> list[bytes]:
    """Return the lines of a text file as UTF-8, without line ends. `encoding`: instead of that of `text_encoding`."""
    return to_utf8(data, encoding or _ENCODING.get()).rstrip().splitlines()


def text_of_file(data: bytes) -> str:
    """Decode the content of a text file. Raises UndecodableText."""
    return text_of_line(to_utf8(data, _ENCODING.get()))


def undecodable_part(texts: Iterable[str]) -> str | None:
    """Say which byte of the first text is not of its encoding in which surrogates stand for bytes; None if all are."""
    problems = (undecodable(text, _ENCODING.get()) for text in texts)
    return next((problem for problem in problems if problem is not None), None)


def _raw_lines(url: str) -> Iterator[bytes]:
    rest = b""
    cut = False
    end = b""
    for block in blocks_to_utf8(_blocks(url), _ENCODING.get()):
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


def first_existing(candidates: list[str], description: str, root: str | None = None) -> str:
    """Return the first URL that exists. Raises ValueError that lists the URLs, and what is in `root`, if none does."""
    for url in candidates:
        if storage.exists(url):
            return url
    tried = ", ".join(storage.redact(url) for url in candidates)
    held = "" if root is None else f"; {_describe_folder(root)}"
    raise ValueError(f"{description} was not found; tried {tried}{held}")


def _describe_folder(root: str) -> str:
    names = storage.list_dir(root)
    if not names:
        return f"{storage.redact(root)} is empty or missing"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{storage.redact(root)} holds {', '.join(names[:_NAMED])}{more}"
