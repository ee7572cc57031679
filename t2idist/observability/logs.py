"""Logging of a run's processes: plain lines, or JSON with run, stage, rank and images; secrets are removed."""

from __future__ import annotations

import atexit
import datetime
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|ACCESS_KEY|API_KEY|PRIVATE_KEY", re.IGNORECASE)
_NOT_SECRET = re.compile(r"_(PATH|FILE|FILES|URI|URL|MODE|ID|DIR)$", re.IGNORECASE)
_MIN_SECRET_LENGTH = 8


def redact_secrets(text: str) -> str:
    """Replace the values of environment variables whose names suggest a secret by ``***``."""
    for name, value in os.environ.items():
        if len(value) >= _MIN_SECRET_LENGTH and _SECRET_NAME.search(name) and not _NOT_SECRET.search(name):
            text = text.replace(value, "***")
    return text


@dataclass
class LogContext:
    """What a process works on: fields of its JSON log lines."""

    run: str = ""
    rank: int | None = None
    """Rank of the worker; None: the driver."""
    stage: str = ""
    images: Callable[[], int] | None = None
    """Returns the images seen in the stage; None: not in a stage."""

    def fields(self) -> dict[str, Any]:
        images = None if self.images is None else self.images()
        return {"run": self.run, "stage": self.stage or None, "rank": self.rank, "images": images}


class _RedactSecrets(logging.Filter):
    """Removes secrets from every record."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact_secrets(record.getMessage()), None
        return True


class Repeats:
    """Counts equal messages: the first is said, later ones only as a count, after ten minutes and at the end."""

    EVERY_SECONDS = 600.0
    _KEPT = 1000

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._unsaid: dict[tuple[str, str], tuple[int, float]] = {}

    def count(self, source: str, text: str) -> int:
        """Count a message; return how many of its kind to report now, itself included: 0 if it is to be kept back."""
        with self._lock:
            unsaid, said_at = self._unsaid.get((source, text), (0, None))
            now = self._clock()
            if said_at is None:
                if len(self._unsaid) >= self._KEPT:
                    del self._unsaid[next(iter(self._unsaid))]
            elif now - said_at < self.EVERY_SECONDS:
                self._unsaid[source, text] = (unsaid + 1, said_at)
                return 0
            self._unsaid[source, text] = (0, now)
            return unsaid + 1

    def rest(self) -> list[tuple[str, int]]:
        """Return the texts that were kept back since they were last said, with their counts, and forget these."""
        with self._lock:
            rest = [(text, unsaid) for (_, text), (unsaid, _) in self._unsaid.items() if unsaid]
            self._unsaid = {key: (0, said_at) for key, (_, said_at) in self._unsaid.items()}
            return rest


def with_count(text: str, count: int) -> str:
    return text if count == 1 else f"{text} ({count} times more)"


class _SayOnce(logging.Filter):
    """Keeps back equal warnings of a handler, and says their number at the end of the process."""

    def __init__(self, handler: logging.Handler) -> None:
        super().__init__()
        self._handler = handler
        self._repeats = Repeats()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING or record.exc_info or getattr(record, "counted", False):
            return True
        text = record.getMessage()
        count = self._repeats.count(record.name, text)
        if count > 1:  # in a record of its own: other handlers get this one
            self._say(text, count)
        return count == 1

    def say_rest(self) -> None:
        for text, count in self._repeats.rest():
            self._say(text, count)

    def _say(self, text: str, count: int) -> None:
        record = logging.LogRecord(__name__, logging.WARNING, "", 0, with_count(text, count), None, None)
        record.counted = True
        self._handler.handle(record)


class JsonFormatter(logging.Formatter):
    """Formats records as JSON objects with the context, or as ``LEVEL message`` without one."""

    def __init__(self, context: LogContext | None = None) -> None:
        super().__init__("%(levelname)s %(message)s")
        self._context = context

    def format(self, record: logging.LogRecord) -> str:
        if self._context is None:
            return super().format(record)
        line = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._context.fields(),
        }
        if record.exc_info:
            line["exception"] = redact_secrets(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False)


_REDACT_SECRETS = _RedactSecrets()
_OF_STREAMS = ("logging", "ray")
"""Packages of the handlers that write to streams."""


def configure(level: int, context: LogContext | None = None) -> None:
    """Log this process to stderr from `level` on, as JSON lines if a context is given.

    If logging is already configured (Ray does so in its workers), only the handlers of JSON lines change.
    """
    root = logging.getLogger()
    if not root.handlers:
        root.setLevel(level)
    if context is not None or not root.handlers:
        for handler in list(root.handlers):
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                root.removeHandler(handler)
        new_handler = logging.StreamHandler()
        new_handler.setFormatter(JsonFormatter(context))
        root.addHandler(new_handler)
    for handler in root.handlers:
        handler.addFilter(_REDACT_SECRETS)
        _say_once(handler)
    logging.captureWarnings(context is not None)
    for noisy in ("ray", "webdataset", "fsspec", "s3fs", "botocore", "aiobotocore"):
        logging.getLogger(noisy).setLevel(max(level, logging.WARNING))


def _say_once(handler: logging.Handler) -> None:
    """Keep back equal warnings of a handler of a stream; handlers that collect records get all of them."""
    of_stream = isinstance(handler, logging.StreamHandler) and type(handler).__module__.split(".")[0] in _OF_STREAMS
    if of_stream and not any(isinstance(each, _SayOnce) for each in handler.filters):
        say_once = _SayOnce(handler)
        handler.addFilter(say_once)
        atexit.register(say_once.say_rest)


class RecentWarnings(logging.Handler):
    """Keeps the latest 20 different warnings of the package while its block runs, for the progress messages."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        self._repeats = Repeats()

    def __enter__(self) -> RecentWarnings:
        logging.getLogger("t2idist").addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        logging.getLogger("t2idist").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        text = redact_secrets(f"{record.levelname.lower()}: {record.getMessage()}")
        if count := self._repeats.count(record.name, text):
            self.texts.append(with_count(text, count))
            del self.texts[:-20]
