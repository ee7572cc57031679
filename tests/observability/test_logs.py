"""Log lines and progress lines: their format, and that they contain no secrets."""

from __future__ import annotations

import datetime
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from t2idist.observability import logs
from t2idist.observability.logs import RecentWarnings
from t2idist.observability.progress import ProgressPrinter
from tests.helpers.runs import (
    progress_message,
    run_command,
    write_recipe,
)


def test_json_log_lines_have_the_context() -> None:
    context = logs.LogContext("run-1", rank=3, stage="gan", images=lambda: 640)
    record = logging.LogRecord("t2idist.x", logging.WARNING, "", 0, "%d bad samples", (3,), None)
    line = json.loads(logs.JsonFormatter(context).format(record))
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


def test_log_lines_contain_no_secrets(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/someone/token")
    logs.configure(logging.WARNING)
    logging.getLogger("t2idist.x").warning("refused: %s of %s", "wJalrXUtnFEMI", "/home/someone/token")
    assert caplog.messages == ["refused: *** of /home/someone/token"]


def test_equal_messages_are_counted() -> None:
    now = [0.0]
    repeats = logs.Repeats(clock=lambda: now[0])
    assert [repeats.count("a", "x") for _ in range(4)] == [1, 0, 0, 0]
    assert repeats.count("b", "x") == repeats.count("a", "y") == 1
    assert repeats.rest() == [("x", 3)] and repeats.rest() == []
    assert repeats.count("a", "x") == 0
    now[0] = logs.Repeats.EVERY_SECONDS
    assert repeats.count("a", "x") == 2 and repeats.count("a", "x") == 0
    assert logs.with_count("x", 2) == "x (2 times more)" and logs.with_count("x", 1) == "x"


def test_a_process_says_equal_warnings_once_and_their_number_at_its_end() -> None:
    program = """
import logging
from t2idist.observability import logs
logs.configure(logging.INFO, logs.LogContext("run-1"))
for number in range(500):
    logging.getLogger("t2idist.x").warning("%s is slow", "store")
    logging.getLogger("t2idist.x").info("step")
logging.getLogger("t2idist.x").warning("%s is slow", "disk")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    warnings = [line["message"] for line in lines if line["level"] == "warning"]
    assert warnings == ["store is slow", "disk is slow", "store is slow (499 times more)"]
    assert sum(line["message"] == "step" for line in lines) == 500


def test_handlers_that_collect_records_get_all_of_them(caplog: pytest.LogCaptureFixture) -> None:
    logs.configure(logging.WARNING)
    for _ in range(3):
        logging.getLogger("t2idist.x").warning("again")
    assert caplog.messages == ["again"] * 3


def test_the_driver_prints_equal_warnings_of_the_workers_once() -> None:
    recent = RecentWarnings()
    for text in ("slow", "slow", "full", "slow"):
        recent.handle(logging.LogRecord("t2idist.x", logging.WARNING, "", 0, text, None, None))
    assert recent.texts == ["warning: slow", "warning: full"]


def test_progress_printer_writes_json_lines(tmp_path: Path) -> None:
    with open(tmp_path / "out", "w") as stream:
        printer = ProgressPrinter(stream, as_json=True)
        printer.show(progress_message(tmp_path / "run"))
        printer.message("warning: something")
        printer.close()
    first, second = (json.loads(line) for line in (tmp_path / "out").read_text().splitlines())
    assert (first["run"], first["stage"], first["images"], first["rank"]) == ("x", "gan", 16, None)
    assert second == {"level": "warning", "message": "warning: something"}


@pytest.mark.whole
def test_files_and_output_of_a_run_contain_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENG", "RAY_AUTH_TOKEN": "f00dfeed" * 8}
    for name, value in {**secrets, "RAY_AUTH_MODE": "token", "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE"}.items():
        monkeypatch.setenv(name, value)
    settings = ["report.json_logs=true", "report.ledger=true", "stages.attngan.images=16", "stages.damsm.images=16"]
    file, hook = write_recipe(tmp_path), f"tee -a {tmp_path}/events"
    done = run_command(str(file), "--local", "--hook", hook, *settings)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (done.stdout + done.stderr).splitlines()]
    assert {"run", "stage", "rank", "images", "message", "level"} <= lines[-1].keys() and lines[-1]["images"] == 16
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    names = {file.name for file in files}
    assert {
        "events",
        "commit.json",
        "config.yaml",
        "report.html",
        "export.json",
        "outcome.json",
        "versions.json",
    } <= names
    outputs = [("output", (done.stdout + done.stderr).encode()), *((str(file), file.read_bytes()) for file in files)]
    for where, data in outputs:
        for name, value in secrets.items():
            assert value.encode() not in data, f"{where} contains {name}"
    versions = json.loads((tmp_path / "runs/tiny/versions.json").read_text())
    assert versions["git"] and versions["torch"] and versions["ray"]
