"""A trial in a process of its own: the ordinary ``t2idist train``, which ends with the process that started it.

``python -m t2idist.sweep.trial ARGUMENTS`` trains until its standard input closes; then it saves its state and ends, as
after SIGTERM. So nothing is left running, however the sweep ends, and no trial loses its work.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from t2idist import storage
from t2idist.config import RunConfig

END_SECONDS = 120.0
"""Time to save the state before the process is killed; also the wait for an earlier process of the run to end."""
EXPORT_INDEX = "export.json"
_POLL_SECONDS = 0.5


def main(arguments: Sequence[str]) -> int:
    """Train with the arguments of ``t2idist train``; returns its exit status."""
    from t2idist import config as configuration  # the parent, a worker of Ray, needs neither
    from t2idist import run

    threading.Thread(target=_end_with_parent, daemon=True).start()
    settings = [text for text in arguments[1:] if "=" in text and not text.startswith("-")]
    if "--local" in arguments:
        wait_until_free(configuration.load(arguments[0], settings), END_SECONDS)
    status = run.main(arguments, "t2idist train")
    if status == 0:
        score_last_weights(configuration.load(arguments[0], settings))
    return status


def score_last_weights(config: RunConfig) -> None:
    """Score the last weights of stages that are done, if training ended before their score.

    The background process gives up when its share of the time is over, but a trial without a last score has no rank.
    """
    from t2idist.engine.checkpoint import export
    from t2idist.evaluate import background_scorer
    from t2idist.training.stages import stages_of

    for stage in stages_of(config):
        if not stage.settings.scores_every_images or not stage.is_done():
            continue
        images = int(export.read_index(stage.export_url)["images"])
        if images in {int(line["images"]) for line in background_scorer.read_scores(stage.url)}:
            continue
        target = storage.join(stage.url, background_scorer.SCORED_FOLDER, f"{images:012d}")
        copy_export(stage.export_url, target)
        message = {"images": images, "export": target}
        background_scorer.score_export(config.scores, stage.url, message, lambda: None)


def copy_export(source: str, target: str) -> None:
    """Copy an export unless it is there; the index, written last, makes it complete."""
    if not storage.exists(storage.join(target, EXPORT_INDEX)):
        storage.copy_folder(source, target, last=EXPORT_INDEX)


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def wait_until_free(config: RunConfig, seconds: float) -> None:
    """Wait until no process of an earlier attempt trains the run; it may be saving its state."""
    from t2idist.training import lock  # imports torch
    from t2idist.training.lifecycle import RunIsTaken

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with lock.only_one(config):
                return
        except RunIsTaken:
            time.sleep(_POLL_SECONDS)


@dataclass(frozen=True)
class Command:
    """How a process trains."""

    arguments: tuple[str, ...]
    """Of ``t2idist train``."""
    folder: str
    """Working directory, if this machine has it."""
    environment: Mapping[str, str]
    """Added to the environment."""


class Process:
    """A training process; `start` it, `wait` for it, and `stop` it."""

    def __init__(self, command: Command) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "t2idist.sweep.trial", *command.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            cwd=command.folder if Path(command.folder).is_dir() else None,
            env={**os.environ, **command.environment},
            start_new_session=True,  # Ctrl-C of a terminal reaches the sweep alone
        )

    def poll(self) -> int | None:
        """Return the exit status, or None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """End it: it saves its state."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(END_SECONDS + 5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def error(self) -> str:
        """Return the last line that it wrote to its standard error."""
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1].removeprefix("error: ") if lines else f"exit status {self._process.returncode}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
