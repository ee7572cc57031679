"""The record of every attempt at a run: ``attempts.json`` in the run folder, written by the first worker."""

from __future__ import annotations

from typing import Any

from t2idist import storage
from t2idist.engine import loop
from t2idist.engine.checkpoint.manager import CommittedCheckpoint
from t2idist.engine.metrics import PROGRESS, MetricLogger, now
from t2idist.observability.recovery import Recovery

ATTEMPTS = "attempts.json"


class AttemptRecord:
    """The current attempt.

    Args:
        recovery: The restart that this attempt ends; left out if there was no earlier attempt.
    """

    def __init__(self, run_url: str, workers: int, recovery: Recovery | None) -> None:
        self._run_url, self._url = run_url, storage.join(run_url, ATTEMPTS)
        earlier = storage.read_json_if_present(self._url) or []
        self.restarts: int = len(earlier)
        """Attempts before this one."""
        self._attempt: dict[str, Any] = {"time": now(), "workers": workers}
        self._recovery = recovery if earlier else None
        self._attempts = [*earlier, self._attempt]
        self._write()

    def resumed(self, stage: str, checkpoint: CommittedCheckpoint) -> None:
        """Record the checkpoint that a stage resumes from."""
        self._attempt.setdefault("resumed", {})[stage] = {"images": checkpoint.images, "from": checkpoint.url}
        if self._recovery is not None:
            message = storage.read_json_if_present(storage.join(self._run_url, PROGRESS))
            if message is not None and message["stage"] == stage:
                self._recovery.images_repeated = max(0, message["images"] - checkpoint.images)
        self._write()

    def recovery_hooks(self, log: MetricLogger) -> list[loop.Hook]:
        """Return the hook that records the recovery after the first step, if there is one to record."""
        if self._recovery is None or self._recovery.is_finished:
            return []
        return [_FinishRecovery(self, log)]

    def finish_recovery(self, log: MetricLogger) -> None:
        """Record that the first step after the recovery is done, unless that was recorded."""
        if self._recovery is None or self._recovery.is_finished:
            return
        self._recovery.finish()
        self._write()
        log.metadata["recovery"] = self._recovery.describe()
        log.log_state("training")

    def _write(self) -> None:
        if self._recovery is not None:
            self._attempt["recovery"] = self._recovery.describe()
        storage.write_json(self._url, self._attempts)


class _FinishRecovery(loop.Hook):
    """Records a recovery after its first step."""

    def __init__(self, record: AttemptRecord, log: MetricLogger) -> None:
        self._record, self._log = record, log

    def after_step(self, step: loop.FinishedStep) -> None:
        self._record.finish_recovery(self._log)
