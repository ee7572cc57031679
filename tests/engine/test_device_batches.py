"""Batches that are copied to a device one step ahead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from t2idist.contract import Batch
from t2idist.engine.device_batches import DeviceBatches
from tests.helpers import toy_gan


class Recorder:
    """Stands for a stream, an event and a device's current stream; records the order of calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __enter__(self) -> Recorder:
        self.calls.append("copy on the side stream")
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def record_event(self) -> Recorder:
        return self

    def wait_event(self, event: Recorder) -> None:
        self.calls.append("current stream waits")


class Source:
    samples_read, bad_reads, wait_seconds = 3, 1, 0.5
    quarantine: dict[str, str] = {"key": "reason"}  # noqa: RUF012
    closed = False

    def __init__(self, recorder: Recorder) -> None:
        self._batches, self._recorder = toy_gan.batches(range(2), 4, (8,), 5), recorder

    def __next__(self) -> Batch:
        self._recorder.calls.append("load")
        return next(self._batches)

    def close(self) -> None:
        self.closed = True


def test_the_next_batch_is_copied_before_the_current_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, recorded = Recorder(), []
    monkeypatch.setattr(torch, "Stream", lambda device: recorder)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: recorder)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: recorded.append(tensor.shape))
    source = Source(recorder)
    batches = DeviceBatches(source, torch.device("cpu"), torch.float32)
    expected = [next(toy) for toy in [toy_gan.batches(range(2), 4, (8,), 5)] for _ in range(2)]
    for batch in expected:
        got: Any = next(batches)
        assert got.ids == batch.ids and got.images[0].dtype == torch.float32
        assert torch.equal(got.images[0], batch.to(torch.device("cpu"), torch.float32).images[0])
    step = ["load", "copy on the side stream", "current stream waits"]
    assert recorder.calls == ["load", "copy on the side stream", *step, *step]
    assert len(recorded) == 2 * len(got.tensors)
    assert (batches.samples_read, batches.bad_reads, batches.wait_seconds) == (3, 1, 0.5)
    assert batches.quarantine == source.quarantine
    batches.close()
    assert source.closed
