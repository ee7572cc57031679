"""What the errors of an object store mean: transient, refused, absent or unsupported, and the sentences that say so."""

from __future__ import annotations

import http.client
import re

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
        "RequestExpired",
        "InvalidClientTokenId",
        "AllAccessDisabled",
        "AccountProblem",
        "InvalidSecurity",
    }
)
_ABSENT = frozenset({"NoSuchKey", "NoSuchBucket", "NoSuchVersion"})
_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"})
_STALE = frozenset({"InvalidAccessKeyId", "InvalidToken", "InvalidClientTokenId", "SignatureDoesNotMatch"})
"""Codes of keys that were replaced."""
_WEB = ("http://", "https://")
_NO_CODE = frozenset({"", "Bad Request", "Forbidden", "Unauthorized"})


def permanent_error(error: Exception, name: str) -> Exception | None:
    """Return the error to raise if a retry cannot succeed, else None."""
    status, code = _response(error)
    if code in _BUSY or status in (408, 425, 429) or (status >= 500 and status != 501):
        return None
    if status in (401, 403) and name.startswith(_WEB):
        return PermissionError(f"{name}: the server refuses access ({status}); is the file public, and the link valid?")
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
    if status in (404, 410) or code in _ABSENT or isinstance(error, FileNotFoundError):
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


def refusal(error: Exception) -> str:
    """Return how a store refused the keys of a request: "expired", "unclear" or "denied"; "" if it did not.

    The response to a HEAD request has no body that could tell expired keys from others ("unclear"); S3 answers it with
    status 400 if the token has expired. Keys that are missing, or half written, count as unclear too.
    """
    from aiohttp import ClientResponseError  # of a web server, which knows no keys

    status, code = _response(error)
    if isinstance(error, ClientResponseError):
        return ""
    if code in _EXPIRED:
        return "expired"
    if _no_credentials(error) or code in _STALE or (status in (400, 401, 403) and code in _NO_CODE):
        return "unclear"
    other_status = getattr(error, "status_code", getattr(error, "code", 0))  # of gcsfs and adlfs
    if status in (401, 403) or code in _REFUSED or isinstance(error, PermissionError) or other_status in (401, 403):
        return "denied"
    return ""


def _response(error: BaseException) -> tuple[int, str]:
    """Return the HTTP status and, of S3, the error code of the response behind an error; (0, "") if there is none."""
    from aiohttp import ClientResponseError  # slow to import, and needed only after an error
    from botocore.exceptions import ClientError

    for candidate in (error, error.__cause__):
        if isinstance(candidate, ClientResponseError):
            return candidate.status, ""
        if isinstance(candidate, ClientError):
            code = str(candidate.response.get("Error", {}).get("Code", ""))
            status = candidate.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return int(status), "" if code.isdigit() else code
    return 0, ""


def _no_credentials(error: Exception) -> bool:
    from botocore.exceptions import (
        ConfigParseError,
        CredentialRetrievalError,
        NoCredentialsError,
        PartialCredentialsError,
    )

    kinds = NoCredentialsError | PartialCredentialsError | CredentialRetrievalError | ConfigParseError
    return isinstance(error, kinds)


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
