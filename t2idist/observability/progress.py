"""The progress line: rewritten in place on a terminal, at most one line every 30 seconds in a log file."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

_OUTCOMES = ("done", "failed", "stopped")
_NOT_LOSSES = ("accuracy", "augmented", "logit", "norm")
"""How the names of the other values that networks report begin."""
_IN_JSON = (
    "time",
    "run",
    "stage",
    "images",
    "budget_images",
    "images_per_second",
    "seconds_left",
    "losses",
    "restarts",
)


def format_duration(seconds: float) -> str:
    """Format seconds: 42s, 8m12s, 3h05m, 2d04h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def format_count(images: float) -> str:
    """Format a number of images: 812, 12.8k, 1.25M."""
    if images < 1000:
        return f"{images:.0f}"
    if images < 999_950:
        return f"{images / 1000:.1f}k"
    return f"{images / 1e6:.2f}M"


def summarize_losses(losses: Mapping[str, float]) -> list[str]:
    """Summarize the losses of a step: the sum for each kind of network, such as "G 1.23".

    "generator/..." become G and "discriminator_64/..." D (averaged over discriminators); other networks keep their
    names. Metrics ("val/...") and settings ("lr/...") are left out.
    """
    by_network: dict[str, float] = {}
    for name, value in losses.items():
        network, slash, part = name.partition("/")
        if network in ("val", "lr", "time", "norm") or (slash and part.startswith(_NOT_LOSSES)):
            continue
        by_network[network] = by_network.get(network, 0.0) + value
    sums: dict[str, list[float]] = {}
    for network, value in by_network.items():
        kind = {"generator": "G", "discriminator": "D"}.get(network.split("_")[0], network)
        sums.setdefault(kind, []).append(value)
    return [f"{kind} {_three_digits(sum(values) / len(values))}" for kind, values in sums.items()]


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


def progress_line(progress: Mapping[str, Any], width: int = 200) -> str:
    """Format the content of progress.json as one line of at most `width` characters.

    Missing values are left out; if `width` is too small, the less important values too.
    """
    head = f"{progress['stage']} {progress['stage_index'] + 1}/{progress['stages']}"
    if progress["state"] in _OUTCOMES:
        head += f"  {progress['state']}"
    images, budget = progress["images"], max(progress["budget_images"], 1)
    parts = [head, f"{100 * images / budget:3.0f}%", f"{format_count(images)}/{format_count(budget)} images"]
    speed = progress.get("images_per_second")
    if speed:
        parts.append(f"{speed:.0f} images/s" if speed >= 10 else f"{speed:.2f} images/s")
    losses = summarize_losses(progress.get("losses") or {})
    parts.append(" ".join(losses))
    left = progress.get("seconds_left")
    parts.append(f"left {format_duration(left)}" if left is not None and progress["state"] not in _OUTCOMES else "")
    parts.append(f"restarts {progress['restarts']}" if "restarts" in progress else "")
    parts.append(f"workers {progress['workers']}" if "workers" in progress else "")
    if progress["state"] not in (*_OUTCOMES, "training"):
        parts.append(str(progress["state"]))
    shown = [p for p in parts if p]
    for part in (" ".join(losses), f"workers {progress.get('workers')}", parts[2]):
        if len("  ".join(shown)) > width and part in shown:
            shown.remove(part)
    return "  ".join(shown)[:width]


class ProgressPrinter:
    """Shows progress on a stream without flooding it.

    On a terminal one line is rewritten in place; elsewhere a line is printed when the stage, the state, the number of
    restarts or of workers changes, and otherwise at most every `every_seconds_log` seconds. With `as_json`, lines are
    JSON objects like those of the log (`logs.JsonFormatter`).
    """

    def __init__(
        self,
        stream: TextIO,
        every_seconds_log: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        columns: Callable[[], int] | None = None,
        as_json: bool = False,
    ) -> None:
        self._stream = stream
        self._every_seconds = every_seconds_log
        self._clock = clock
        self._columns = columns or _terminal_columns
        self._as_json = as_json
        self._terminal = stream.isatty() and not as_json
        self._last_key: tuple[Any, ...] | None = None
        self._last_time = float("-inf")
        self._open_line = False

    def show(self, progress: Mapping[str, Any]) -> None:
        """Show the content of progress.json; may be called at any rate."""
        key = tuple(progress.get(k) for k in ("run", "stage", "state", "restarts", "workers"))
        now = self._clock()
        changed = key != self._last_key
        if self._terminal:
            if self._last_key is not None and key[:2] != self._last_key[:2]:
                self.close()
            width = max(20, self._columns() - 1)
            self._stream.write("\r" + progress_line(progress, width).ljust(width))
            self._open_line = True
        elif changed or now - self._last_time >= self._every_seconds:
            self._stream.write((_json_line(progress) if self._as_json else progress_line(progress)) + "\n")
            self._last_time = now
        self._last_key = key
        self._stream.flush()

    def message(self, text: str) -> None:
        """Print a separate line, which the progress line does not overwrite."""
        self.close()
        self._stream.write((json.dumps({"level": "warning", "message": text}) if self._as_json else text) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """End the line that is rewritten in place."""
        if self._open_line:
            self._stream.write("\n")
            self._stream.flush()
            self._open_line = False


def _json_line(progress: Mapping[str, Any]) -> str:
    facts = {key: progress[key] for key in (*_IN_JSON, "workers", "state") if key in progress}
    return json.dumps({"level": "info", "message": progress_line(progress), "rank": None, **facts}, ensure_ascii=False)


def _terminal_columns() -> int:
    return shutil.get_terminal_size((100, 24)).columns
