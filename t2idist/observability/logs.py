"""Logging of a run's processes: plain lines, or JSON with run, stage, rank and images; secrets are removed."""

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
    logging.captureWarnings(context is not None)
    for noisy in ("ray", "webdataset", "fsspec", "s3fs", "botocore", "aiobotocore"):
        logging.getLogger(noisy).setLevel(max(level, logging.WARNING))
