"""The folders of a stage's checkpoints: how they are called, and which of them are whole. Without torch."""

from __future__ import annotations

from collections.abc import Sequence

from t2idist import storage

COMMIT = "commit.json"
"""Written last: a folder without it is no checkpoint."""
_DIGITS = 12


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
