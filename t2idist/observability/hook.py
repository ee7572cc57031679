"""A program of the user's that hears of a run: at its start and end, of a restart, and of a failure.

The driver runs it, with a JSON object on its standard input; what becomes of it is a warning at most. It is named on
the command line only, never by a recipe: no code runs from configs.
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

LONGEST_SECONDS = 30.0
OWN = "T2IDIST_HOOK_"
"""Variables of the environment that begin so are the hook's: its address, its key."""
_GIVEN = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "SSL_CERT_FILE", "HTTPS_PROXY", "https_proxy", "NO_PROXY")


def parse(command: str) -> list[str]:
    """The words of a hook's command line. Raises ValueError where there is no such program."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"--hook: {command!r}: {error}") from None
    if not words:
        raise ValueError("--hook: it is empty; give a command, such as: --hook 'python tools/notify_webhook.py'")
    if shutil.which(words[0]) is None:
        raise ValueError(f"--hook: {words[0]}: no such program")
    return words


class Hook:
    """Runs the command for each event, one after the other, beside the run. words: none: nothing is run."""

    def __init__(self, words: list[str]) -> None:
        self._words = words
        self._pool = ThreadPoolExecutor(1, "hook")

    def tell(self, facts: dict[str, Any]) -> None:
        """Begin to run the command with these plain values."""
        if self._words:
            self._pool.submit(self._run, redact_secrets(json.dumps(facts, ensure_ascii=False)))

    def close(self) -> None:
        """Wait until all events are told, each for `LONGEST_SECONDS` at most."""
        self._pool.shutdown(wait=True)

    def _run(self, text: str) -> None:
        given = {name: value for name, value in os.environ.items() if name in _GIVEN or name.startswith(OWN)}
        try:
            process = subprocess.Popen(
                self._words,
                env=given,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            try:
                _, said = process.communicate(text + "\n", timeout=LONGEST_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                logger.warning("hook: ended after %.0f s without an end of its own", LONGEST_SECONDS)
                return
        except OSError as error:
            logger.warning("hook: %s", error)
            return
        if process.returncode:
            last = (said.strip().splitlines() or ["nothing on stderr"])[-1]
            logger.warning("hook: exit status %d: %s", process.returncode, last[:200])
