"""Reasons for rejecting or repairing an image or a caption, as rejected.jsonl lists them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import StrEnum

from t2idist.data.reasons import Reason as Reason


class Effect(StrEnum):
    """What was done about a problem. The values are stored in rejected.jsonl and dataset.json."""

    EXCLUDED = "left out"
    REPAIRED = "repaired"
    CAPTION_EXCLUDED = "caption left out"


@dataclass(frozen=True)
class Reject:
    """One line of rejected.jsonl."""

    split: str
    name: str
    """Name of the image, or the annotation file and line."""
    reason: Reason
    effect: Effect
    detail: str = ""

    def as_json(self) -> str:
        printable = {key: _printable(str(value)) for key, value in asdict(self).items()}
        return json.dumps(printable, ensure_ascii=False)

    def __str__(self) -> str:
        return f"{_printable(self.name)}: {self.reason}, {self.effect}{': ' if self.detail else ''}{self.detail}"


def _printable(text: str) -> str:
    """Escape surrogates, which stand for bytes that are not UTF-8; at most 300 characters."""
    return text[:300].encode("utf-8", "backslashreplace").decode()
