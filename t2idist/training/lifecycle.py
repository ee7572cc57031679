"""Start and end of a run: reported to the hook, and kept in the run folder for ``--status`` and the next submission."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from t2idist import storage
from t2idist.config import RunConfig
from t2idist.engine.metrics import now
from t2idist.engine.preemption import StopRequested
from t2idist.observability.hook import CommandHook
from t2idist.observability.logs import redact_secrets
from t2idist.training.stages import StageRun, run_url, stages_of

OnProgress = Callable[[dict[str, Any]], None]
"""Called with each progress message of a run."""
OUTCOME = "outcome.json"
FATAL = "fatal.json"
_EVENT_KEYS = ("stage", "images", "budget_images", "images_per_second", "restarts", "workers", "losses")


class RunIsTaken(ValueError):
    """Another process or job trains the run; nothing of the run was changed."""


def run_is_taken(config: RunConfig, holder: str, since: str = "") -> RunIsTaken:
    """Return the error that `holder` trains the run, and what to do."""
    return RunIsTaken(
        f"name: {holder} trains the run {config.name} in {storage.redact(config.storage)}{since}; wait for it or stop "
        "it, or give name=ANOTHER for a new run"
    )


class LifecycleNotifier:
    """Derives the hook's events from the progress messages of a submission."""

    def __init__(self, config: RunConfig, hook: CommandHook) -> None:
        self._hook = hook
        self._run = {"run": config.name, "url": storage.redact(run_url(config))}
        self._progress: dict[str, Any] = {}
        self._restarts: int | None = None

    def on_progress(self, message: Mapping[str, Any]) -> None:
        """Keep a progress message for the next event; send "restart" if its number of restarts has risen."""
        self._progress = {key: message[key] for key in _EVENT_KEYS if key in message}
        restarts = int(message.get("restarts", 0))
        if self._restarts is not None and restarts > self._restarts:
            self.notify("restart")
        self._restarts = restarts

    def notify(self, event: str, error: str | None = None) -> None:
        """Send "start", "restart", "failure" or "end" to the hook."""
        self._hook.send({"event": event, **self._run, "time": now(), **self._progress, "error": error})


@contextlib.contextmanager
def run_lifecycle(config: RunConfig, hook: CommandHook, stops: bool) -> Iterator[LifecycleNotifier]:
    """Report the start and the end of a submission, and write its outcome to the run folder.

    Args:
        stops: the submission is meant to end before the run is done.
    """
    url = storage.join(run_url(config), OUTCOME)
    notifier = LifecycleNotifier(config, hook)
    storage.remove(url)
    notifier.notify("start")
    state, message, taken = "failed", None, False
    try:
        yield notifier
        state = "stopped" if stops else "finished"
    except StopRequested as stop:
        state, message = "stopped", str(stop)
        raise
    except KeyboardInterrupt:
        state = "interrupted"
        raise
    except BaseException as error:
        message, taken = redact_secrets(str(error) or type(error).__name__), isinstance(error, RunIsTaken)
        raise
    finally:
        with contextlib.suppress(OSError):  # if storage is not writable, the error itself reports it
            if not taken:  # the outcome is the other job's
                storage.write_json(url, {"state": state, "error": message, "time": now()})
        notifier.notify("failure" if state == "failed" else "end", message)
        hook.close()


def write_fatal(config: RunConfig, message: str) -> None:
    """Record an error that no restart can fix."""
    storage.write_json(_fatal_url(config), {"error": redact_secrets(message)})


def read_fatal(config: RunConfig) -> str | None:
    """Return the error that no restart can fix, if one was recorded in this submission."""
    fatal = storage.read_json_if_present(_fatal_url(config))
    return None if fatal is None else str(fatal["error"])


def read_progress(config: RunConfig) -> tuple[str | None, frozenset[str]]:
    """Return the error that no restart can fix, if there is one, and the stages that are done."""
    stages = [*stages_of(config)]
    with ThreadPoolExecutor(1 + len(stages), "progress") as pool:
        fatal, done = pool.submit(read_fatal, config), pool.map(StageRun.is_done, stages)
        return fatal.result(), frozenset(stage.name for stage, is_done in zip(stages, done, strict=True) if is_done)


def clear_fatal(config: RunConfig) -> None:
    """Remove the error that an earlier submission recorded."""
    storage.remove(_fatal_url(config))


def _fatal_url(config: RunConfig) -> str:
    return storage.join(run_url(config), FATAL)
