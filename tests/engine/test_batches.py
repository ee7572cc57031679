"""The ledger, the quarantine list, and the limit on unreadable samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from t2idist.contract import Batch, Captions
from t2idist.engine.batches import QUARANTINE, TrackedBatches, read_ledger
from t2idist.engine.world import Share, World


class NumberedSource:
    """Yields batches of two groups of two samples, numbered 0, 1, 2, ...; those in `bad` count as unreadable."""

    def __init__(self, step: int = 0, bad: set[int] | None = None) -> None:
        self.next_sample, self.bad = 4 * step, bad or set()
        self.samples_read, self.bad_reads, self.wait_seconds = 0, 0, 0.0
        self.quarantine: dict[str, str] = {}

    def close(self) -> None:
        return

    def __next__(self) -> Batch:
        numbers = range(self.next_sample, self.next_sample + 4)
        self.next_sample += 4
        self.samples_read += 4
        bad = self.bad & set(numbers)
        self.bad_reads += len(bad)
        self.quarantine |= {f"s{n}": "does not decode" for n in bad}
        ones = torch.ones(4, dtype=torch.int64)
        captions = Captions(ones[:, None], ones, torch.zeros(4, 0))
        return Batch((), captions, ones, torch.zeros(4, 0), tuple(f"s{n}" for n in numbers), 2)


def make_batches(
    folder: Path, source: NumberedSource, step: int = 0, attempt: str = "a", epoch_images: int = 100
) -> TrackedBatches:
    share = Share(range(2), 2, 1)
    return TrackedBatches(
        source, World(), share, str(folder), step=step, attempt=attempt, max_bad=0.01, epoch_images=epoch_images,
        ledger=True,
    )  # fmt: skip


def test_read_ledger_merges_two_attempts(tmp_path: Path) -> None:
    first = make_batches(tmp_path, NumberedSource())
    for _ in range(3):
        next(first)
    first.write_ledger()
    next(first)  # not written, so lost with the attempt
    second = make_batches(tmp_path, NumberedSource(step=2), step=2, attempt="b")
    for _ in range(2):
        next(second)
    second.write_ledger()
    ledger = read_ledger(str(tmp_path))
    assert list(ledger) == [(step, group) for step in range(4) for group in range(2)]
    assert [int(i[1:]) for ids in ledger.values() for i in ids] == list(range(16))


def test_read_ledger_rejects_changed_order_and_repeated_steps(tmp_path: Path) -> None:
    first = make_batches(tmp_path, NumberedSource())
    next(first)
    first.write_ledger()
    other = make_batches(tmp_path, NumberedSource(step=1), attempt="b")
    next(other)
    other.write_ledger()
    with pytest.raises(ValueError, match="had other samples before"):
        read_ledger(str(tmp_path))
    file = next((tmp_path / "ledger").glob("*-a-*"))
    file.write_text(file.read_text() * 2)
    with pytest.raises(ValueError, match="twice in one attempt"):
        read_ledger(str(tmp_path))


def test_unreadable_samples_are_listed_and_too_many_raise(tmp_path: Path) -> None:
    few = make_batches(tmp_path, NumberedSource(bad={5}))
    next(few), next(few)
    assert few.report()["data/bad_samples"] == 1.0
    assert json.loads((tmp_path / QUARANTINE).read_text()) == {"s5": "does not decode"}
    many = make_batches(tmp_path, NumberedSource(bad={0, 2}), attempt="b")
    next(many)
    with pytest.raises(ValueError, match=r"max_bad: 2 of 4 samples were unreadable, .* s0 \(does not decode\), s2"):
        many.report()
    assert set(json.loads((tmp_path / QUARANTINE).read_text())) == {"s0", "s2", "s5"}
