"""What a run left in its folder, read for the report. Whatever is missing is simply not there yet."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from t2idist import storage
from t2idist.config.strict import parse_yaml

NOT_METRICS = ("images", "step", "seconds", "images_per_second", "restarts", "time")
_PICTURE = re.compile(r"^(images|attention|translated)_(\d+)\.png$")


@dataclass(frozen=True)
class Drawn:
    """A picture file and the number of images that training had seen."""

    images: int
    url: str


@dataclass(frozen=True)
class Restart:
    """A restart: when it began (ISO), on how many workers (0: not known), and where its first metrics were reported."""

    number: int
    time: str
    workers: int
    stage: str
    images: int


@dataclass(frozen=True)
class Stage:
    """One stage. metrics: lines of metrics.jsonl in order of images. grids: of captions or of translated pictures.

    scored, best: in training (evaluate/during.py). scores: what evaluate/score.py left in folder scores_url.
    """

    name: str
    system: str
    budget_images: int | None
    metrics: tuple[Mapping[str, Any], ...]
    grids: tuple[Drawn, ...]
    attention: tuple[Drawn, ...]
    translates: bool
    export_url: str
    export: Mapping[str, Any] | None
    scored: tuple[Mapping[str, Any], ...]
    best: Mapping[str, Any] | None
    scores: Mapping[str, Any] | None
    scores_url: str

    @property
    def images(self) -> int:
        return int(self.metrics[-1]["images"]) if self.metrics else 0

    @property
    def seconds(self) -> float:
        return float(self.metrics[-1].get("seconds", 0.0)) if self.metrics else 0.0

    def series(self, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The points (images, value) of a metric."""
        points = [(float(m["images"]), float(m[name])) for m in self.metrics if _is_number(m.get(name))]
        return tuple(x for x, _ in points), tuple(y for _, y in points)

    def scored_names(self) -> list[str]:
        """What was scored in training more than once."""
        names = {name for line in self.scored for name, value in line.items() if _is_number(value)} - {"images"}
        return sorted(name for name in names if len(self.scored_series(name)[0]) > 1)

    def scored_series(self, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The points (images, value) of a score."""
        points = [(float(line["images"]), float(line[name])) for line in self.scored if _is_number(line.get(name))]
        return tuple(x for x, _ in points), tuple(y for _, y in points)

    def metric_names(self) -> list[str]:
        """Names of losses and metrics, in order of first appearance."""
        names: dict[str, None] = {}
        for metric in self.metrics:
            names.update((k, None) for k, v in metric.items() if k not in NOT_METRICS and _is_number(v))
        return list(names)


@dataclass(frozen=True)
class RunFolder:
    """A whole run folder. config_text: the resolved YAML as it stands; scores: rows of scores.json."""

    url: str
    name: str
    config_text: str
    config: Mapping[str, Any]
    versions: Mapping[str, Any]
    progress: Mapping[str, Any]
    stages: tuple[Stage, ...]
    restarts: tuple[Restart, ...]
    scores: tuple[Mapping[str, Any], ...]


def read(url: str) -> RunFolder:
    """Read a run folder. Raises ValueError where there is no run."""
    config_url = storage.join(url, "config.yaml")
    try:
        config_text = storage.read_bytes(config_url).decode("utf-8")
    except FileNotFoundError:
        raise ValueError(f"{storage.redact(url)}: no run here (config.yaml is missing)") from None
    config = parse_yaml(config_text, storage.redact(config_url))
    if not isinstance(config, dict):
        raise ValueError(f"{storage.redact(config_url)}: expected a mapping of keys")
    stages = [_stage(url, str(name), values or {}) for name, values in (config.get("stages") or {}).items()]
    return RunFolder(
        url=url,
        name=str(config.get("name", url.rstrip("/").rpartition("/")[2])),
        config_text=config_text,
        config=config,
        versions=json_or(url, "versions.json", {}),
        progress=json_or(url, "progress.json", {}),
        stages=tuple(stages),
        restarts=tuple(_restarts(stages, json_or(url, "attempts.json", []))),
        scores=tuple(json_or(url, "scores.json", [])),
    )


def _stage(url: str, name: str, config: Mapping[str, Any]) -> Stage:
    folder = storage.join(url, name)
    pictures: dict[str, list[Drawn]] = {"images": [], "attention": [], "translated": []}
    for file in storage.list_dir(storage.join(folder, "pictures")):
        found = _PICTURE.match(file)
        if found:
            pictures[found[1]].append(Drawn(int(found[2]), storage.join(folder, "pictures", file)))
    return Stage(
        name=name,
        system=str(config.get("system", name)),
        budget_images=config.get("images"),
        metrics=tuple(_lines(storage.join(folder, "metrics.jsonl"))),
        grids=tuple(sorted(pictures["images"] or pictures["translated"], key=lambda drawn: drawn.images)),
        translates=bool(pictures["translated"]),
        attention=tuple(sorted(pictures["attention"], key=lambda drawn: drawn.images)),
        export_url=storage.join(folder, "export"),
        export=json_or(folder, "export/export.json", None),
        scored=tuple(_lines(storage.join(folder, "scored/scores.jsonl"))),
        best=json_or(folder, "scored/best.json", None),
        scores=json_or(folder, "scores/scores.json", None),
        scores_url=storage.join(folder, "scores"),
    )


def json_or(url: str, name: str, default: Any) -> Any:
    """A JSON file of a folder, or `default` where there is none."""
    try:
        return storage.read_json(storage.join(url, name))
    except FileNotFoundError:
        return default


def _lines(url: str) -> list[Mapping[str, Any]]:
    """Lines of a metrics file; a torn line (a worker died while writing) is left out."""
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


def _restarts(stages: list[Stage], attempts: list[Mapping[str, Any]]) -> list[Restart]:
    """The restarts that trained on; attempt number 0 is the first start."""
    found: list[Restart] = []
    for stage in stages:
        for line in stage.metrics:
            number = int(line.get("restarts") or 0)
            for k in range(len(found) + 1, number + 1):
                attempt = attempts[k] if k < len(attempts) else {"time": line.get("time", ""), "workers": 0}
                found.append(Restart(k, str(attempt["time"]), int(attempt["workers"]), stage.name, int(line["images"])))
    return found


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and value == value
        and abs(value) != float("inf")
    )
