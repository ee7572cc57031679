"""The checkpoints of a stage: save, find and load the newest valid one, delete old ones."""

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
from t2idist.engine import memory
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
from t2idist.engine.checkpoint.replica_protocol import CHECKPOINT_THREAD
from t2idist.engine.metrics import now
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import World

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CommittedCheckpoint:
    """A checkpoint that was loaded."""

    url: str
    images: int
    marker: dict[str, Any]


class CheckpointManager:
    """Saves and restores the checkpoints under a folder, each in a folder named by images seen and attempt.

    A save blocks the training only while the state is copied to host memory; a thread writes it, one save at a time.

    Args:
        meta: plain values for every commit marker (config, vocabulary, versions).
    """

    def __init__(self, url: str, world: World, config: CheckpointConfig, meta: dict[str, Any]) -> None:
        self.url, self.world, self.config, self.meta = url, world, config, meta
        self.attempt = world.broadcast_object(uuid.uuid4().hex[:8])
        self.newest: dict[str, Any] = {}
        """On the first worker, of the newest checkpoint: images, time (ISO), stall_seconds (training was blocked)."""
        self._plan: sharded.PartPlan | None = None
        self._buffer: sharded.PartBuffer | None = None
        self._writing: threading.Thread | None = None
        self._error: str | None = None

    def save(self, trainer: Trainer) -> str | None:
        """Copy the trainer's state on all workers and begin to write it. A collective.

        A failure to write is a warning, and training continues: the next save may succeed.

        Returns:
            URL of the checkpoint; None if the save before is still in progress and the config says to skip.
        """
        if self.config.when_busy == "skip" and any(self.world.all_gather_object(self.busy)):
            return None
        began = time.monotonic()
        self._join()
        folder = storage.join(self.url, folder_name(trainer.images, self.attempt))
        state = checkpoint_state(trainer)
        if self._plan is None or self._buffer is None:
            self._plan = sharded.plan_parts(state, self.world)
            self._buffer = sharded.PartBuffer(state, self._plan.names)
        self._buffer.fill(state)
        meta = {"time": now(), **marker_fields(trainer), **self.meta}
        stall_seconds = round(time.monotonic() - began, 4)
        arguments = (folder, meta, stall_seconds)
        self._writing = threading.Thread(target=self._write, args=arguments, name=CHECKPOINT_THREAD, daemon=True)
        self._writing.start()
        return folder

    def finish(self) -> None:
        """Wait until the last save is committed. A collective; raises OSError on every worker if that failed."""
        self._join()
        errors = [error for error in self.world.all_gather_object(self._error) if error is not None]
        if errors:
            raise OSError(errors[0])

    @property
    def busy(self) -> bool:
        """Whether a save is in progress."""
        return self._writing is not None and self._writing.is_alive()

    def _join(self) -> None:
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def _write(self, folder: str, meta: dict[str, Any], stall_seconds: float) -> None:
        """Write this worker's part; once all are written, the first worker commits and prunes. Runs on a thread."""
        assert self._plan is not None and self._buffer is not None
        entry, failure = {}, None
        try:
            if self._plan.names:
                entry = sharded.write_part(folder, sharded.part_name(self.world.rank), self._buffer)
        except Exception as error:
            failure = f"checkpoint {storage.redact(folder)}: part {self.world.rank} was not written: {error}"
        parts = self.world.all_gather_object_side_group((self._plan.names, entry, failure))
        self._error = next((part[2] for part in parts if part[2] is not None), None)
        if not self.world.is_main:
            return
        try:
            if self._error is None:
                assert self._plan.dcp_metadata is not None
                sharded.commit(folder, self._plan.dcp_metadata, [part[:2] for part in parts], meta)
                self.newest.update(images=meta["images"], time=meta["time"], stall_seconds=stall_seconds)
                self._prune()
        except Exception as error:
            self._error = f"checkpoint {storage.redact(folder)} was not committed: {error}"
        if self._error is not None:
            logger.warning("%s; training continues, and earlier checkpoints are kept", self._error)

    def restore(self, trainer: Trainer) -> CommittedCheckpoint | None:
        """Load the newest valid checkpoint into the trainer. A collective.

        An incomplete or damaged one is skipped with a warning that names the file.

        Returns:
            The checkpoint; None if there is none.

        Raises:
            ValueError: no existing checkpoint is valid, or the newest one has another group size or number of groups.
        """
        errors = []
        for folder in self.world.broadcast_object(list_folders(self.url)):
            url = storage.join(self.url, folder)
            try:
                checkpoint = load_checkpoint(trainer, url, read_marker(url))
                self.newest.update(images=checkpoint.images, time=checkpoint.marker.get("time"))
                return checkpoint
            except CorruptCheckpoint as error:
                errors.append(str(error))
                if self.world.is_main:
                    logger.warning("checkpoint not used: %s", error)
        if errors:
            raise ValueError(f"{self.url}: no checkpoint is valid: {errors[0]}")
        return None

    def newest_images(self) -> int:
        """Return the images seen at the newest committed checkpoint; -1 if there is none. A collective."""
        images = -1
        if self.world.is_main:
            committed = (name for name in list_folders(self.url) if is_committed(self.url, name))
            images = next((images_of(name) for name in committed), -1)
        return self.world.broadcast_object(images)

    def _prune(self) -> None:
        """Delete all folders but the newest `config.keep` checkpoints and the milestones."""
        committed: list[str] = []
        incomplete: list[str] = []
        for folder in list_folders(self.url):
            (committed if is_committed(self.url, folder) else incomplete).append(folder)
        every = self.config.keep_every_images
        milestones = milestones_of([images_of(folder) for folder in committed], every) if every else set()
        old = [folder for folder in committed[self.config.keep :] if images_of(folder) not in milestones]
        for folder in old + incomplete:
            storage.remove(storage.join(self.url, folder))


def checkpoint_state(trainer: Trainer) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint by name. A collective."""
    return trainer.state() | trainer.averaged_buffers() | trainer.local_buffers()


def marker_fields(trainer: Trainer) -> dict[str, Any]:
    """Return the marker's fields about progress and scale."""
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
    """Load a checkpoint into the trainer. A collective.

    Args:
        read: returns a part by its name. By default it is the file under `url`.

    Raises:
        CorruptCheckpoint: a part is missing or damaged.
        ValueError: the checkpoint has another group size or number of groups.
    """
    _check_scale(url, marker, trainer)
    state = trainer.state()
    targets = dict(state)
    if marker["workers"] == trainer.world.size:
        local = {key.split("/", 2)[2]: key for key in trainer.local_buffers()}
        targets = {local.get(key, key): value for key, value in state.items()}
    new = [key for key in state if key.startswith(memory.PREFIX) and key not in marker["tensors"]]
    for name in new:
        targets.pop(name).zero_()
    if new and trainer.world.is_main:
        logger.info(
            "%s has no %s: an option that needs it is new", url, ", ".join(sorted({name.split("/")[2] for name in new}))
        )
    sharded.load(targets, url, marker, trainer.world, read)
    trainer.finish_load(state)
    trainer.step = marker["step"]
    return CommittedCheckpoint(url, marker["images"], marker)


def _check_scale(url: str, marker: dict[str, Any], trainer: Trainer) -> None:
    for name, configured in (("groups", trainer.share.groups), ("group_size", trainer.group_size)):
        if marker[name] != configured:
            raise ValueError(
                f"{url}: written with {name} {marker[name]}, but this run has {name} {configured}; "
                f"give the run another name, or the same {name}"
            )
