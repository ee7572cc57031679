"""The tracker of an MLflow server. Each stage is an MLflow run."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from t2idist.observability.tracking import DONE, STOPPED, Point, Refused

EXPERIMENT = "t2idist"
_STATUS = {DONE: "FINISHED", STOPPED: "KILLED"}
_PARAMETER_LENGTH, _PARAMETERS_AT_ONCE, _METRICS_AT_ONCE = 500, 100, 1000
"""Limits of a server."""
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "1",
}
"""The client's own environment variables, unless they are set: `BackgroundTracker` does the repeats."""
_REPEATABLE = (408, 429)


@dataclass
class MlflowService:
    """An MLflow run in the experiment MLFLOW_EXPERIMENT_NAME, "t2idist" by default.

    Points have the time of their line in metrics.jsonl, so that a server ignores one that it has already.
    """

    target: str
    """Address of the server."""
    run_name: str
    tags: Mapping[str, str]
    commit: str
    config: Mapping[str, Any]
    """Of the run, with the values of this stage at `stage`."""
    config_yaml: str
    read: Callable[[str], bytes]
    """Reads a file of the run."""
    name: str = "MLflow"
    ignores_repeats: bool = True
    durable_seconds: float = 0.0
    _created: str | None = None
    _run_id: str = ""
    _client: Any = field(default=None, repr=False)

    def open(self, run_id: str | None) -> str:
        for variable, value in _DEFAULTS.items():
            os.environ.setdefault(variable, value)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self._client = MlflowClient(tracking_uri=self.target)
        if known := run_id or self._created:
            try:
                self._client.update_run(known, status="RUNNING")
                self._run_id = known
                return known
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
        self._run_id = self._created = self._client.create_run(self._experiment(), run_name=self.run_name).info.run_id
        return self._run_id

    def _experiment(self) -> str:
        """Return the id of the experiment, which is created if there is none."""
        from mlflow.exceptions import MlflowException

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        if (found := self._client.get_experiment_by_name(name)) is None:
            with contextlib.suppress(MlflowException):  # another run has created it at this moment
                return str(self._client.create_experiment(name))
            found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id)

    def describe(self) -> None:
        from mlflow.entities import Param, RunTag

        tags = {**self.tags, "mlflow.source.git.commit": self.commit}
        with _refusals():
            self._client.log_batch(self._run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        values = list(flatten(self.config))
        for i in range(0, len(values), _PARAMETERS_AT_ONCE):
            with contextlib.suppress(Refused), _refusals():  # of a run that resumes with other values; see config.yaml
                batch = [Param(key, value) for key, value in values[i : i + _PARAMETERS_AT_ONCE]]
                self._client.log_batch(self._run_id, params=batch)
        with _refusals():
            self._client.log_text(self._run_id, self.config_yaml, "config.yaml")

    def metrics(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        metrics = []
        for point in points:
            milliseconds = round(datetime.datetime.fromisoformat(point.time_iso).timestamp() * 1000)
            for name, value in point.values.items():
                allowed = re.sub(r"[^\w\-. /:]", "_", name)
                metrics.append(Metric(allowed, float(value), milliseconds, point.images_seen))
        with _refusals():
            for i in range(0, len(metrics), _METRICS_AT_ONCE):
                self._client.log_batch(self._run_id, metrics=metrics[i : i + _METRICS_AT_ONCE])

    def picture(self, images_seen: int, url: str) -> None:
        from PIL import Image

        key = url.rpartition("/")[2].rpartition("_")[0]
        with _refusals():
            image = Image.open(io.BytesIO(self.read(url)))
            self._client.log_image(self._run_id, image, key=key, step=images_seen, synchronous=True)

    def end(self, state: str) -> None:
        self._client.set_terminated(self._run_id, _STATUS.get(state, "FAILED"))


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Raise `Refused` for errors that a repeat does not cure: of the request, or of a missing package of a store."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        status = int(error.get_http_status_code())  # type: ignore[no-untyped-call]
        if 400 <= status < 500 and status not in _REPEATABLE:
            raise Refused(error.message) from None
        raise
    except ImportError as error:
        raise Refused(str(error)) from None


def flatten(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted keys and texts, cut to the length that a server takes."""
    for key, value in values.items():
        where = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping):
            yield from flatten(value, where)
        else:
            yield where, str(value)[:_PARAMETER_LENGTH]
