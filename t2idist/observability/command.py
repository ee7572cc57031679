"""How every command ends: an error is one sentence on stderr, and the exit status says of which kind it was."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from typing import ParamSpec

from t2idist.observability.logs import redact_secrets

P = ParamSpec("P")

FAILED, BAD_INPUT = 1, 2
CLOSED_PIPE = 128 + signal.SIGPIPE

_BAD_PLACES = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
_BAD_PLACE_NUMBERS = (errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)
_PROGRAMMERS = (NotImplementedError, RecursionError)
"""Kinds of RuntimeError that keep their traceback."""
_QUERY = re.compile(r"(://[^\s?'\"]*)[?][^\s'\"]*?(?=[:;,.)]*(?:[\s'\"]|$))")
"""A URL with its query, without the punctuation after it."""


def in_main_thread() -> bool:
    """Return whether this thread may set signal handlers: Python calls them in the main thread only."""
    return threading.current_thread() is threading.main_thread()


def command(
    name: str, *, failed: int = FAILED, interrupted: str = ""
) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Decorate the main function of a command, so that it ends as `run_command` says."""

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @functools.wraps(main)
        def ending(*args: P.args, **kwargs: P.kwargs) -> int:
            return run_command(name, lambda: main(*args, **kwargs), failed=failed, interrupted=interrupted)

        return ending

    return decorate


def run_command(name: str, main: Callable[[], int], *, failed: int = FAILED, interrupted: str = "") -> int:
    """Run a command; print an error as one sentence on stderr. Errors of the program itself keep their traceback.

    Args:
        name: first word of the sentence.
        failed: status for failures, 2 for commands whose status 1 is a verdict.
        interrupted: the line after Ctrl-C, "NAME: interrupted" by default.

    Returns:
        The exit status: that of `main`; 1 for a failure (full disk, lost network, ...); 2 for bad input, which
        includes files and places that do not exist, are of the wrong kind, or cannot be written; 130 after Ctrl-C;
        141 if the reader of the output has gone.
    """
    _open_closed_streams()
    try:
        status = main()
        _flush()
        return status
    except SystemExit:  # of argparse, whose help text may be in the buffer
        with contextlib.suppress(BrokenPipeError):
            _flush()
        raise
    except BrokenPipeError:
        _drop_output()
        return CLOSED_PIPE
    except KeyboardInterrupt as interrupt:
        _print_error(interrupted or f"{name}: interrupted")
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if isinstance(error, _PROGRAMMERS):
            raise
        try:
            _flush()  # what a print could not write is still in the buffer
        except BrokenPipeError:
            return CLOSED_PIPE
        except OSError as of_output:
            error = of_output
        _print_error(f"{name}: {describe_error(error)}")
        return BAD_INPUT if _is_bad_input(error) else failed


def describe_error(error: BaseException) -> str:
    """Return an error as one line, without secrets; an error of the operating system begins with the file.

    URLs lose their query, which may be a signature, and their user name and password.
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError) and not text:
        text = "out of memory"
    line = " ".join(part.strip() for part in text.splitlines() if part.strip())
    without_user = re.sub(r"(://)[^/\s]*@", r"\1", line or type(error).__name__)
    return redact_secrets(_QUERY.sub(r"\1", without_user))


def _is_bad_input(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return isinstance(error, _BAD_PLACES) or error.errno in _BAD_PLACE_NUMBERS
    return isinstance(error, ValueError)


def _open_closed_streams() -> None:
    """Connect stdout and stderr with nothing if the shell has closed them (``>&-``)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # to the end of the process


def _flush() -> None:
    """Write what is still buffered now, where an error can be reported."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        raise
    except OSError as error:
        _drop_output()
        raise OSError(error.errno, error.strerror, "standard output") from None


def _drop_output() -> None:
    """Connect stdout with nothing, so that the interpreter does not report the lost output once more at its end."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())


def _print_error(text: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)
