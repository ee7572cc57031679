"""The trackers of a stage: which ones the config asks for, and where they have got to."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from t2idist import storage
from t2idist.config import RunConfig
from t2idist.config.strict import to_dict, to_yaml
from t2idist.observability.logs import redact_secrets
from t2idist.observability.mlflow_tracker import MlflowService
from t2idist.observability.tracking import BackgroundTracker, Position, Service, Tracker
from t2idist.observability.wandb_tracker import WandbService
from t2idist.training.stages import StageRun

FOLDER = "trackers"
"""Next to the stage's checkpoints: a file per tracker with the id of its run."""


@dataclass(frozen=True)
class StoredPosition:
    """The position of a tracker, in a file of the stage's folder."""

    url: str

    def load(self) -> Position | None:
        position = storage.read_json_if_present(self.url)
        return None if position is None else Position(**position)

    def save(self, position: Position) -> None:
        storage.write_json(self.url, asdict(position))


def open_trackers(stage: StageRun, environment: Mapping[str, Any]) -> list[Tracker]:
    """Start the trackers of a stage, on the first worker.

    Args:
        environment: versions, commit and hardware (`environment_info`).
    """
    url = storage.join(stage.url, FOLDER)
    return [
        BackgroundTracker(service, StoredPosition(storage.join(url, f"{name}.json")))
        for name, service in _services(stage, environment).items()
    ]


def check(config: RunConfig) -> None:
    """Check that the packages of the trackers are installed. Raises ValueError."""
    for package, value in (("wandb", config.report.wandb), ("mlflow", config.report.mlflow)):
        if value is not None and importlib.util.find_spec(package) is None:
            raise ValueError(f"report.{package}: not installed; install it with: pip install 't2idist[{package}]'")


def _services(stage: StageRun, environment: Mapping[str, Any]) -> dict[str, Service]:
    report, config = stage.config.report, stage.config
    run_name, commit = f"{config.name}/{stage.name}", str(environment["git"])
    values = {**_of_stage(config, stage.name), "versions": dict(environment)}
    services: dict[str, Service] = {}
    if report.mlflow is not None:
        tags = {"run": config.name, "stage": stage.name, "system": stage.settings.system}
        text = redact_secrets(to_yaml(config))
        services["mlflow"] = MlflowService(report.mlflow, run_name, tags, commit, values, text, storage.read_bytes)
    if report.wandb is not None:
        folder = storage.local_path(stage.url)
        services["wandb"] = WandbService(
            report.wandb, run_name, config.name, commit, values, storage.read_bytes, folder
        )  # fmt: skip
    return services


def _of_stage(config: RunConfig, stage: str) -> dict[str, Any]:
    """Return the settings of a run, with those of one stage at `stage` in place of all; without secrets."""
    values: dict[str, Any] = _redacted(to_dict(config))
    return {**{key: value for key, value in values.items() if key != "stages"}, "stage": values["stages"][stage]}


def _redacted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _redacted(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_redacted(each) for each in value]
    return redact_secrets(value) if isinstance(value, str) else value
