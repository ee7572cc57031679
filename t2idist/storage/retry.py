"""Trying again: which errors of an object store pass by themselves, how long to wait, and the sentence at the end."""

from __future__ import annotations

import http.client
import itertools
import logging
import random
import re
import threading
import time
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

TOTAL_SECONDS = 180.0
"""How long one request is tried again: a store may be gone for a minute or two."""
FIRST_WAIT_SECONDS = 0.2
LONGEST_WAIT_SECONDS = 10.0
_TRIES_BEFORE_WARNING = 3
_JITTER = random.SystemRandom()

_BUSY = frozenset(
    {
        "SlowDown",
        "RequestTimeout",
        "RequestTimeoutException",
        "Throttling",
        "ThrottlingException",
        "ThrottledException",
        "RequestThrottled",
        "RequestLimitExceeded",
        "BandwidthLimitExceeded",
        "TooManyRequestsException",
        "InternalError",
        "ServiceUnavailable",
        "OperationAborted",
        "IncompleteBody",
        "XAmzContentSHA256Mismatch",
    }
)
_REFUSED = frozenset(
    {
        "AccessDenied",
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidAccessKeyId",
        "InvalidToken",
        "SignatureDoesNotMatch",
        "RequestTimeTooSkewed",
        "TokenRefreshRequired",
        "AllAccessDisabled",
        "AccountProblem",
        "InvalidSecurity",
    }
)
_ABSENT = frozenset({"NoSuchKey", "NoSuchBucket", "NoSuchVersion"})


class Cancelled(Exception):
    """Whoever asked for the bytes does not want them any more."""


def persist(attempt: Callable[[], T], where: str, stop: threading.Event | None = None) -> T:
    """What `attempt` returns, tried again with growing random waits while its errors may pass by themselves.

    where: names the object in messages, without secrets. stop: ends the waiting, with Cancelled. Raises PermissionError
    and FileNotFoundError at once, with a sentence, other lasting errors as OSError, and ConnectionError when
    TOTAL_SECONDS are over.
    """
    began = time.monotonic()
    for tries in itertools.count(1):
        if stop is not None and stop.is_set():
            raise Cancelled(where)
        try:
            return attempt()
        except Exception as error:
            final = lasting(error, where)
            if final is not None:
                raise final from None  # the chain could hold headers and signed queries
            said = describe(error)
        wait = _JITTER.uniform(0, min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** min(tries - 1, 16)))
        waited = time.monotonic() - began
        if waited + wait > TOTAL_SECONDS:
            raise ConnectionError(f"{where}: no answer in {waited:.0f} s and {tries} tries; the last error was: {said}")
        if tries == _TRIES_BEFORE_WARNING:
            logger.warning("%s: %d tries failed (%s); trying on for %.0f s", where, tries, said, TOTAL_SECONDS - waited)
        if stop is None:
            time.sleep(wait)
        else:
            stop.wait(wait)
    raise AssertionError("itertools.count ends never")


def lasting(error: Exception, where: str) -> Exception | None:
    """The error to raise where trying again is of no use, else None."""
    status, code = _answer(error)
    if code in _BUSY or status in (408, 425, 429) or (status >= 500 and status != 501):
        return None
    if status in (401, 403) or code in _REFUSED or isinstance(error, PermissionError):
        return PermissionError(
            f"{where}: the store refuses access ({code or status or 'permission denied'}); check the keys and whether "
            f"they have expired, the clock of this machine, the bucket's policy, and the endpoint"
        )
    if _no_credentials(error):
        return PermissionError(
            f"{where}: no credentials were found; give them in the environment (AWS_ACCESS_KEY_ID, "
            f"AWS_SECRET_ACCESS_KEY, AWS_PROFILE) or in the store's own files"
        )
    if status == 404 or code in _ABSENT or isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{where}: not there")
    if (
        300 <= status < 500
        or status == 501
        or isinstance(error, FileExistsError | IsADirectoryError | NotADirectoryError)
    ):
        return OSError(f"{where}: the store cannot do this: {describe(error)}")
    return _unless_passing(error, where)


def describe(error: Exception) -> str:
    """One short line for an error: no query strings, no keys."""
    status, code = _answer(error)
    if status or code:
        return f"{code or 'HTTP'} ({status})"
    text = re.sub(r"[?]\S*", "", str(error))
    return f"{type(error).__name__}: {text}"[:200]


def _answer(error: BaseException) -> tuple[int, str]:
    """HTTP status and error code of an S3 answer behind the error; (0, "") where there is none."""
    from botocore.exceptions import ClientError  # slow to import, and needed only when something went wrong

    for found in (error, error.__cause__):
        if isinstance(found, ClientError):
            code = str(found.response.get("Error", {}).get("Code", ""))
            status = found.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return int(status), "" if code.isdigit() else code
    return 0, ""


def _no_credentials(error: Exception) -> bool:
    from botocore.exceptions import CredentialRetrievalError, NoCredentialsError, PartialCredentialsError

    return isinstance(error, NoCredentialsError | PartialCredentialsError | CredentialRetrievalError)


def _unless_passing(error: Exception, where: str) -> Exception | None:
    """None where an error without an answer of the store looks like the network's, else what to raise."""
    from aiohttp import ClientError as AnyClientError
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError  # comes through where the body of an error breaks off

    if isinstance(error, boto.SSLError):
        return OSError(f"{where}: {describe(error)}")
    passing = (
        boto.ConnectionError,
        boto.HTTPClientError,
        boto.IncompleteReadError,
        ResponseParserError,
        AnyClientError,
        HTTPError,
    )
    if isinstance(error, (OSError, EOFError, http.client.HTTPException, *passing)):
        return None
    return ValueError(f"{where}: {describe(error)}") if isinstance(error, boto.BotoCoreError) else error
