"""The metric logger: full disks and lines of lost workers."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from t2idist.engine.metrics import MetricLogger, append_lines, read_metrics


def make_logger(folder: Path, images: int = 0) -> MetricLogger:
    metadata = {"restarts": 0, "run": "x", "stage": "gan"}
    return MetricLogger(
        str(folder), "gan", images=images, step=images, budget_images=10, metadata=metadata, on_progress=None
    )


def test_full_disk_stops_tensorboard_events_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def raise_disk_full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    logger = make_logger(tmp_path)
    logger.log_metrics({"loss": 1.0}, {}, 0)
    monkeypatch.setattr(SummaryWriter, "add_scalar", raise_disk_full)
    for images in range(1, 4):
        logger.log_step(images)
        logger.log_metrics({"loss": 1.0}, {}, images)
    logger.close()
    assert caplog.text.count("TensorBoard events stop here") == 1
    assert [line["images"] for line in read_metrics(str(tmp_path / "gan"))] == [0, 1, 2, 3]


def test_append_lines_adds_only_lines_after_the_stored_ones(tmp_path: Path) -> None:
    logger = make_logger(tmp_path)
    for images in range(4):
        logger.log_step(images)
        logger.log_metrics({"loss": float(images)}, {"data/wait_share": 0.5}, images)
        if images == 1:
            logger.flush()
    assert logger.losses == {"loss": 3.0}
    unwritten = logger.unwritten()
    assert [line["images"] for line in unwritten] == [2, 3]
    append_lines(str(tmp_path / "gan"), unwritten)
    append_lines(str(tmp_path / "gan"), unwritten)
    assert [line["loss"] for line in read_metrics(str(tmp_path / "gan"))] == [0.0, 1.0, 2.0, 3.0]
    assert [line["images"] for line in make_logger(tmp_path, 2).lines] == [0, 1, 2]
