"""Log lines of a run's processes: for people, or JSON with the run, stage, rank and images; never with a secret."""

from __future__ import annotations

import datetime
import json
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|ACCESS_KEY|API_KEY|PRIVATE_KEY", re.IGNORECASE)
_NO_SECRET = re.compile(r"_(PATH|FILE|FILES|URI|URL|MODE|ID|DIR)$", re.IGNORECASE)
_SHORTEST_SECRET = 8


def redact_secrets(text: str) -> str:
    """The text with ``***`` for each value of an environment variable whose name says that it is a secret."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and _SECRET_NAME.search(name) and not _NO_SECRET.search(name):
            text = text.replace(value, "***")
    return text


@dataclass
class LogContext:
    """Where in a run a process is. rank: of a worker; None: the driver. images: seen in the stage; None: in none."""

    run: str = ""
    rank: int | None = None
    stage: str = ""
    images: Callable[[], int] | None = None

    def facts(self) -> dict[str, Any]:
        images = None if self.images is None else self.images()
        return {"run": self.run, "stage": self.stage or None, "rank": self.rank, "images": images}


class _Hide(logging.Filter):
    """Cuts secrets out of every record, whoever writes it."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact_secrets(record.getMessage()), None
        return True


class JsonFormatter(logging.Formatter):
    """``LEVEL message``; where there is a place, a JSON object a line."""

    def __init__(self, place: LogContext | None = None) -> None:
        super().__init__("%(levelname)s %(message)s")
        self._place = place

    def format(self, record: logging.LogRecord) -> str:
        if self._place is None:
            return super().format(record)
        line = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._place.facts(),
        }
        if record.exc_info:
            line["exception"] = redact_secrets(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False)


_HIDE = _Hide()


def configure(level: int, place: LogContext | None = None) -> None:
    """Send the log of this process to stderr, from `level` on; as JSON lines where a place is given.

    Where somebody has set up a log before (Ray, in its workers), it stays as it is, but for the JSON lines.
    """
    root = logging.getLogger()
    if not root.handlers:
        root.setLevel(level)
    if place is not None or not root.handlers:
        for handler in list(root.handlers):
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                root.removeHandler(handler)
        made = logging.StreamHandler()
        made.setFormatter(JsonFormatter(place))
        root.addHandler(made)
    for handler in root.handlers:
        handler.addFilter(_HIDE)
    logging.captureWarnings(place is not None)
    for noisy in ("ray", "webdataset", "fsspec", "s3fs", "botocore", "aiobotocore"):
        logging.getLogger(noisy).setLevel(max(level, logging.WARNING))
