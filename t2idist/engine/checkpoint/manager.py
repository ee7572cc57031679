"""Checkpoints of a stage: where they lie, which one is the newest good one, how many stay."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from t2idist import storage
from t2idist.config import CheckpointConfig
from t2idist.engine.checkpoint import sharded
from t2idist.engine.checkpoint.format import (
    CorruptCheckpoint,
    folder_name,
    images_of,
    is_committed,
    list_folders,
    milestones_of,
    read_marker,
)
from t2idist.engine.metrics import now
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import World

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CommittedCheckpoint:
    """A committed checkpoint."""

    url: str
    images: int
    marker: dict[str, Any]


class CheckpointManager:
    """The checkpoints under `url` (a folder a save, named by images seen and by the attempt that wrote it).

    Saving stalls the training for the copy into host memory; a thread writes it out, one save at a time. meta: plain
    values that go into every commit marker (config, vocabulary, versions). newest: on the first worker, what is known
    of the newest whole one: "images", "time" (ISO), and "stall_seconds" that the training stood still for it.
    """

    def __init__(self, url: str, world: World, config: CheckpointConfig, meta: dict[str, Any]) -> None:
        self.url, self.world, self.config, self.meta = url, world, config, meta
        self.attempt = world.broadcast_object(uuid.uuid4().hex[:8])
        self.newest: dict[str, Any] = {}
        self._placement: sharded.PartPlan | None = None
        self._part: sharded.PartBuffer | None = None
        self._writing: threading.Thread | None = None
        self._fault: str | None = None

    def save(self, trainer: Trainer) -> str | None:
        """Take the trainer's state with all workers and begin to write it. A collective.

        Gives the folder's URL, or None where the save before is still being written and the config says to skip. A
        save that cannot be written is a warning, and the training goes on: the next one may be.
        """
        if self.config.when_busy == "skip" and any(self.world.all_gather_object(self.busy)):
            return None
        began = time.monotonic()
        self._join()
        folder = storage.join(self.url, folder_name(trainer.images, self.attempt))
        state = checkpoint_state(trainer)
        if self._placement is None or self._part is None:
            self._placement = sharded.plan_parts(state, self.world)
            self._part = sharded.PartBuffer(state, self._placement.mine)
        self._part.fill(state)
        meta = {"time": now(), **marker_fields(trainer), **self.meta}
        stall_seconds = round(time.monotonic() - began, 4)
        arguments = (folder, meta, stall_seconds)
        self._writing = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._writing.start()
        return folder

    def finish(self) -> None:
        """Wait until the last save is committed. A collective; raises OSError on every worker where it was not."""
        self._join()
        faults = [fault for fault in self.world.all_gather_object(self._fault) if fault is not None]
        if faults:
            raise OSError(faults[0])

    @property
    def busy(self) -> bool:
        """Whether a save is being written."""
        return self._writing is not None and self._writing.is_alive()

    def _join(self) -> None:
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def _write(self, folder: str, meta: dict[str, Any], stall_seconds: float) -> None:
        """Write this worker's part; when all are written, the first worker commits and prunes. On a thread."""
        assert self._placement is not None and self._part is not None
        facts, fault = {}, None
        try:
            if self._placement.mine:
                facts = sharded.write_part(folder, sharded.part_name(self.world.rank), self._part)
        except Exception as error:
            fault = f"checkpoint {storage.redact(folder)}: part {self.world.rank} is not written: {error}"
        parts = self.world.all_gather_object_side_group((self._placement.mine, facts, fault))
        self._fault = next((part[2] for part in parts if part[2] is not None), None)
        if not self.world.is_main:
            return
        try:
            if self._fault is None:
                assert self._placement.metadata is not None
                sharded.commit(folder, self._placement.metadata, [part[:2] for part in parts], meta)
                self.newest.update(images=meta["images"], time=meta["time"], stall_seconds=stall_seconds)
                self._prune()
        except Exception as error:
            self._fault = f"checkpoint {storage.redact(folder)} is not committed: {error}"
        if self._fault is not None:
            logger.warning("%s; the training goes on, and the checkpoints before stay", self._fault)

    def restore(self, trainer: Trainer) -> CommittedCheckpoint | None:
        """Load the newest good checkpoint into the trainer; None where there is none at all. A collective.

        A torn or rotten one is passed over with a warning that names the file. Raises ValueError where checkpoints
        exist but none can be used, or where the newest was made with another group size or number of groups.
        """
        faults = []
        for folder in self.world.broadcast_object(list_folders(self.url)):
            url = storage.join(self.url, folder)
            try:
                found = load_checkpoint(trainer, url, read_marker(url))
                self.newest.update(images=found.images, time=found.marker.get("time"))
                return found
            except CorruptCheckpoint as error:
                faults.append(str(error))
                if self.world.is_main:
                    logger.warning("checkpoint passed over: %s", error)
        if faults:
            raise ValueError(f"{self.url}: no checkpoint can be used: {faults[0]}")
        return None

    def newest_images(self) -> int:
        """Images seen at the newest committed checkpoint; -1 where there is none. A collective."""
        images = -1
        if self.world.is_main:
            committed = (name for name in list_folders(self.url) if is_committed(self.url, name))
            images = next((images_of(name) for name in committed), -1)
        return self.world.broadcast_object(images)

    def _prune(self) -> None:
        committed: list[str] = []
        torn: list[str] = []
        for folder in list_folders(self.url):
            (committed if is_committed(self.url, folder) else torn).append(folder)
        every = self.config.keep_every_images
        milestones = milestones_of([images_of(folder) for folder in committed], every) if every else set()
        old = [folder for folder in committed[self.config.keep :] if images_of(folder) not in milestones]
        for folder in old + torn:
            storage.remove(storage.join(self.url, folder))


def checkpoint_state(trainer: Trainer) -> dict[str, Tensor]:
    """All that a checkpoint holds, by name. A collective."""
    return trainer.state() | trainer.settled_buffers() | trainer.own_buffers()


def marker_fields(trainer: Trainer) -> dict[str, Any]:
    """What a marker says of the moment and of the scale."""
    return {
        "images": trainer.images,
        "step": trainer.step,
        "workers": trainer.world.size,
        "groups": trainer.share.groups,
        "group_size": trainer.group_size,
    }


def load_checkpoint(
    trainer: Trainer, url: str, marker: dict[str, Any], read: sharded.ReadPart | None = None
) -> CommittedCheckpoint:
    """Put a checkpoint into the trainer. A collective; raises `CorruptCheckpoint`, or ValueError for one of another scale.

    read: gives its parts; None: they are the files under `url`.
    """
    _check_scale(url, marker, trainer)
    state = trainer.state()
    places = dict(state)
    if marker["workers"] == trainer.world.size:
        own = {key.split("/", 2)[2]: key for key in trainer.own_buffers()}
        places = {own.get(key, key): value for key, value in state.items()}
    sharded.load(places, url, marker, trainer.world.group, read)
    trainer.finish_load(state)
    trainer.step = marker["step"]
    return CommittedCheckpoint(url, marker["images"], marker)


def _check_scale(url: str, marker: dict[str, Any], trainer: Trainer) -> None:
    for name, here in (("groups", trainer.share.groups), ("group_size", trainer.group_size)):
        if marker[name] != here:
            raise ValueError(
                f"{url}: made with {name} {marker[name]}, and this run has {name} {here}; "
                "give the run another name, or the same scale"
            )
