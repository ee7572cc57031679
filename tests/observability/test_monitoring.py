"""What Prometheus, Grafana and the log's readers get: the names that stand in cluster/ are those of the code."""

from __future__ import annotations

import datetime
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.util.metrics import Gauge

from t2idist.engine.metrics import MetricLogger
from t2idist.observability import logs, prometheus
from t2idist.observability.progress import ProgressPrinter

CLUSTER = Path(__file__).parents[2] / "cluster"
USED = re.compile(rf"\b{prometheus.PREFIX}(t2idist_\w+)")


def dashboard() -> dict[str, Any]:
    return dict(json.loads((CLUSTER / "grafana.json").read_text()))


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((CLUSTER / "alerts.yaml").read_text())["groups"]
    return list(group["rules"])


def message(folder: Path, **more: Any) -> dict[str, Any]:
    """A progress message as a worker's log tells it."""
    told: list[dict[str, Any]] = []
    facts = {"run": "x", "stage": "gan", "stage_index": 0, "stages": 1, "restarts": 2, "workers": 3, "messages": []}
    facts["checkpoint"] = {"images": 8, "time": "2026-11-22T05:00:00+00:00", "stall_seconds": 0.25}
    log = MetricLogger(str(folder), "gan", images=0, step=0, budget_images=80, metadata=facts, on_progress=told.append)
    log.log_step(16)
    others = {"data/wait_share": 0.25, "data/bad_samples": 1.0, "data/quarantined": 4.0, "guard/skipped_steps": 5.0}
    others |= {"time/step": 2.0, "time/data": 0.5, "time/pictures": 0.25, "time/checkpoint": 0.25}
    log.log_metrics({"generator/adversarial_64": 1.5}, others | more, 2)
    log.log_state("training")
    log.close()
    return told[-1]


def test_the_dashboard_shows_what_the_code_emits() -> None:
    queries = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    assert set(USED.findall("\n".join(queries))) == set(prometheus.METRICS)
    places = [tuple(panel["gridPos"].values()) for panel in dashboard()["panels"]]
    cells = [(column, row) for x, y, w, h in places for column in range(x, x + w) for row in range(y, y + h)]
    assert len(cells) == len(set(cells)) and max(column for column, _ in cells) < 24
    for query in queries:
        labels = set(re.findall(r"[{,](\w+)[!=]", query)) | set(re.findall(r"by \((\w+)\)", query))
        for name in USED.findall(query):
            assert labels <= {"run", *prometheus.LABELS.get(name, ())}, query


def test_every_alert_asks_for_what_the_code_emits() -> None:
    for rule in rules():
        found = USED.findall(rule["expr"])
        assert found and set(found) <= set(prometheus.METRICS), rule["alert"]
        assert rule["annotations"].keys() == {"summary", "description"} and rule["labels"]["severity"]
    wanted = ("step_timestamp_seconds", "checkpoint_timestamp_seconds", "skipped_steps", "quarantined_samples")
    text = "\n".join(rule["expr"] for rule in rules())
    assert all(f"ray_t2idist_{name}" in text for name in wanted)


def test_a_progress_message_gives_a_value_to_every_gauge(tmp_path: Path) -> None:
    readings = list(prometheus.readings(message(tmp_path, **{"memory/device_gib": 1.5})))
    named = {name for name, _, _ in readings}
    assert named | {"t2idist_goodput_ratio"} == set(prometheus.METRICS)
    assert all(len(labels) == len(prometheus.LABELS.get(name, ())) for name, labels, _ in readings)
    values = {(name, *labels): value for name, labels, value in readings}
    assert values["t2idist_step_seconds", "train"] == 1.0 and values["t2idist_step_seconds", "data"] == 0.5
    assert values["t2idist_loss", "gan", "generator/adversarial_64"] == 1.5
    assert values["t2idist_checkpoint_timestamp_seconds",] == 1795323600.0
    assert values["t2idist_quarantined_samples",] == 4.0 and values["t2idist_device_memory_bytes",] == 1.5 * 2**30


def test_a_message_of_a_stage_that_has_just_begun_is_read_too(tmp_path: Path) -> None:
    first = {**message(tmp_path), "values": {}, "losses": {}, "checkpoint": {}}
    names = {name for name, _, _ in prometheus.readings(first)}
    assert "t2idist_images" in names and "t2idist_step_seconds" not in names
    prometheus.Gauges("x", Gauge).update(first)


def test_goodput_counts_the_seconds_of_steps_that_were_kept() -> None:
    goodput = prometheus.Goodput(1000.0)
    assert goodput.update({"stage": "a", "seconds": 50.0}, 1010.0) == 0.0  # from an earlier submission
    assert goodput.update({"stage": "a", "seconds": 80.0}, 1040.0) == pytest.approx(30 / 40)
    assert goodput.update({"stage": "a", "seconds": 70.0}, 1080.0) == pytest.approx(20 / 80)  # a restart took some away
    assert goodput.update({"stage": "b", "seconds": 0.0}, 1090.0) == pytest.approx(20 / 90)
    assert goodput.update({"stage": "b", "seconds": 10.0}, 1100.0) == pytest.approx(30 / 100)


def test_log_lines_say_where_they_come_from() -> None:
    place = logs.LogContext("run-1", rank=3, stage="gan", images=lambda: 640)
    record = logging.LogRecord("t2idist.x", logging.WARNING, "", 0, "%d bad samples", (3,), None)
    line = json.loads(logs.JsonFormatter(place).format(record))
    assert datetime.datetime.fromisoformat(line.pop("time")).tzinfo is not None
    assert line == {
        "level": "warning",
        "logger": "t2idist.x",
        "message": "3 bad samples",
        "run": "run-1",
        "stage": "gan",
        "rank": 3,
        "images": 640,
    }
    assert logs.JsonFormatter().format(record) == "WARNING 3 bad samples"


def test_log_lines_hold_no_secrets(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/someone/token")
    logs.configure(logging.WARNING)
    logging.getLogger("t2idist.x").warning("refused: %s of %s", "wJalrXUtnFEMI", "/home/someone/token")
    assert caplog.messages == ["refused: *** of /home/someone/token"]


def test_progress_is_json_where_the_log_is(tmp_path: Path) -> None:
    with open(tmp_path / "out", "w") as stream:
        printer = ProgressPrinter(stream, as_json=True)
        printer.show(message(tmp_path / "run"))
        printer.message("warning: something")
        printer.close()
    first, second = (json.loads(line) for line in (tmp_path / "out").read_text().splitlines())
    assert (first["run"], first["stage"], first["images"], first["rank"]) == ("x", "gan", 16, None)
    assert second == {"level": "warning", "message": "warning: something"}
