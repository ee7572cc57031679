"""Scores that a folder already has: those of the same protocol are completed, those of another one are kept aside."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from t2idist import storage

SCORES_FILE = "scores.json"
FOLDER = "earlier"
_SHEETS = ("worst.png", "best.png", "nearest.png")
_MAY_DIFFER = ("export", "captions_per_image")
"""Keys of the protocol that are not compared: its hash identifies the export, and n the captions of an image."""


def set_aside(folder: str, protocol: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, str | None]:
    """Copy the scores and sheets in a folder to a folder of their own below it, if their protocol is another one.

    Returns:
        The scores of the same protocol, if there are any; the folder of the copy, if one was made.
    """
    names = set(storage.list_dir(folder))
    earlier = _read(folder) if SCORES_FILE in names else None
    if earlier is not None and not _differ(earlier["protocol"], protocol):
        return earlier, None
    files = [name for name in (*_SHEETS, SCORES_FILE) if name in names]
    if not files:
        return None, None
    numbered = (storage.join(folder, f"{FOLDER}-{number}") for number in itertools.count(1))
    copy = next(url for url in numbered if not storage.list_dir(url))
    for name in files:
        storage.write_bytes(storage.join(copy, name), storage.read_bytes(storage.join(folder, name)))
    return None, copy


def merge(earlier: Mapping[str, Any] | None, result: dict[str, Any]) -> dict[str, Any]:
    """Add what earlier scores of the same protocol have and the new ones do not."""
    if earlier is None:
        return result
    measured = {row["name"] for row in result["scores"]}
    kept = [row for row in earlier["scores"] if row["name"] not in measured]
    return {
        **result,
        "scores": [*kept, *result["scores"]],
        "breakdown": result["breakdown"] or earlier.get("breakdown", {}),
        "sheets": {**earlier.get("sheets", {}), **result["sheets"]},
    }


def keep_rows(folder: str, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Copy the file of rows that a tool wrote to a run folder, if it is about to write others; returns its copy."""
    names = set(storage.list_dir(folder))
    if SCORES_FILE not in names:
        return None
    data = storage.read_bytes(storage.join(folder, SCORES_FILE))
    try:
        if json.loads(data) == [dict(row) for row in rows]:
            return None
    except ValueError:
        pass
    name = next(name for number in itertools.count(1) if (name := f"scores-{number}.json") not in names)
    storage.write_bytes(storage.join(folder, name), data)
    return storage.join(folder, name)


def _read(folder: str) -> dict[str, Any] | None:
    """Return the scores in a folder; None if its file is something else."""
    try:
        content = storage.read_json(storage.join(folder, SCORES_FILE))
    except ValueError:
        return None
    if not isinstance(content, dict) or not isinstance(content.get("protocol"), dict):
        return None
    return content if isinstance(content.get("scores"), list) else None


def _differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return any(one.get(key) != other.get(key) for key in {*one, *other} - {*_MAY_DIFFER})
