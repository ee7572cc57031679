"""A user's program that is notified of the start, restarts, failure and end of a run.

The driver runs it with a JSON object on its standard input; if it fails, that is logged as a warning. It is given on
the command line only, never in a recipe: no code runs from configs.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from t2idist.observability.logs import redact_secrets

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 30.0
ENVIRONMENT_PREFIX = "T2IDIST_HOOK_"
"""Prefix of the environment variables that are passed to the hook, such as its URL or key."""
_PASSED_VARIABLES = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "SSL_CERT_FILE",
    "HTTPS_PROXY",
    "https_proxy",
    "NO_PROXY",
)


def parse(command: str) -> list[str]:
    """Split a hook's command line. Raises ValueError if there is no such program."""
    try:
        arguments = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"--hook: {command!r}: {error}") from None
    if not arguments:
        raise ValueError("--hook: empty; give a command, such as: --hook 'python tools/notify_webhook.py'")
    if shutil.which(arguments[0]) is None:
        raise ValueError(f"--hook: {arguments[0]}: no such program")
    return arguments


class CommandHook:
    """Runs a command (if it is not empty) for each event, one at a time, in a background thread."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._pool = ThreadPoolExecutor(1, "hook")

    def send(self, event: dict[str, Any]) -> None:
        """Start the command for an event of JSON values."""
        if self._command:
            self._pool.submit(self._run, redact_secrets(json.dumps(event, ensure_ascii=False)))

    def close(self) -> None:
        """Wait for the commands of all events, at most `TIMEOUT_SECONDS` each."""
        self._pool.shutdown(wait=True)

    def _run(self, text: str) -> None:
        environment = {
            name: value
            for name, value in os.environ.items()
            if name in _PASSED_VARIABLES or name.startswith(ENVIRONMENT_PREFIX)
        }
        try:
            process = subprocess.Popen(
                self._command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            try:
                _, stderr = process.communicate(text + "\n", timeout=TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                logger.warning("hook: killed after %.0f s", TIMEOUT_SECONDS)
                return
        except OSError as error:
            logger.warning("hook: %s", error)
            return
        if process.returncode:
            last = (stderr.strip().splitlines() or ["nothing on stderr"])[-1]
            logger.warning("hook: exit status %d: %s", process.returncode, last[:200])
