"""The folders of a stage's checkpoints: how they are called, which of them are whole, and what is read of them.

Without torch: drivers and status pages look here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from t2idist import storage

COMMIT = "commit.json"
"""Written last: a folder without it is no checkpoint."""
FORMAT = 1
"""Of the commit marker."""
TYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "bool": "BOOL",
}
"""Tensor types that a checkpoint may hold: torch's names, and what safetensors calls them."""
_DIGITS = 12


class CorruptCheckpoint(ValueError):
    """A checkpoint that is torn, rotten, or not one of ours; the message names the file."""


def folder_name(images: int, attempt: str) -> str:
    """Of the checkpoint that an attempt made after so many images."""
    return f"{images:0{_DIGITS}d}-{attempt}"


def images_of(folder: str) -> int:
    """Images seen at the checkpoint in a folder of this name."""
    return int(folder[:_DIGITS])


def list_folders(url: str) -> list[str]:
    """Names of checkpoint folders, newest first, complete or not."""
    return sorted((name for name in storage.list_dir(url) if name[:_DIGITS].isdigit()), reverse=True)


def is_committed(url: str, folder: str) -> bool:
    return storage.exists(storage.join(url, folder, COMMIT))


def list_committed(url: str) -> list[str]:
    """Names of the folders of whole checkpoints, newest first."""
    return [folder for folder in list_folders(url) if is_committed(url, folder)]


def milestones_of(images: Sequence[int], every_images: int) -> set[int]:
    """Of checkpoints at these numbers of images, the first at or after each multiple of `every_images`."""
    found: dict[int, int] = {}
    for number in sorted(images):
        found.setdefault(number // every_images, number)
    return {number for multiple, number in found.items() if multiple > 0}


def read_marker(url: str) -> dict[str, Any]:
    """The commit marker of a checkpoint. Raises `CorruptCheckpoint`."""
    where = storage.join(url, COMMIT)
    try:
        marker = storage.read_json(where)
        if marker["format"] != FORMAT:
            raise CorruptCheckpoint(f"{where}: format {marker['format']}; this version reads {FORMAT}")
        if not all(
            tensor["dtype"] in TYPES and tensor["file"] in marker["files"] for tensor in marker["tensors"].values()
        ):
            raise CorruptCheckpoint(f"{where}: names a tensor type or a file that it does not describe")
    except CorruptCheckpoint:
        raise
    except FileNotFoundError:
        raise CorruptCheckpoint(f"{where}: missing; the checkpoint was never completed") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(f"{where}: not a commit marker: {error}") from None
    return dict(marker)


def read_part(url: str, name: str, expected: dict[str, Any]) -> bytes:
    """The bytes of one file, checked against size and hash. Raises `CorruptCheckpoint`."""
    where = storage.join(url, name)
    try:
        data = storage.read_bytes(where)
    except FileNotFoundError:
        raise CorruptCheckpoint(f"{where}: missing") from None
    if len(data) != expected["bytes"]:
        raise CorruptCheckpoint(f"{where}: {len(data)} bytes; {expected['bytes']} were written")
    if storage.sha256(data) != expected["sha256"]:
        raise CorruptCheckpoint(f"{where}: its bytes changed since they were written (sha256 differs)")
    return data
