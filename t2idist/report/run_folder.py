"""Read the files of a run folder for the report. Files that do not exist yet are left out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from t2idist import storage
from t2idist.config.strict import parse_yaml
from t2idist.observability.recovery import format_recovery

NOT_METRICS = ("images", "step", "seconds", "images_per_second", "restarts", "time")
_IMAGE_NAME = re.compile(r"^(images|attention|translated)_(\d+)\.png$")

Points = tuple[tuple[float, ...], tuple[float, ...]]
"""Images seen, and the values there."""


@dataclass(frozen=True)
class ImageFile:
    """An image file that training wrote."""

    images_seen: int
    url: str


@dataclass(frozen=True)
class Restart:
    """A restart after which training continued."""

    number: int
    time: str
    workers: int
    """0 if unknown."""
    stage: str
    images: int
    """Images seen at the first metrics after it."""
    recovery: str
    """Its cause, seconds and repeated images; empty if it was a new submission."""


@dataclass(frozen=True)
class StageRecord:
    """The files of one stage."""

    name: str
    system: str
    metrics: tuple[Mapping[str, Any], ...]
    """Lines of metrics.jsonl, in order of images."""
    grids: tuple[ImageFile, ...]
    """Grids of generated or translated images."""
    attention: tuple[ImageFile, ...]
    translates: bool
    """Whether `grids` show translated images."""
    export_url: str
    export: Mapping[str, Any] | None
    score_history: tuple[Mapping[str, Any], ...]
    """Scores during training (evaluate/in_training.py)."""
    best: Mapping[str, Any] | None
    scores: Mapping[str, Any] | None
    """The result of evaluate/score.py."""
    scores_url: str

    @property
    def images(self) -> int:
        return int(self.metrics[-1]["images"]) if self.metrics else 0

    @property
    def seconds(self) -> float:
        return float(self.metrics[-1].get("seconds", 0.0)) if self.metrics else 0.0

    def metric_names(self) -> list[str]:
        """Return the names of losses and metrics, in order of first appearance."""
        return [name for name in _numeric_names(self.metrics) if name not in NOT_METRICS]

    def series(self, name: str) -> Points:
        """Return the points of a metric."""
        return points_of(self.metrics, name)

    def score_names(self) -> list[str]:
        """Return the names of scores with more than one point, sorted."""
        names = _numeric_names(self.score_history)
        return sorted(name for name in names if name != "images" and len(self.score_series(name)[0]) > 1)

    def score_series(self, name: str) -> Points:
        """Return the points of a score during training."""
        return points_of(self.score_history, name)


@dataclass(frozen=True)
class RunFolder:
    """The files of a run."""

    url: str
    name: str
    config_text: str
    """The resolved YAML."""
    config: Mapping[str, Any]
    versions: Mapping[str, Any]
    progress: Mapping[str, Any]
    stages: tuple[StageRecord, ...]
    restarts: tuple[Restart, ...]
    scores: tuple[Mapping[str, Any], ...]


def read_run(url: str) -> RunFolder:
    """Read a run folder. Raises ValueError if there is no run."""
    config_text, config = read_config(url)
    stages = [_read_stage(url, str(name), values or {}) for name, values in (config.get("stages") or {}).items()]
    return RunFolder(
        url=url,
        name=str(config.get("name", url.rstrip("/").rpartition("/")[2])),
        config_text=config_text,
        config=config,
        versions=read_json_or(url, "versions.json", {}),
        progress=read_json_or(url, "progress.json", {}),
        stages=tuple(stages),
        restarts=tuple(_restarts(stages, read_json_or(url, "attempts.json", []))),
        scores=tuple(read_json_or(url, "scores.json", [])),
    )


def read_config(url: str) -> tuple[str, dict[str, Any]]:
    """Read a run's config.yaml. Returns its text and its keys; raises ValueError if there is no run."""
    config_url = storage.join(url, "config.yaml")
    try:
        text = storage.read_bytes(config_url).decode("utf-8")
    except FileNotFoundError:
        raise ValueError(f"{storage.redact(url)}: no run here (config.yaml is missing)") from None
    config = parse_yaml(text, storage.redact(config_url))
    if not isinstance(config, dict):
        raise ValueError(f"{storage.redact(config_url)}: expected a mapping of keys")
    return text, config


def _read_stage(url: str, name: str, config: Mapping[str, Any]) -> StageRecord:
    folder = storage.join(url, name)
    image_files = _image_files(folder)
    return StageRecord(
        name=name,
        system=str(config.get("system", name)),
        metrics=tuple(read_lines(storage.join(folder, "metrics.jsonl"))),
        grids=tuple(image_files["images"] or image_files["translated"]),
        attention=tuple(image_files["attention"]),
        translates=bool(image_files["translated"]),
        export_url=storage.join(folder, "export"),
        export=read_json_or(folder, "export/export.json", None),
        score_history=tuple(read_lines(storage.join(folder, "scored/scores.jsonl"))),
        best=read_json_or(folder, "scored/best.json", None),
        scores=read_json_or(folder, "scores/scores.json", None),
        scores_url=storage.join(folder, "scores"),
    )


def _image_files(folder: str) -> dict[str, list[ImageFile]]:
    """List the images of a stage's folder by kind, in order of images seen."""
    image_files: dict[str, list[ImageFile]] = {"images": [], "attention": [], "translated": []}
    for file in storage.list_dir(storage.join(folder, "pictures")):
        match = _IMAGE_NAME.match(file)
        if match:
            image_files[match[1]].append(ImageFile(int(match[2]), storage.join(folder, "pictures", file)))
    for files in image_files.values():
        files.sort(key=lambda file: file.images_seen)
    return image_files


def grids_of(folder: str) -> list[ImageFile]:
    """Return the grids of generated or translated images in a stage's folder, in order of images seen."""
    files = _image_files(folder)
    return files["images"] or files["translated"]


def read_json_or(url: str, name: str, default: Any) -> Any:
    """Read a JSON file of a folder; return `default` if there is none."""
    value = storage.read_json_if_present(storage.join(url, name))
    return default if value is None else value


def read_lines(url: str) -> list[Mapping[str, Any]]:
    """Read the lines of a metrics file, without any that was cut off because a worker died while writing it."""
    try:
        text = storage.read_bytes(url).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    lines: list[Mapping[str, Any]] = []
    for raw in text.splitlines():
        try:
            line = json.loads(raw)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and _is_number(line.get("images")):
            lines.append(line)
    return lines


def _restarts(stages: Sequence[StageRecord], attempts: Sequence[Mapping[str, Any]]) -> list[Restart]:
    """List the restarts after which metrics were written; attempt 0 is the first start."""
    restarts: list[Restart] = []
    for stage in stages:
        for line in stage.metrics:
            for k in range(len(restarts) + 1, int(line.get("restarts") or 0) + 1):
                attempt = attempts[k] if k < len(attempts) else {"time": line.get("time", ""), "workers": 0}
                images = int(line["images"])
                recovery = format_recovery(attempt.get("recovery"))
                restarts.append(Restart(k, str(attempt["time"]), int(attempt["workers"]), stage.name, images, recovery))
    return restarts


def points_of(lines: Iterable[Mapping[str, Any]], name: str) -> Points:
    points = [(float(line["images"]), float(line[name])) for line in lines if _is_number(line.get(name))]
    return tuple(x for x, _ in points), tuple(y for _, y in points)


def _numeric_names(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of numbers, in order of first appearance."""
    return list(dict.fromkeys(name for line in lines for name, value in line.items() if _is_number(value)))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
