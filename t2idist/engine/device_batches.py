"""Batches on an accelerator: copied one step ahead, on a stream of their own."""

from __future__ import annotations

import torch

from t2idist.contract import Batch
from t2idist.engine.batches import BatchSource


class DeviceBatches:
    """A `BatchSource` that copies the batches of another one to a device.

    While a step computes, the next batch travels. That takes no time of the step if the source's tensors are in
    page-locked memory. The source, and with it every counter, is one batch ahead.

    Args:
        dtype: of images, attributes and vectors on the device.
    """

    def __init__(self, source: BatchSource, device: torch.device, dtype: torch.dtype) -> None:
        self._source, self._device, self._dtype = source, device, dtype
        self._stream = torch.Stream(device=device)
        self._ahead: tuple[Batch, torch.Event] | None = None

    @property
    def samples_read(self) -> int:
        return self._source.samples_read

    @property
    def bad_reads(self) -> int:
        return self._source.bad_reads

    @property
    def quarantine(self) -> dict[str, str]:
        return self._source.quarantine

    @property
    def wait_seconds(self) -> float:
        return self._source.wait_seconds

    def __next__(self) -> Batch:
        batch, copied = self._ahead or self._copy()
        self._ahead = self._copy()
        current = torch.accelerator.current_stream(self._device)
        current.wait_event(copied)
        for tensor in batch.tensors:
            tensor.record_stream(current)  # type: ignore[arg-type]
        return batch

    def _copy(self) -> tuple[Batch, torch.Event]:
        host = next(self._source)
        with self._stream:
            batch = host.to(self._device, self._dtype)
            return batch, self._stream.record_event()

    def close(self) -> None:
        self._source.close()
