"""The folders of a stage's checkpoints: their names, commit markers and parts.

Without torch: drivers and status pages read checkpoints too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from t2idist import storage

COMMIT = "commit.json"
"""The commit marker, written last: a folder without it is not a checkpoint."""
FORMAT = 1
"""Version of the commit marker."""
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
"""Tensor types of a checkpoint: PyTorch's name to that of safetensors."""
_DIGITS = 12


class CorruptCheckpoint(ValueError):
    """A checkpoint is incomplete, damaged, or in another format; the message names the file."""


def folder_name(images: int, attempt: str) -> str:
    """Return the folder name of an attempt's checkpoint after `images` images."""
    return f"{images:0{_DIGITS}d}-{attempt}"


def images_of(folder: str) -> int:
    """Return the images seen at the checkpoint in a folder with this name."""
    return int(folder[:_DIGITS])


def list_folders(url: str) -> list[str]:
    """Return the names of checkpoint folders, newest first, complete or not."""
    return sorted((name for name in storage.list_dir(url) if name[:_DIGITS].isdigit()), reverse=True)


def is_committed(url: str, folder: str) -> bool:
    return storage.exists(storage.join(url, folder, COMMIT))


def list_committed(url: str) -> list[str]:
    """Return the names of the folders of complete checkpoints, newest first."""
    return [folder for folder in list_folders(url) if is_committed(url, folder)]


def milestones_of(images: Sequence[int], every_images: int) -> set[int]:
    """Return the image count of the first checkpoint at or after each multiple of `every_images`."""
    firsts: dict[int, int] = {}
    for count in sorted(images):
        firsts.setdefault(count // every_images, count)
    return {count for multiple, count in firsts.items() if multiple > 0}


def read_marker(url: str) -> dict[str, Any]:
    """Read the commit marker of a checkpoint. Raises `CorruptCheckpoint`."""
    marker_url = storage.join(url, COMMIT)
    try:
        marker = storage.read_json(marker_url)
        if marker["format"] != FORMAT:
            raise CorruptCheckpoint(f"{marker_url}: format {marker['format']}; this version reads {FORMAT}")
        if not all(
            tensor["dtype"] in TYPES and tensor["file"] in marker["files"] for tensor in marker["tensors"].values()
        ):
            raise CorruptCheckpoint(f"{marker_url}: names an unknown tensor type or file")
    except CorruptCheckpoint:
        raise
    except FileNotFoundError:
        raise CorruptCheckpoint(f"{marker_url}: missing; the checkpoint was never completed") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(f"{marker_url}: not a commit marker: {error}") from None
    return dict(marker)


def read_part(url: str, name: str, expected: dict[str, Any]) -> bytes:
    """Return the bytes of a part after checking size and hash. Raises `CorruptCheckpoint`."""
    part_url = storage.join(url, name)
    try:
        data = storage.read_bytes(part_url)
    except FileNotFoundError:
        raise CorruptCheckpoint(f"{part_url}: missing") from None
    if len(data) != expected["bytes"]:
        raise CorruptCheckpoint(f"{part_url}: {len(data)} bytes; {expected['bytes']} were written")
    if storage.sha256(data) != expected["sha256"]:
        raise CorruptCheckpoint(f"{part_url}: its content changed since it was written (sha256 differs)")
    return data
