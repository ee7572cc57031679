"""Retry requests to an object store: how often, how long to wait, and when with new credentials."""

from __future__ import annotations

import itertools
import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from t2idist.storage.errors import describe, permanent_error
from t2idist.storage.renewal import Renewal

logger = logging.getLogger(__name__)

T = TypeVar("T")

TOTAL_SECONDS = 180.0
"""How long one request is retried: a store may be unavailable for a minute or two."""
FIRST_WAIT_SECONDS = 0.2
LONGEST_WAIT_SECONDS = 10.0
_ATTEMPTS_BEFORE_WARNING = 3
_JITTER = random.SystemRandom()


class Cancelled(Exception):
    """The caller no longer needs the bytes."""


def retry(
    attempt: Callable[[], T], name: str, stop: threading.Event | None = None, renewal: Renewal | None = None
) -> T:
    """Call `attempt`, again after growing random waits while its errors are transient, and return its result.

    Args:
        name: the object in messages, without secrets.
        stop: if set, no further attempt is made.
        renewal: decides whether a refusal is final; without one every refusal is.

    Raises:
        PermissionError, FileNotFoundError: at once, with a sentence.
        OSError: other permanent errors.
        ConnectionError: TOTAL_SECONDS are over.
        Cancelled: `stop` was set.
    """
    began = time.monotonic()
    for tries in itertools.count(1):
        if stop is not None and stop.is_set():
            raise Cancelled(name)
        if renewal is not None:
            renewal.begin()
        try:
            result = attempt()
            if renewal is not None:
                renewal.accepted()
            return result
        except Exception as error:
            permanent = permanent_error(error, name)
            again = permanent is not None and renewal is not None and renewal.after(error)
            if permanent is not None and not again:
                if isinstance(permanent, FileNotFoundError) and renewal is not None:
                    renewal.accepted()  # the store answered
                raise permanent from None  # the chain could hold headers and signed queries
            reason = describe(error)
        wait = _JITTER.uniform(0, min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** min(tries - 1, 16)))
        waited = time.monotonic() - began
        if waited + wait > TOTAL_SECONDS:
            raise ConnectionError(
                f"{name}: no response in {waited:.0f} s and {tries} attempts; the last error: {reason}"
            )
        if tries == _ATTEMPTS_BEFORE_WARNING:
            left = TOTAL_SECONDS - waited
            logger.warning("%s: %d attempts failed (%s); retrying for %.0f s", name, tries, reason, left)
        if stop is None:
            time.sleep(wait)
        else:
            stop.wait(wait)
    raise AssertionError("itertools.count never ends")
