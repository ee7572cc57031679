"""The record of a stage: a full disk ends TensorBoard's events, not the run."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from t2idist.engine.metrics import MetricLogger, append_lines, read_metrics


def log(folder: Path, images: int = 0) -> MetricLogger:
    facts = {"restarts": 0, "run": "x", "stage": "gan"}
    return MetricLogger(str(folder), "gan", images=images, step=images, budget_images=10, metadata=facts, on_progress=None)


def test_events_that_cannot_be_written_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    made = log(tmp_path)
    made.log_metrics({"loss": 1.0}, {}, 0)
    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    for images in range(1, 4):
        made.log_step(images)
        made.log_metrics({"loss": 1.0}, {}, images)
    made.close()
    assert caplog.text.count("TensorBoard events stop here") == 1
    assert [line["images"] for line in read_metrics(str(tmp_path / "gan"))] == [0, 1, 2, 3]


def test_lines_of_a_lost_worker_come_after_those_that_are_stored(tmp_path: Path) -> None:
    made = log(tmp_path)
    for images in range(4):
        made.log_step(images)
        made.log_metrics({"loss": float(images)}, {"data/wait_share": 0.5}, images)
        if images == 1:
            made.flush()
    assert made.losses == {"loss": 3.0}
    lost = made.unwritten()
    assert [line["images"] for line in lost] == [2, 3]
    append_lines(str(tmp_path / "gan"), lost)
    append_lines(str(tmp_path / "gan"), lost)
    assert [line["loss"] for line in read_metrics(str(tmp_path / "gan"))] == [0.0, 1.0, 2.0, 3.0]
    assert [line["images"] for line in log(tmp_path, 2).lines] == [0, 1, 2]
