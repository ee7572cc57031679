"""The batches of a stage, the ledger of the samples that were trained on, and the limit on unreadable samples."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from t2idist import storage
from t2idist.contract import Batch
from t2idist.engine.world import Share, World

logger = logging.getLogger(__name__)

QUARANTINE = "quarantine.json"
LEDGER = "ledger"
_MAX_LISTED = 20
"""Samples that a message lists; quarantine.json lists all of them."""


class BatchSource(Protocol):
    """A worker's batches, with counters of what was read so far."""

    @property
    def samples_read(self) -> int: ...

    @property
    def bad_reads(self) -> int:
        """Reads in which an unreadable sample was replaced by another."""
        ...

    @property
    def quarantine(self) -> dict[str, str]:
        """Unreadable samples: key and reason."""
        ...

    @property
    def wait_seconds(self) -> float:
        """Time spent waiting for batches."""
        ...

    def __next__(self) -> Batch: ...

    def close(self) -> None: ...


class TrackedBatches(Iterator[Batch]):
    """Iterates over the batches of a stage and keeps the ledger and the quarantine list.

    Args:
        stage_url: folder of the stage.
        step: step of the first batch.
        attempt: id of this attempt at the run.
        max_bad: largest tolerated number of unreadable samples, as a fraction of an epoch.
        epoch_images: samples in an epoch.
        ledger: whether to record the sample ids of every step and group.
    """

    def __init__(
        self,
        source: BatchSource,
        world: World,
        share: Share,
        stage_url: str,
        *,
        step: int,
        attempt: str,
        max_bad: float,
        epoch_images: int,
        ledger: bool,
    ) -> None:
        self._source, self._world, self._share, self._url = source, world, share, stage_url
        self._step, self._attempt = step, attempt
        self._max_bad, self._epoch_images = max_bad, epoch_images
        self._lines: list[dict[str, Any]] | None = [] if ledger else None
        self._reported: set[str] = set()
        self._window = (time.monotonic(), source.wait_seconds)
        self._quarantine: dict[str, str] = {}
        if world.is_main:
            self._quarantine = storage.read_json_if_present(storage.join(stage_url, QUARANTINE)) or {}

    def __next__(self) -> Batch:
        batch = next(self._source)
        if self._lines is not None:
            size = batch.group_size
            for index, group in enumerate(self._share.lanes):
                ids = list(batch.ids[index * size : (index + 1) * size])
                self._lines.append({"step": self._step, "group": group, "ids": ids})
        self._step += 1
        return batch

    def report(self) -> dict[str, float]:
        """Sum the counters over the workers and return values to log. A collective.

        Raises:
            ValueError: on every worker, if more than `max_bad` of the samples were unreadable.
        """
        source = self._source
        moment, waited = self._window
        self._window = (time.monotonic(), source.wait_seconds)
        new = {key: reason for key, reason in source.quarantine.items() if key not in self._reported}
        self._reported |= new.keys()
        elapsed = max(self._window[0] - moment, 1e-9)
        gathered = self._world.all_gather_object(
            (source.samples_read, source.bad_reads, new, (source.wait_seconds - waited) / elapsed),
        )
        read, bad = sum(entry[0] for entry in gathered), sum(entry[1] for entry in gathered)
        new = {key: reason for entry in gathered for key, reason in entry[2].items()}
        if new and self._world.is_main:
            self._quarantine.update(new)
            storage.write_json(storage.join(self._url, QUARANTINE), dict(sorted(self._quarantine.items())))
            logger.warning("%d unreadable samples were replaced, such as %s", len(new), _list_some(new))
        if bad > self._max_bad * max(read, self._epoch_images):
            listed = self._world.broadcast_object(self._quarantine)
            raise ValueError(
                f"data.max_bad: {bad} of {read} samples were unreadable, more than {self._max_bad:.2%} of an epoch; "
                f"{storage.redact(self._url)}/{QUARANTINE} lists all {len(listed)}: {_list_some(listed)}"
            )
        return {
            "data/wait_share": max(entry[3] for entry in gathered),
            "data/bad_samples": float(bad),
            "data/quarantined": float(len(self._quarantine)),
        }

    def close(self) -> None:
        self._source.close()

    def unwritten(self) -> list[dict[str, Any]]:
        """Return the lines of the ledger that are not in storage yet."""
        return list(self._lines or [])

    def write_ledger(self) -> None:
        """Store the ledger since the last call. Call it before a checkpoint that includes those steps."""
        if self._lines:
            write_ledger(self._url, self._attempt, self._world.rank, self._lines)
            self._lines.clear()


def write_ledger(stage_url: str, attempt: str, rank: int, lines: Sequence[dict[str, Any]]) -> None:
    """Store ledger lines of one worker of an attempt."""
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    name = f"{lines[0]['step']:012d}-{attempt}-{rank:05d}.jsonl"
    storage.write_bytes(storage.join(stage_url, LEDGER, name), data)


def _list_some(quarantine: dict[str, str]) -> str:
    named = [f"{key} ({reason})" for key, reason in sorted(quarantine.items())[:_MAX_LISTED]]
    return ", ".join(named) + (", ..." if len(quarantine) > _MAX_LISTED else "")


def read_ledger(stage_url: str) -> dict[tuple[int, int], list[str]]:
    """Read the sample ids that were trained on, by (step, group), in order.

    Raises:
        ValueError: an attempt repeated a step with other samples than the attempt before, or ran a step twice.
    """
    ledger: dict[tuple[int, int], list[str]] = {}
    attempts: dict[tuple[int, int], set[str]] = {}
    folder = storage.join(stage_url, LEDGER)
    for name in storage.list_dir(folder):
        attempt = name.split("-")[1]
        for text in storage.read_bytes(storage.join(folder, name)).decode().splitlines():
            line = json.loads(text)
            key = (line["step"], line["group"])
            if attempt in attempts.setdefault(key, set()):
                raise ValueError(f"{folder}/{name}: step {key[0]} of group {key[1]} is recorded twice in one attempt")
            attempts[key].add(attempt)
            if ledger.setdefault(key, line["ids"]) != line["ids"]:
                raise ValueError(f"{folder}/{name}: step {key[0]} of group {key[1]} had other samples before")
    return dict(sorted(ledger.items()))
