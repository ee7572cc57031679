"""What a stage takes in: its batches, the record of what was trained on, and when bad samples are too many."""

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
"""Bad samples that a sentence names; the file names all of them."""


class BatchSource(Protocol):
    """A worker's batches, and what is known of them so far.

    samples_read, bad_reads: places filled, and those of them where a bad sample had to be replaced. quarantine: bad
    samples by key, with the reason. wait_seconds: spent waiting for batches.
    """

    samples_read: int
    bad_reads: int
    quarantine: dict[str, str]
    wait_seconds: float

    def __next__(self) -> Batch: ...

    def close(self) -> None: ...


class TrackedBatches(Iterator[Batch]):
    """The batches of a stage from `step` on, with their accounts. stage_url: the stage's folder.

    max_bad: share of bad samples that stops the run. epoch_images: samples in an epoch. ledger: keep a record of the
    ids of every step and group.
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
        self._told: set[str] = set()
        self._window = (time.monotonic(), source.wait_seconds)
        self._quarantine: dict[str, str] = {}
        where = storage.join(stage_url, QUARANTINE)
        if world.is_main and storage.exists(where):
            self._quarantine = storage.read_json(where)

    def __next__(self) -> Batch:
        batch = next(self._source)
        if self._lines is not None:
            size = batch.group_size
            for place, group in enumerate(self._share.lanes):
                ids = list(batch.ids[place * size : (place + 1) * size])
                self._lines.append({"step": self._step, "group": group, "ids": ids})
        self._step += 1
        return batch

    def settle(self) -> dict[str, float]:
        """Sum the accounts over workers: values to log. A collective.

        Raises ValueError, on every worker, where more than `max_bad` of the samples were bad.
        """
        source = self._source
        moment, waited = self._window
        self._window = (time.monotonic(), source.wait_seconds)
        new = {key: reason for key, reason in source.quarantine.items() if key not in self._told}
        self._told |= new.keys()
        busy = max(self._window[0] - moment, 1e-9)
        parts = self._world.all_gather_object(
            (source.samples_read, source.bad_reads, new, (source.wait_seconds - waited) / busy),
        )
        read, bad = sum(part[0] for part in parts), sum(part[1] for part in parts)
        found = {key: reason for part in parts for key, reason in part[2].items()}
        if found and self._world.is_main:
            self._quarantine.update(found)
            storage.write_json(storage.join(self._url, QUARANTINE), dict(sorted(self._quarantine.items())))
            logger.warning("%d bad samples were replaced, such as %s", len(found), _list_some(found))
        if bad > self._max_bad * max(read, self._epoch_images):
            listed = self._world.broadcast_object(self._quarantine)
            raise ValueError(
                f"data.max_bad: {bad} of {read} samples were bad, more than {self._max_bad:.2%} of an epoch; "
                f"{storage.redact(self._url)}/{QUARANTINE} lists all {len(listed)}: {_list_some(listed)}"
            )
        return {
            "data/wait_share": max(part[3] for part in parts),
            "data/bad_samples": float(bad),
            "data/quarantined": float(len(self._quarantine)),
        }

    def close(self) -> None:
        self._source.close()

    def unwritten(self) -> list[dict[str, Any]]:
        """Lines of the ledger that are not stored yet."""
        return list(self._lines or [])

    def write_ledger(self) -> None:
        """Store what was taken in since the last call; call it before a checkpoint that counts those steps."""
        if self._lines:
            write_ledger(self._url, self._attempt, self._world.rank, self._lines)
            self._lines.clear()


def write_ledger(stage_url: str, attempt: str, rank: int, lines: Sequence[dict[str, Any]]) -> None:
    """Store lines of the ledger that a worker of an attempt has collected."""
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    name = f"{lines[0]['step']:012d}-{attempt}-{rank:05d}.jsonl"
    storage.write_bytes(storage.join(stage_url, LEDGER, name), data)


def _list_some(quarantine: dict[str, str]) -> str:
    named = [f"{key} ({reason})" for key, reason in sorted(quarantine.items())[:_MAX_LISTED]]
    return ", ".join(named) + (", ..." if len(quarantine) > _MAX_LISTED else "")


def read_ledger(stage_url: str) -> dict[tuple[int, int], list[str]]:
    """The ids that were trained on, by (step, group), in order.

    Steps that an attempt did again after a loss must have taken the same samples: raises ValueError where they did not,
    and where one attempt took a step twice.
    """
    taken: dict[tuple[int, int], list[str]] = {}
    by: dict[tuple[int, int], set[str]] = {}
    folder = storage.join(stage_url, LEDGER)
    for name in storage.list_dir(folder):
        attempt = name.split("-")[1]
        for text in storage.read_bytes(storage.join(folder, name)).decode().splitlines():
            line = json.loads(text)
            place = (line["step"], line["group"])
            if attempt in by.setdefault(place, set()):
                raise ValueError(f"{folder}/{name}: step {place[0]} of group {place[1]} is there twice in one attempt")
            by[place].add(attempt)
            if taken.setdefault(place, line["ids"]) != line["ids"]:
                raise ValueError(f"{folder}/{name}: step {place[0]} of group {place[1]} took other samples before")
    return dict(sorted(taken.items()))
