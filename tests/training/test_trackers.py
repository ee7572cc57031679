"""Trackers: a real MLflow server and W&B's offline files, over kills, and servers that hang or go away."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from t2idist import storage
from t2idist.config import load
from t2idist.engine.metrics import MetricLogger, read_metrics
from t2idist.observability.mlflow_tracker import MlflowService
from t2idist.observability.tracking import DONE, BackgroundTracker, Tracker, numbers
from t2idist.preflight import dry_run
from t2idist.training.trackers import StoredPosition
from tests.helpers import small_systems
from tests.helpers.mlflow_server import MlflowServer, silent_server
from tests.helpers.runs import (
    ROOT,
    command_environment,
    command_line,
    load_config,
    pids_by_rank,
    run_command,
    write_recipe,
)

IMAGES = 1200
BLOCK = 32768
SECRET = "a-secret-of-the-environment"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.stop()


def damsm_recipe(folder: Path, images: int = 64) -> Path:
    """Write the recipe of a run of one stage."""
    scale = {"group_size": 4, "groups": 2, "images": images, "pictures_every_images": 32}
    stage = {"system": "damsm", **scale, "checkpoint_every_images": 32, "model": small_systems.DAMSM}
    return write_recipe(folder, stages={"damsm": stage})


def gan_recipe(folder: Path) -> Path:
    """Write the recipe of a run of one stage that draws sample images: an unconditional DCGAN."""
    scale = {"group_size": 4, "groups": 2, "images": IMAGES, "pictures_every_images": 400}
    stage = {"system": "dcgan", **scale, "checkpoint_every_images": 64, "model": small_systems.MODELS["dcgan"]}
    return write_recipe(folder, stages={"gan": stage})


def mlflow_points(url: str, run_id: str) -> dict[str, Counter[tuple[int, float]]]:
    """Return (step, value) of all points of a run on the server, with their numbers, by metric."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=url)
    names = client.get_run(run_id).data.metrics
    return {name: Counter((p.step, p.value) for p in client.get_metric_history(run_id, name)) for name in names}


def stored_points(stage: Path) -> dict[str, Counter[tuple[int, float]]]:
    """Return the points of metrics.jsonl in the same form."""
    points: dict[str, Counter[tuple[int, float]]] = {}
    for line in read_metrics(str(stage)):
        for name, value in numbers(line).items():
            points.setdefault(name, Counter())[line["images"], value] += 1
    return points


def wandb_records(stage: Path) -> list[Any]:
    """Return the records of all offline runs of a stage: protobuf messages, in blocks as in a log of LevelDB."""
    from wandb.proto import wandb_internal_pb2

    records = []
    for file in sorted((stage / "wandb").glob("offline-run-*/run-*.wandb")):
        data, at, parts = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if BLOCK - at % BLOCK < 7:  # the rest of a block is empty
                at += BLOCK - at % BLOCK
                continue
            length, kind = struct.unpack_from("<HB", data, at + 4)
            parts += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4) and at <= len(data):  # a whole record, or the last part of one
                records.append(wandb_internal_pb2.Record.FromString(parts))
                parts = b""
    return records


def wandb_history(records: list[Any]) -> list[dict[str, Any]]:
    """Return the values of each logged row."""
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


def position(stage: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((stage / "trackers" / f"{name}.json").read_text())
    return found


def delivered(stage: Path, name: str) -> int:
    """Return the images seen at the last point that a tracker got; -1 before the first one."""
    try:
        return int(position(stage, name)["images"])
    except (OSError, ValueError):  # none yet, or it is being written
        return -1


@pytest.mark.whole
def test_a_killed_run_continues_its_tracker_runs(server: MlflowServer, tmp_path: Path) -> None:
    """After the resume the trackers have all that metrics.jsonl has, and besides only what was done twice."""
    arguments = [str(gan_recipe(tmp_path)), "--local", f"report.mlflow={server.url}", "report.wandb=me/gans"]
    environment = {**command_environment(), "WANDB_MODE": "offline", "WANDB_API_KEY": SECRET}
    environment |= {"MLFLOW_TRACKING_TOKEN": SECRET, "HOME": str(tmp_path)}
    stage = tmp_path / "runs/tiny/gan"
    process = subprocess.Popen(command_line(*arguments), cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while min(delivered(stage, "mlflow"), delivered(stage, "wandb"), len(list(stage.glob("checkpoints/*")))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = {name: position(stage, name) for name in ("mlflow", "wandb")}
    done = subprocess.run(
        command_line(*arguments), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "training goes on without" not in done.stderr
    last = {name: position(stage, name) for name in ("mlflow", "wandb")}
    assert {name: at["run_id"] for name, at in first.items()} == {name: at["run_id"] for name, at in last.items()}
    assert all(at["images"] == IMAGES for at in last.values())
    resumed = json.loads((tmp_path / "runs/tiny/attempts.json").read_text())[1]["resumed"]["gan"]["images"]

    check_mlflow(server.url, last["mlflow"]["run_id"], stage, resumed)
    check_wandb(stage, last["wandb"]["run_id"], min(resumed, first["wandb"]["images"]))
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or SECRET.encode() not in file.read_bytes(), file


def check_mlflow(url: str, run_id: str, stage: Path, resumed: int) -> None:
    from mlflow import MlflowClient

    ours, theirs = stored_points(stage), mlflow_points(url, run_id)
    assert ours.keys() == theirs.keys()
    for name, points in ours.items():
        assert not points - theirs[name], f"{name} lacks points"
        assert all(step > resumed for step, _ in theirs[name] - points), f"{name} has points that were done once"
    run = MlflowClient(tracking_uri=url).get_run(run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "tiny/gan"
    assert run.data.params["stage.group_size"] == "4" and run.data.params["name"] == "tiny"
    assert run.data.tags["mlflow.source.git.commit"] and run.data.tags["run"] == "tiny"
    files = [file.path for file in MlflowClient(tracking_uri=url).list_artifacts(run_id, "images")]
    assert any(f"images+step+{IMAGES}" in file for file in files), files


def check_wandb(stage: Path, run_id: str, safe: int) -> None:
    """Check the offline files. safe: images up to which the first process had written its points for sure."""
    records = wandb_records(stage)
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert {(run.run_id, run.project, run.entity, run.run_group) for run in runs} == {(run_id, "gans", "me", "tiny")}
    assert len(runs) == 2 and runs[0].display_name == "tiny/gan" and runs[0].git.commit
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["stage"]["group_size"] == 4 and config["versions"]["torch"]
    history = wandb_history(records)
    ours = {line["images"] for line in read_metrics(str(stage))}
    rows = Counter(row["images_seen"] for row in history if "speed/images_per_second" in row)
    assert rows.keys() == ours
    assert all(count == 1 or images > safe for images, count in rows.items())
    assert any(any("pictures/images" in key for key in row) and row["images_seen"] == IMAGES for row in history)


@pytest.mark.slow
def test_the_worker_that_becomes_the_first_continues_the_tracker_run(server: MlflowServer, tmp_path: Path) -> None:
    file, mark = damsm_recipe(tmp_path, images=800), f"{os.getpid()}-{time.time_ns()}"
    settings = ["cluster.workers=2", "checkpoint.memory_every_steps=1", f"report.mlflow={server.url}"]
    environment = {**command_environment(), "T2IDIST_MARK": mark, "HOME": str(tmp_path)}
    process = subprocess.Popen(command_line(str(file), *settings), cwd=ROOT, env=environment)
    stage = tmp_path / "runs/tiny/damsm"
    deadline = time.monotonic() + 250
    while delivered(stage, "mlflow") < 80:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    run_id = position(stage, "mlflow")["run_id"]
    os.kill(pids_by_rank(mark)[0], signal.SIGKILL)
    assert process.wait(250) == 0
    assert position(stage, "mlflow") == {"target": server.url, "run_id": run_id, "images": 800}
    (attempt,) = json.loads((tmp_path / "runs/tiny/attempts.json").read_text())[1:]
    ours, theirs = stored_points(stage), mlflow_points(server.url, run_id)
    for name, points in ours.items():
        assert not points - theirs[name], f"{name} lacks points"
        assert all(step > attempt["resumed"]["damsm"]["images"] for step, _ in theirs[name] - points)


@pytest.mark.whole
def test_servers_that_never_answer_cost_a_warning_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    with silent_server() as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        done = run_command(str(damsm_recipe(tmp_path)), "--local", f"report.mlflow={url}", "report.wandb=gans")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("WARNING MLflow") == done.stderr.count("WARNING W&B") == 1
    assert done.stderr.count("training goes on without it") == 2
    assert [line["images"] for line in read_metrics(str(tmp_path / "runs/tiny/damsm"))] == list(range(8, 65, 8))


def mlflow_logger(folder: Path, url: str, images: int = 0) -> MetricLogger:
    """Return the records of a stage that are tracked on a server."""
    service = MlflowService(url, "x/gan", {}, "0123", {"name": "x"}, "name: x", storage.read_bytes)
    tracker: Tracker = BackgroundTracker(
        service, StoredPosition(str(folder / "gan/trackers/mlflow.json")), retry_seconds=0.1, end_seconds=60
    )
    metadata = {"restarts": 0, "run": "x", "stage": "gan"}
    return MetricLogger(
        str(folder), "gan", images=images, step=images, budget_images=10, metadata=metadata, on_progress=None,
        trackers=[tracker],
    )  # fmt: skip


def log(logger: MetricLogger, images: int) -> None:
    logger.log_step(images)
    logger.log_metrics({"generator/loss": images / 3}, {}, images)
    logger.log_values({"val/r@5": images / 7})


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.whole
def test_a_server_that_goes_away_gets_what_it_missed(
    server: MlflowServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    try:
        logger = mlflow_logger(tmp_path, server.url)
        file = tmp_path / "gan/trackers/mlflow.json"
        log(logger, 1)
        wait_for(lambda: file.exists() and json.loads(file.read_text())["images"] == 1)
        server.stop()
        for images in (2, 3):
            log(logger, images)
        wait_for(lambda: "MLflow failed" in caplog.text)
        server.start()
        log(logger, 4)
        logger.log_scores(2, {"kid": 0.25})  # a score comes when training has gone on
        logger.close(DONE)
        assert caplog.text.count("MLflow") == 1
        assert json.loads(file.read_text())["images"] == 4
        run_id = json.loads(file.read_text())["run_id"]
        expected = {**stored_points(tmp_path / "gan"), "scores/kid": Counter([(2, 0.25)])}
        expected["val/r_5"] = expected.pop("val/r@5")
        assert mlflow_points(server.url, run_id) == expected
    finally:
        server.start()


def test_a_server_that_hangs_costs_no_record_of_the_run_and_one_warning_of_each_kind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with silent_server() as url:
        service = MlflowService(url, "x/gan", {}, "0123", {}, "", storage.read_bytes)
        store = StoredPosition(str(tmp_path / "mlflow.json"))
        tracker = BackgroundTracker(service, store, queue_length=3, stalled_seconds=0.01, end_seconds=0.1)
        wait_for(lambda: tracker.is_waiting)
        for images in range(10):
            time.sleep(0.01)
            tracker.metrics(images, {"loss": 1.0}, "2026-11-29T15:00:00+00:00")
        tracker.end(DONE)
    assert [record.getMessage().partition(" for ")[0] for record in caplog.records] == [
        "MLflow has not answered",
        "MLflow: the oldest of 3 waiting records are dropped",
    ]
    assert not (tmp_path / "mlflow.json").exists()


@pytest.mark.whole
def test_a_run_gets_on_the_server_what_an_earlier_attempt_did_not_deliver(
    server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    logger = mlflow_logger(tmp_path, server.url)
    log(logger, 1)
    logger.close()
    metadata = {"restarts": 0, "run": "x", "stage": "gan"}
    untracked = MetricLogger(
        str(tmp_path), "gan", images=1, step=1, budget_images=10, metadata=metadata, on_progress=None
    )
    log(untracked, 2)
    log(untracked, 3)
    untracked.close()
    logger = mlflow_logger(tmp_path, server.url, images=3)
    log(logger, 4)
    logger.close(DONE)
    run_id = json.loads((tmp_path / "gan/trackers/mlflow.json").read_text())["run_id"]
    expected = stored_points(tmp_path / "gan")
    expected["val/r_5"] = expected.pop("val/r@5")
    assert mlflow_points(server.url, run_id) == expected


@pytest.mark.parametrize(
    "value",
    ["mlflow=http://user:hidden@host:5000", "mlflow=http://host/?token=hidden", "mlflow=hidden", "wandb=a/b/hidden"],
)
def test_addresses_with_secrets_are_refused(value: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        load(str(damsm_recipe(tmp_path)), [f"report.{value}"])
    assert str(error.value).startswith(f"report.{value.partition('=')[0]}: expected") and "hidden" not in str(error)


@pytest.mark.parametrize("setting", ["report.wandb=gans", "report.mlflow=http://localhost:5000"])
def test_a_missing_package_is_named_by_the_dry_run(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = setting.partition(".")[2].partition("=")[0]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"pip install 't2idist\\[{package}\\]'"):
        dry_run.describe(load_config(tmp_path, setting), None)


def test_clients_are_imported_only_if_they_are_used() -> None:
    line = "import sys, t2idist.training.worker, t2idist.run; sys.exit(bool({'mlflow', 'wandb'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", line], cwd=ROOT, env={**os.environ}, check=False).returncode == 0
