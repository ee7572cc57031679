"""Prometheus metrics: the dashboard and alerts in cluster/ use the names of the code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.util.metrics import Gauge

from t2idist.observability import prometheus
from tests.helpers.runs import (
    progress_message,
)

CLUSTER = Path(__file__).parents[2] / "cluster"
USED = re.compile(rf"\b{prometheus.PREFIX}(t2idist_\w+)")


def dashboard() -> dict[str, Any]:
    return dict(json.loads((CLUSTER / "grafana.json").read_text()))


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((CLUSTER / "alerts.yaml").read_text())["groups"]
    return list(group["rules"])


def test_dashboard_queries_the_metrics_of_the_code() -> None:
    queries = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    assert set(USED.findall("\n".join(queries))) == set(prometheus.METRICS)
    positions = [tuple(panel["gridPos"].values()) for panel in dashboard()["panels"]]
    cells = [(column, row) for x, y, w, h in positions for column in range(x, x + w) for row in range(y, y + h)]
    assert len(cells) == len(set(cells)) and max(column for column, _ in cells) < 24
    for query in queries:
        labels = set(re.findall(r"[{,](\w+)[!=]", query)) | set(re.findall(r"by \((\w+)\)", query))
        for name in USED.findall(query):
            assert labels <= {"run", *prometheus.LABELS.get(name, ())}, query


def test_alerts_query_the_metrics_of_the_code() -> None:
    for rule in rules():
        names = USED.findall(rule["expr"])
        assert names and set(names) <= set(prometheus.METRICS), rule["alert"]
        assert rule["annotations"].keys() == {"summary", "description"} and rule["labels"]["severity"]
    wanted = ("step_timestamp_seconds", "checkpoint_timestamp_seconds", "skipped_steps", "quarantined_samples")
    text = "\n".join(rule["expr"] for rule in rules())
    assert all(f"ray_t2idist_{name}" in text for name in wanted)


def test_progress_message_sets_every_gauge(tmp_path: Path) -> None:
    readings = list(prometheus.readings(progress_message(tmp_path, **{"memory/device_gib": 1.5})))
    names = {name for name, _, _ in readings}
    assert names | {"t2idist_goodput_ratio", "t2idist_recoveries"} == set(prometheus.METRICS)
    assert all(len(labels) == len(prometheus.LABELS.get(name, ())) for name, labels, _ in readings)
    values = {(name, *labels): value for name, labels, value in readings}
    assert values["t2idist_step_seconds", "train"] == 1.0 and values["t2idist_step_seconds", "data"] == 0.5
    assert values["t2idist_loss", "gan", "generator/adversarial_64"] == 1.5
    assert values["t2idist_checkpoint_timestamp_seconds",] == 1795323600.0
    assert values["t2idist_quarantined_samples",] == 4.0 and values["t2idist_device_memory_bytes",] == 1.5 * 2**30


def test_first_progress_message_of_a_stage_is_accepted(tmp_path: Path) -> None:
    first = {**progress_message(tmp_path), "values": {}, "losses": {}, "checkpoint": {}}
    names = {name for name, _, _ in prometheus.readings(first)}
    assert "t2idist_images" in names and "t2idist_step_seconds" not in names
    prometheus.Gauges("x", Gauge).update(first)


def test_recoveries_are_counted_once_by_cause() -> None:
    recoveries = prometheus.Recoveries()
    lost, resize = {"cause": "worker lost"}, {"cause": "resize"}
    assert recoveries.update({"restarts": 0}) == {}
    messages = [(1, lost), (1, lost), (2, None), (2, lost), (3, resize), (3, resize)]
    for restarts, recovery in messages:
        counts = recoveries.update({"restarts": restarts} | ({"recovery": recovery} if recovery else {}))
    assert counts == {"worker lost": 2, "resize": 1}


def test_goodput_counts_the_seconds_of_kept_steps() -> None:
    goodput = prometheus.Goodput(1000.0)
    assert goodput.update({"stage": "a", "seconds": 50.0}, 1010.0) == 0.0  # from an earlier submission
    assert goodput.update({"stage": "a", "seconds": 80.0}, 1040.0) == pytest.approx(30 / 40)
    assert goodput.update({"stage": "a", "seconds": 70.0}, 1080.0) == pytest.approx(20 / 80)  # a restart lost some
    assert goodput.update({"stage": "b", "seconds": 0.0}, 1090.0) == pytest.approx(20 / 90)
    assert goodput.update({"stage": "b", "seconds": 10.0}, 1100.0) == pytest.approx(30 / 100)
