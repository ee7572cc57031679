"""The state of a run, read from its folder."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path

import pytest

from t2idist import run, storage
from t2idist.observability.recovery import Recovery
from t2idist.report import status
from tests.helpers.runs import (
    write_recipe,
)


def test_status_of_a_run_in_each_state(tmp_path: Path) -> None:
    at = tmp_path / "runs/tiny"
    at.mkdir(parents=True)
    shutil.copy(write_recipe(tmp_path), at / "config.yaml")
    noon = datetime.datetime(2026, 11, 22, 12, tzinfo=datetime.UTC)
    assert status.read_status(str(at), noon).state == "new"
    progress = {
        "stage": "damsm",
        "images": 8,
        "time": "2026-11-22T11:59:00+00:00",
        "workers": 2,
        "images_per_second": 5.0,
    }
    storage.write_json(str(at / "progress.json"), progress)
    assert status.read_status(str(at), noon).state == "training"
    assert status.read_status(str(at), noon + datetime.timedelta(minutes=5)).state == "silent"
    attempt = {"time": "2026-11-22T11:00:00+00:00", "workers": 2}
    recovery = Recovery("worker lost", {"end": 0.25, "start": 1.5}, images_repeated=1200)
    recovery.finish()
    again = {**attempt, "resumed": {"damsm": {"images": 8, "from": "copy in memory"}}, "recovery": recovery.describe()}
    storage.write_json(str(at / "attempts.json"), [attempt, again, {**again, "workers": 1}])
    assert "1: 2026-11-22 11:00:00, 2 workers, damsm from 8 images (copy in memory)" in status.format_status(str(at))
    assert "2: 2026-11-22 11:00:00, 1 worker, damsm from 8 images" in status.format_status(str(at))
    assert "worker lost, 1.8 s (end 0.2, start 1.5, restore 0.0), 1,200 images repeated" in status.format_status(
        str(at)
    )
    storage.write_json(str(at / "fatal.json"), {"error": "data.max_bad: too many"})
    assert "tiny: failed: data.max_bad: too many" in status.format_status(str(at))
    best = {"metric": "kid", "value": 0.05, "images": 8, "export": "scored/000000000008"}
    storage.write_json(str(at / "damsm/scored/best.json"), best)
    storage.write_json(str(at / "scores.json"), [{"name": "hat", "value": 0.8546}])
    page = status.format_status(str(at))
    assert "damsm: kid 0.05 at 8 images" in page and "hat 0.8546" in page
    with pytest.raises(ValueError, match="no runs here"):
        status.format_run_list(str(at))
    storage.write_bytes(str(at / "config.yaml"), b"a: 1\n")
    with pytest.raises(ValueError, match="not the folder of a run"):
        status.format_status(str(at))
    assert "not the folder of a run" in status.format_run_list(str(tmp_path / "runs"))


def test_status_and_list_take_no_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--status", str(tmp_path)]) == 2
    assert "no run here (config.yaml is missing)" in capsys.readouterr().err
    assert run.main(["attngan", "--list", str(tmp_path)]) == 2
    assert "they take no recipe" in capsys.readouterr().err
    assert run.main([]) == 2
    assert "give a recipe: attngan" in capsys.readouterr().err
