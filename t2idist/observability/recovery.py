"""The record of a restart: its cause, the seconds of its phases, and the images that were repeated."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

WORKER_LOST, WORKER_SILENT, WORKER_FAILED = "worker lost", "worker does not respond", "worker failed"
RESIZE, SUBMITTED_AGAIN, CONTROLLER_FAILED = "resize", "submitted again", "controller failed"
PHASES = ("end", "start", "restore")
"""From the notice, or the last step before a resize, to the end of the old workers (0 in a new submission); to the
start of the new ones (in a new submission, from the start of its command); to the end of their first step."""


@dataclass
class Recovery:
    """A restart of the workers, or of the whole run by a new submission."""

    cause: str
    seconds: dict[str, float]
    """By phase."""
    images_repeated: int = 0
    """According to the last progress message before."""
    _started: float = field(default_factory=time.monotonic)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _started=time.monotonic())  # clocks of two machines differ

    @property
    def is_finished(self) -> bool:
        """Whether the first step is done."""
        return "restore" in self.seconds

    def finish(self) -> None:
        """Record the end of the first step."""
        self.seconds["restore"] = time.monotonic() - self._started

    def describe(self) -> dict[str, Any]:
        """Return the record for files and progress messages."""
        seconds = {phase: round(value, 2) for phase, value in self.seconds.items()}
        return {"cause": self.cause, "seconds": seconds, "images_repeated": self.images_repeated}


def format_recovery(record: dict[str, Any] | None) -> str:
    """Describe a record of `Recovery.describe` in one line; empty if there is none."""
    if not record:
        return ""
    total = sum(record["seconds"].values())
    phases = ", ".join(f"{phase} {record['seconds'][phase]:.1f}" for phase in PHASES if phase in record["seconds"])
    return f"{record['cause']}, {total:.1f} s ({phases}), {record['images_repeated']:,} images repeated"
