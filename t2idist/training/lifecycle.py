"""How a run began and ended: told to the hook, and kept in its folder for ``--status`` and the next submission."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from t2idist import storage
from t2idist.config import RunConfig
from t2idist.engine.metrics import now
from t2idist.engine.preemption import StopRequested
from t2idist.observability.hook import Hook
from t2idist.observability.logs import redact_secrets
from t2idist.training import stages

OnProgress = Callable[[dict[str, Any]], None]
"""Gets the progress messages of a run."""
OUTCOME = "outcome.json"
FATAL = "fatal.json"
_SHOWN = ("stage", "images", "budget_images", "images_per_second", "restarts", "workers", "losses")


class LifecycleNotifier:
    """Follows the progress messages of a submission for the hook."""

    def __init__(self, config: RunConfig, hook: Hook) -> None:
        self._hook = hook
        self._who = {"run": config.name, "url": storage.redact(stages.run_url(config))}
        self._last: dict[str, Any] = {}
        self._restarts: int | None = None

    def follow(self, message: Mapping[str, Any]) -> None:
        """Take in a progress message: the number of restarts goes up with a restart."""
        self._last = {key: message[key] for key in _SHOWN if key in message}
        restarts = int(message.get("restarts", 0))
        if self._restarts is not None and restarts > self._restarts:
            self.tell("restart")
        self._restarts = restarts

    def tell(self, event: str, error: str | None = None) -> None:
        """event: "start", "restart", "failure" or "end"."""
        self._hook.tell({"event": event, **self._who, "time": now(), **self._last, "error": error})


@contextlib.contextmanager
def run_lifecycle(config: RunConfig, hook: Hook, stops: bool) -> Iterator[LifecycleNotifier]:
    """Around a submission. stops: it is to end before the run does."""
    where = storage.join(stages.run_url(config), OUTCOME)
    telling = LifecycleNotifier(config, hook)
    storage.remove(where)
    telling.tell("start")
    state, error = "failed", None
    try:
        yield telling
        state = "stopped" if stops else "finished"
    except StopRequested as left:
        state, error = "stopped", str(left)
        raise
    except KeyboardInterrupt:
        state = "interrupted"
        raise
    except BaseException as fault:
        error = redact_secrets(str(fault) or type(fault).__name__)
        raise
    finally:
        with contextlib.suppress(OSError):  # where the store refuses everything, the error itself says it
            storage.write_json(where, {"state": state, "error": error, "time": now()})
        telling.tell("failure" if state == "failed" else "end", error)
        hook.close()


def write_fatal(config: RunConfig, sentence: str) -> None:
    """The run cannot go on, however often it is restarted."""
    storage.write_json(storage.join(stages.run_url(config), FATAL), {"error": redact_secrets(sentence)})


def read_fatal(config: RunConfig) -> str | None:
    """Why it cannot; None where nothing is known against it."""
    where = storage.join(stages.run_url(config), FATAL)
    return str(storage.read_json(where)["error"]) if storage.exists(where) else None


def clear_fatal(config: RunConfig) -> None:
    """A new submission begins without the last one's verdict."""
    storage.remove(storage.join(stages.run_url(config), FATAL))
