"""The progress bar of every command but training: on stderr, with the time left."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO, TypeVar

import tqdm.auto
import tqdm.std

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 30.0


class ProgressBar:
    """Shows progress: a bar on a terminal and in a notebook, elsewhere a line every 30 seconds.

    A bar is removed when its block ends. Nothing is ever written to stdout.

    Args:
        stream: where to write, stderr by default.
        unit: what is counted, in the singular.
    """

    def __init__(
        self, stream: TextIO | None = None, unit: str = "image", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream, self._unit, self._clock = sys.stderr if stream is None else stream, unit, clock
        self._bar: Any = None
        self._first: int | None = None
        self._started: tuple[float, int] | None = None
        self._last_line = 0.0

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, done: int, total: int, shards: int = 0) -> None:
        """Show `done` of `total`, and the number of shards stored, if any."""
        now = self._clock()
        if self._first is None:
            self._first = done
            self._last_line = now
            self._bar = self._open(done, total)
        if self._started is None and done > self._first:  # the rate excludes the time before the first one
            self._started = (now, done)
        if self._bar is not None:
            if shards:
                self._bar.set_postfix_str(f"{shards} shards", refresh=False)
            self._bar.update(done - self._bar.n)
        elif self._started is not None and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            print(self._line(done, total, shards, now), file=self._stream, flush=True)

    def _open(self, done: int, total: int) -> Any:
        """Return a bar; None where one would be drawn into a file or pipe."""
        settings: dict[str, Any] = {"total": total, "initial": done, "unit": self._unit, "leave": False}
        if in_notebook():
            return tqdm.auto.tqdm(**settings)  # text if ipywidgets is not installed
        if self._stream.isatty():
            return tqdm.std.tqdm(**settings, file=self._stream, dynamic_ncols=True)
        return None

    def _line(self, done: int, total: int, shards: int, now: float) -> str:
        assert self._started is not None
        seconds, count = now - self._started[0], done - self._started[1]
        rate = count / seconds if seconds > 0 else 0.0
        left = f"{tqdm.std.tqdm.format_interval((total - done) / rate)} left" if rate else "time left not known"
        stored = f"{shards} shards, " if shards else ""
        return f"{done} of {total} {self._unit}s, {rate:.3g} {self._unit}s/s, {stored}{left}"


def in_notebook() -> bool:
    """Return whether this process runs the cells of a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and "IPKernelApp" in shell.config


@contextlib.contextmanager
def track(items: Sequence[T], unit: str) -> Iterator[Iterator[T]]:
    """Give an iterator over the items that shows how many are done. A single item has no bar."""
    with ProgressBar(unit=unit) as bar:
        yield _tracked(items, bar if len(items) > 1 else None)


def _tracked(items: Sequence[T], bar: ProgressBar | None) -> Iterator[T]:
    for done, item in enumerate(items):
        if bar is not None:
            bar.update(done, len(items))
        yield item
    if bar is not None:
        bar.update(len(items), len(items))
