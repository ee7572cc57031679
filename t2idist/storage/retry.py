"""Retry requests to an object store: which errors are transient, how long to wait, and the final error sentence."""

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
"""How long one request is retried: a store may be unavailable for a minute or two."""
FIRST_WAIT_SECONDS = 0.2
LONGEST_WAIT_SECONDS = 10.0
_ATTEMPTS_BEFORE_WARNING = 3
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
    """The caller no longer needs the bytes."""


def retry(attempt: Callable[[], T], name: str, stop: threading.Event | None = None) -> T:
    """Call `attempt`, again after growing random waits while its errors are transient, and return its result.

    Args:
        name: the object in messages, without secrets.
        stop: if set, no further attempt is made.

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
        try:
            return attempt()
        except Exception as error:
            permanent = permanent_error(error, name)
            if permanent is not None:
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


def permanent_error(error: Exception, name: str) -> Exception | None:
    """Return the error to raise if a retry cannot succeed, else None."""
    status, code = _response(error)
    if code in _BUSY or status in (408, 425, 429) or (status >= 500 and status != 501):
        return None
    if status in (401, 403) or code in _REFUSED or isinstance(error, PermissionError):
        return PermissionError(
            f"{name}: the store refuses access ({code or status or 'permission denied'}); check the keys and whether "
            f"they have expired, the clock of this machine, the bucket's policy, and the endpoint"
        )
    if _no_credentials(error):
        return PermissionError(
            f"{name}: no credentials were found; set them in the environment (AWS_ACCESS_KEY_ID, "
            f"AWS_SECRET_ACCESS_KEY, AWS_PROFILE) or in the store's own files"
        )
    if status == 404 or code in _ABSENT or isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{name}: no such object")
    if (
        300 <= status < 500
        or status == 501
        or isinstance(error, FileExistsError | IsADirectoryError | NotADirectoryError)
    ):
        return OSError(f"{name}: the store does not support this request: {describe(error)}")
    return _unless_transient(error, name)


def describe(error: Exception) -> str:
    """Return one short line for an error, without query strings and keys."""
    status, code = _response(error)
    if status or code:
        return f"{code or 'HTTP'} ({status})"
    text = re.sub(r"[?]\S*", "", str(error))
    return f"{type(error).__name__}: {text}"[:200]


def _response(error: BaseException) -> tuple[int, str]:
    """Return the HTTP status and error code of the S3 response behind an error; (0, "") if there is none."""
    from botocore.exceptions import ClientError  # slow to import, and needed only after an error

    for candidate in (error, error.__cause__):
        if isinstance(candidate, ClientError):
            code = str(candidate.response.get("Error", {}).get("Code", ""))
            status = candidate.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return int(status), "" if code.isdigit() else code
    return 0, ""


def _no_credentials(error: Exception) -> bool:
    from botocore.exceptions import CredentialRetrievalError, NoCredentialsError, PartialCredentialsError

    return isinstance(error, NoCredentialsError | PartialCredentialsError | CredentialRetrievalError)


def _unless_transient(error: Exception, name: str) -> Exception | None:
    """Return None if an error without a response looks like a network failure, else the error to raise."""
    from aiohttp import ClientError as AiohttpError
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError  # raised if the body of an error response breaks off

    if isinstance(error, boto.SSLError):
        return OSError(f"{name}: {describe(error)}")
    transient = (
        boto.ConnectionError,
        boto.HTTPClientError,
        boto.IncompleteReadError,
        ResponseParserError,
        AiohttpError,
        HTTPError,
    )
    if isinstance(error, (OSError, EOFError, http.client.HTTPException, *transient)):
        return None
    return ValueError(f"{name}: {describe(error)}") if isinstance(error, boto.BotoCoreError) else error
