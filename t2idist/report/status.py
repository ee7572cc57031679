"""Show the state of runs from storage alone: ``t2idist status``, and the ``--status`` and ``--list`` of a run."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from t2idist import storage
from t2idist.config.arguments import command_parser
from t2idist.engine.checkpoint import format
from t2idist.observability.command import command
from t2idist.observability.progress import format_count, format_duration, summarize_losses
from t2idist.observability.recovery import format_recovery
from t2idist.report.run_folder import read_config, read_json_or

SILENT_SECONDS = 300.0
"""Without a report for this long, a run counts as silent, not as training."""
_MAX_RESTARTS_SHOWN = 10


@dataclass(frozen=True)
class StageStatus:
    """The progress of one stage."""

    name: str
    system: str
    images: int
    budget_images: int
    export_images: int | None
    """Images seen by the exported model; None without an export."""


@dataclass(frozen=True)
class RunStatus:
    """The progress of a run."""

    url: str
    name: str
    state: str
    """finished, failed, stopped, interrupted, training, silent or new."""
    error: str | None
    stages: tuple[StageStatus, ...]
    progress: Mapping[str, Any]
    silent_seconds: float | None
    """Seconds since the last report; None before the first."""
    attempts: Sequence[Mapping[str, Any]]

    @property
    def current_stage(self) -> StageStatus:
        return next((stage for stage in self.stages if stage.export_images is None), self.stages[-1])

    @property
    def restarts(self) -> int:
        return max(0, len(self.attempts) - 1)


def read_status(url: str, now: datetime.datetime) -> RunStatus:
    """Read the state of the run in folder `url` at time `now`. Raises ValueError if there is no run."""
    _, config = read_config(url)
    progress, attempts = read_json_or(url, "progress.json", {}), read_json_or(url, "attempts.json", [])
    try:
        stages = tuple(_read_stage(url, name, values, progress) for name, values in config["stages"].items())
        name = str(config["name"])
        silent_seconds = _seconds_since(str(progress["time"]), now) if progress else None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{storage.redact(url)}: not the folder of a run: {error!r}") from None
    state, reason = _read_state(url, stages, silent_seconds)
    return RunStatus(url, name, state, reason, stages, progress, silent_seconds, attempts)


def _read_stage(url: str, name: str, config: Mapping[str, Any], progress: Mapping[str, Any]) -> StageStatus:
    export = read_json_or(url, f"{name}/export/export.json", None)
    images = int(export["images"]) if export else 0
    if not export and progress.get("stage") == name:
        images = int(progress["images"])
    return StageStatus(name, config["system"], images, int(config["images"]), images if export else None)


def _read_state(url: str, stages: Sequence[StageStatus], silent_seconds: float | None) -> tuple[str, str | None]:
    if all(stage.export_images is not None for stage in stages):
        return "finished", None
    outcome, fatal = read_json_or(url, "outcome.json", None), read_json_or(url, "fatal.json", None)
    if fatal is not None:
        return "failed", str(fatal["error"])
    if outcome is not None:
        return str(outcome["state"]), outcome["error"]
    if silent_seconds is None:
        return "new", None
    return ("training" if silent_seconds < SILENT_SECONDS else "silent"), None


def format_run_list(storage_url: str) -> str:
    """Format a table of the runs under `storage_url`, most recent report first. Raises ValueError if there are none."""
    now = datetime.datetime.now(datetime.UTC)
    runs: list[RunStatus] = []
    errors: list[str] = []
    for name in storage.list_dir(storage_url):
        url = storage.join(storage_url, name)
        if storage.exists(storage.join(url, "config.yaml")):
            try:
                runs.append(read_status(url, now))
            except ValueError as error:
                errors.append(str(error))
    if not runs and not errors:
        raise ValueError(f"--list: {storage.redact(storage_url)}: no runs here; give the folder that contains runs")
    runs.sort(key=lambda run: float("inf") if run.silent_seconds is None else run.silent_seconds)
    rows = [("run", "state", "stage", "images", "checkpoint", "restarts", "last report"), *map(_row, runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *errors])


def _row(run: RunStatus) -> tuple[str, ...]:
    stage = run.current_stage
    checkpoints = format.list_committed(storage.join(run.url, stage.name, "checkpoints"))
    return (
        run.name,
        run.state,
        f"{stage.name} {run.stages.index(stage) + 1}/{len(run.stages)}",
        f"{format_count(stage.images)}/{format_count(stage.budget_images)}",
        format_count(format.images_of(checkpoints[0])) if checkpoints else "-",
        str(run.restarts),
        "-" if run.silent_seconds is None else f"{format_duration(run.silent_seconds)} ago",
    )


def format_status(url: str) -> str:
    """Format the state of one run. Raises ValueError if there is no run."""
    now = datetime.datetime.now(datetime.UTC)
    run = read_status(url.rstrip("/"), now)
    lines = [f"{run.name}: {run.state}{f': {run.error}' if run.error else ''}"]
    lines += [f"  {title:<11} {text}" for title, text in _facts(run, now)]
    return "\n".join(lines)


def _facts(run: RunStatus, now: datetime.datetime) -> Iterator[tuple[str, str]]:
    yield "folder", storage.redact(run.url)
    progress = run.progress
    if run.silent_seconds is not None:
        text = f"{_short_time(str(progress['time']))} ({format_duration(run.silent_seconds)} ago)"
        if run.state == "training":
            text += f", {progress['images_per_second']:g} images/s on {_count_workers(progress)}"
            left = progress.get("seconds_left")
            text += f", {format_duration(left)} left in the stage" if left is not None else ""
        yield "last report", text
    for stage in run.stages:
        yield "stage", _format_stage(run, stage, now)
    for stage in run.stages:
        yield from _stage_scores(run.url, stage)
    if rows := read_json_or(run.url, "scores.json", []):
        yield "scores", _format_scores(rows)
    if losses := progress.get("losses"):
        yield "losses", ", ".join(summarize_losses(losses))
    if quarantined := (progress.get("values") or {}).get("data/quarantined"):
        stage_name = progress["stage"]
        yield "quarantine", f"{quarantined:.0f} samples of stage {stage_name}: {stage_name}/quarantine.json"
    yield "restarts", str(run.restarts)
    first = max(1, len(run.attempts) - _MAX_RESTARTS_SHOWN)
    for number, attempt in enumerate(run.attempts[first:], first):
        yield "", f"{number}: {_short_time(attempt['time'])}, {_count_workers(attempt)}{_format_resumed(attempt)}"
        if text := format_recovery(attempt.get("recovery")):
            yield "", f"   {text}"
    for text in progress.get("messages") or []:
        yield "message", text
    versions = read_json_or(run.url, "versions.json", {})
    shown = [f"{name} {versions[name]}" for name in ("t2idist", "git", "torch", "ray") if name in versions]
    if shown:
        yield "versions", ", ".join(shown)


def _count_workers(record: Mapping[str, Any]) -> str:
    return f"{record['workers']} worker{'s' * (record['workers'] != 1)}"


def _format_stage(run: RunStatus, stage: StageStatus, now: datetime.datetime) -> str:
    text = f"{stage.name} ({stage.system}): "
    if stage.export_images is not None:
        return f"{text}done, {stage.export_images:,} images"
    text += f"{stage.images:,} of {stage.budget_images:,} images" if stage is run.current_stage else "not started"
    folder = storage.join(run.url, stage.name, "checkpoints")
    names = format.list_committed(folder)
    if not names:
        return text
    marker = storage.read_json(storage.join(folder, names[0], format.COMMIT))
    age = f", {format_duration(_seconds_since(marker['time'], now))} ago" if "time" in marker else ""
    return f"{text}; newest checkpoint at {format.images_of(names[0]):,} images{age} ({len(names)} complete)"


def _stage_scores(url: str, stage: StageStatus) -> Iterator[tuple[str, str]]:
    if best := read_json_or(url, f"{stage.name}/scored/best.json", None):
        score = f"{best['metric']} {_format_value(best['value'])}"
        yield "best so far", f"{stage.name}: {score} at {best['images']:,} images, in {best['export']}"
    if scores := read_json_or(url, f"{stage.name}/scores/scores.json", None):
        yield "scores", f"{stage.name}: {_format_scores(scores['scores'])}"


def _format_scores(rows: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{row['name']} {_format_value(row['value'])}" for row in rows)


def _format_resumed(attempt: Mapping[str, Any]) -> str:
    text = ""
    for name, point in (attempt.get("resumed") or {}).items():
        _, slash, checkpoint = point["from"].rpartition("/")
        text += f", {name} from {point['images']:,} images ({f'checkpoint {checkpoint}' if slash else point['from']})"
    return text


def _format_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"


def _short_time(time_iso: str) -> str:
    return time_iso[:19].replace("T", " ")


def _seconds_since(time_iso: str, now: datetime.datetime) -> float:
    return max(0.0, (now - datetime.datetime.fromisoformat(time_iso)).total_seconds())


@command("status")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``t2idist status``; returns the exit status."""
    parser = command_parser(
        "status", "Show the state of a run, or of all runs in a folder.", "t2idist status runs/attngan-demo"
    )
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("run", nargs="?", metavar="RUN", help="the run's folder")
    choice.add_argument("--list", metavar="STORAGE", help="list the runs in this folder or bucket")
    options = parser.parse_args(arguments)
    print(format_status(options.run) if options.list is None else format_run_list(options.list))
    return 0
