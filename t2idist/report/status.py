"""How runs stand, read from storage alone: ``python -m t2idist.run --list STORAGE`` and ``--status RUN``."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from t2idist import storage
from t2idist.config.strict import parse_yaml
from t2idist.engine.checkpoint import format
from t2idist.observability.progress import count, duration, losses_in_short
from t2idist.report.run_folder import json_or

SILENT_SECONDS = 300.0
"""A run that has not told of a step for so long is not said to be training."""
_MOST_RESTARTS = 10


@dataclass(frozen=True)
class Stage:
    """export_images: of its export; None: there is none yet. images, budget_images: seen, and in all."""

    name: str
    system: str
    images: int
    budget_images: int
    export_images: int | None


@dataclass(frozen=True)
class State:
    """A run. word: finished, failed, stopped, interrupted, training, silent or new. error: why, where that is known.

    silent_seconds: since it was last heard of; None: never. attempts: as attempts.json has them.
    """

    url: str
    name: str
    word: str
    error: str | None
    stages: tuple[Stage, ...]
    progress: Mapping[str, Any]
    silent_seconds: float | None
    attempts: Sequence[Mapping[str, Any]]

    @property
    def present(self) -> Stage:
        """The stage that it is in."""
        return next((stage for stage in self.stages if stage.export_images is None), self.stages[-1])

    @property
    def restarts(self) -> int:
        return max(0, len(self.attempts) - 1)


def read(url: str, moment: datetime.datetime) -> State:
    """The run in folder `url` as of `moment`. Raises ValueError where there is none."""
    where = storage.join(url, "config.yaml")
    try:
        config = parse_yaml(storage.read_bytes(where).decode(), storage.redact(where))
    except FileNotFoundError:
        raise ValueError(f"{storage.redact(url)}: no run here (config.yaml is missing)") from None
    progress, attempts = json_or(url, "progress.json", {}), json_or(url, "attempts.json", [])
    try:
        stages = tuple(_stage(url, name, values, progress) for name, values in config["stages"].items())
        name = str(config["name"])
        silent = _since(str(progress["time"]), moment) if progress else None
    except (KeyError, TypeError, AttributeError, ValueError) as fault:
        raise ValueError(f"{storage.redact(url)}: not the folder of a run: {fault!r}") from None
    word, error = _word(url, stages, silent)
    return State(url, name, word, error, stages, progress, silent, attempts)


def _stage(url: str, name: str, config: Mapping[str, Any], progress: Mapping[str, Any]) -> Stage:
    exported = json_or(url, f"{name}/export/export.json", None)
    images = int(exported["images"]) if exported else 0
    if not exported and progress.get("stage") == name:
        images = int(progress["images"])
    return Stage(name, config["system"], images, int(config["images"]), images if exported else None)


def _word(url: str, stages: Sequence[Stage], silent: float | None) -> tuple[str, str | None]:
    if all(stage.export_images is not None for stage in stages):
        return "finished", None
    outcome, fatal = json_or(url, "outcome.json", None), json_or(url, "fatal.json", None)
    if fatal is not None:
        return "failed", str(fatal["error"])
    if outcome is not None:
        return str(outcome["state"]), outcome["error"]
    if silent is None:
        return "new", None
    return ("training" if silent < SILENT_SECONDS else "silent"), None


def listing(storage_url: str) -> str:
    """A line a run under `storage_url`, the latest heard of first. Raises ValueError where there is none."""
    moment = datetime.datetime.now(datetime.UTC)
    found: list[State] = []
    broken: list[str] = []
    for name in storage.list_dir(storage_url):
        url = storage.join(storage_url, name)
        if storage.exists(storage.join(url, "config.yaml")):
            try:
                found.append(read(url, moment))
            except ValueError as fault:
                broken.append(str(fault))
    if not found and not broken:
        raise ValueError(f"--list: {storage.redact(storage_url)}: no runs here; give the folder that runs lie in")
    found.sort(key=lambda state: float("inf") if state.silent_seconds is None else state.silent_seconds)
    rows = [("run", "state", "stage", "images", "checkpoint", "restarts", "last word"), *map(_row, found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *broken])


def _row(state: State) -> tuple[str, ...]:
    stage = state.present
    checkpoints = format.list_committed(storage.join(state.url, stage.name, "checkpoints"))
    return (
        state.name,
        state.word,
        f"{stage.name} {state.stages.index(stage) + 1}/{len(state.stages)}",
        f"{count(stage.images)}/{count(stage.budget_images)}",
        count(format.images_of(checkpoints[0])) if checkpoints else "-",
        str(state.restarts),
        "-" if state.silent_seconds is None else f"{duration(state.silent_seconds)} ago",
    )


def page(url: str) -> str:
    """What a person asks of a run. Raises ValueError where there is none."""
    moment = datetime.datetime.now(datetime.UTC)
    state = read(url.rstrip("/"), moment)
    lines = [f"{state.name}: {state.word}{f': {state.error}' if state.error else ''}"]
    lines += [f"  {title:<11} {text}" for title, text in _facts(state, moment)]
    return "\n".join(lines)


def _facts(state: State, moment: datetime.datetime) -> Iterator[tuple[str, str]]:
    yield "folder", storage.redact(state.url)
    progress = state.progress
    if state.silent_seconds is not None:
        speed = f", {progress['images_per_second']:g} images/s on {progress['workers']} workers"
        left = progress.get("seconds_left")
        speed += f", {duration(left)} left in the stage" if left is not None else ""
        told = f"{_short(str(progress['time']))} ({duration(state.silent_seconds)} ago)"
        yield "last word", told + (speed if state.word == "training" else "")
    for stage in state.stages:
        yield "stage", _stage_text(state, stage, moment)
    for stage in state.stages:
        yield from _scores(state.url, stage)
    if rows := json_or(state.url, "scores.json", []):
        yield "scores", _rows(rows)
    if losses := progress.get("losses"):
        yield "losses", ", ".join(losses_in_short(losses))
    if quarantined := (progress.get("values") or {}).get("data/quarantined"):
        yield (
            "quarantine",
            f"{quarantined:.0f} samples of stage {progress['stage']}: {progress['stage']}/quarantine.json",
        )
    yield "restarts", str(state.restarts)
    first = max(1, len(state.attempts) - _MOST_RESTARTS)
    for number, attempt in enumerate(state.attempts[first:], first):
        yield "", f"{number}: {_short(attempt['time'])}, {attempt['workers']} workers{_resumed(attempt)}"
    for text in progress.get("messages") or []:
        yield "message", text
    versions = json_or(state.url, "versions.json", {})
    shown = [f"{name} {versions[name]}" for name in ("t2idist", "git", "torch", "ray") if name in versions]
    if shown:
        yield "versions", ", ".join(shown)


def _stage_text(state: State, stage: Stage, moment: datetime.datetime) -> str:
    text = f"{stage.name} ({stage.system}): "
    if stage.export_images is not None:
        return f"{text}done, {stage.export_images:,} images"
    text += f"{stage.images:,} of {stage.budget_images:,} images" if stage is state.present else "not begun"
    folder = storage.join(state.url, stage.name, "checkpoints")
    names = format.list_committed(folder)
    if not names:
        return text
    marker = storage.read_json(storage.join(folder, names[0], format.COMMIT))
    age = f", {duration(_since(marker['time'], moment))} ago" if "time" in marker else ""
    return f"{text}; newest checkpoint at {format.images_of(names[0]):,} images{age} ({len(names)} whole)"


def _scores(url: str, stage: Stage) -> Iterator[tuple[str, str]]:
    if best := json_or(url, f"{stage.name}/scored/best.json", None):
        score = f"{best['metric']} {_number(best['value'])}"
        yield "best so far", f"{stage.name}: {score} at {best['images']:,} images, in {best['export']}"
    if scores := json_or(url, f"{stage.name}/scores/scores.json", None):
        yield "scores", f"{stage.name}: {_rows(scores['scores'])}"


def _rows(rows: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{row['name']} {_number(row['value'])}" for row in rows)


def _resumed(attempt: Mapping[str, Any]) -> str:
    places = attempt.get("resumed") or {}
    parts = [f"{stage} from {place['images']:,} images ({_source(place['from'])})" for stage, place in places.items()]
    return f", {', '.join(parts)}" if parts else ""


def _source(place: str) -> str:
    return f"checkpoint {place.rpartition('/')[2]}" if "/" in place else place


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"


def _short(time_iso: str) -> str:
    return time_iso[:19].replace("T", " ")


def _since(time_iso: str, moment: datetime.datetime) -> float:
    return max(0.0, (moment - datetime.datetime.fromisoformat(time_iso)).total_seconds())
