"""Replicas: copies of checkpoint parts in the memory of other nodes, every few steps, so that a restart loses seconds.

Each worker sends its part of the checkpoint to a `ReplicaStore`, which outlives the worker. The store decides where
replicas are; this file decides how often to copy, and which replicas make a complete checkpoint.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

from t2idist.config import CheckpointConfig
from t2idist.engine.cadence import Cadence
from t2idist.engine.checkpoint import sharded
from t2idist.engine.checkpoint.format import CorruptCheckpoint
from t2idist.engine.checkpoint.manager import (
    CommittedCheckpoint,
    checkpoint_state,
    load_checkpoint,
    marker_fields,
)
from t2idist.engine.checkpoint.replica_protocol import REPLICA_THREAD, ReplicaInfo, ReplicaStore
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import World

logger = logging.getLogger(__name__)

REPLICA_SOURCE = "copy in memory"
"""Stands for the checkpoint's URL, in attempts.json too."""
MAX_TIME_SHARE = 0.01
"""Share of the training time that copying may take."""


@dataclass(frozen=True)
class ReplicaSet:
    """The replicas of all parts of a checkpoint."""

    parts: tuple[ReplicaInfo, ...]
    """By rank."""
    marker: dict[str, Any]
    """As a checkpoint's commit marker."""


class ReplicaManager:
    """Copies a stage's state to replicas, one copy at a time, in parallel to the training.

    Copies come every `config.memory_every_steps` steps or, if that is 0, so often that copying takes at most
    `MAX_TIME_SHARE` of the time: the first copy, after the first step, shows what a copy costs.

    Args:
        key: names the stage in the store.
        attempt: id of this attempt at the run.
    """

    def __init__(self, store: ReplicaStore, key: str, world: World, config: CheckpointConfig, attempt: str) -> None:
        self._store, self._key, self._world, self._attempt = store, key, world, attempt
        self._fixed_steps = config.memory_every_steps
        self._cadence = Cadence(world, 0.0)
        self._plan: sharded.PartPlan | None = None
        self._buffer: sharded.PartBuffer | None = None
        self._sending: threading.Thread | None = None
        self._error: str | None = None
        self._warned = False
        self._cost_seconds = self._sent_seconds = 0.0
        """Of the last copy."""
        self._copied_step: int | None = None
        self.notes: list[Any] = []
        """After `restore`: the notes of every worker."""

    def due(self, step: int) -> bool:
        """Return whether a copy is due after a step. A collective."""
        if self._fixed_steps:
            return step % self._fixed_steps == 0
        if self._copied_step is not None and not self._cadence.seconds:
            self._join()
            self._choose_cadence()
            self._cadence.restart(self._copied_step)
        return self._cadence.due(step)

    def copy(self, trainer: Trainer, notes: Any) -> None:
        """Copy this worker's part of the state and begin to send it. A collective.

        Args:
            notes: plain values to restore with the part.
        """
        began = time.monotonic()
        self._join()
        if self._copied_step is not None and not self._fixed_steps:
            self._choose_cadence()
        state = checkpoint_state(trainer)
        if self._plan is None or self._buffer is None:
            self._plan = sharded.plan_parts(state, self._world)
            self._buffer = sharded.PartBuffer(state, self._plan.names)
            self._names_by_rank = self._world.all_gather_object(self._plan.names)
            began = time.monotonic()  # planning is once in a stage, so it is no cost of a copy
        self._buffer.fill(state)
        metadata: dict[str, Any] = {"notes": notes}
        if self._world.is_main:
            assert self._plan.dcp_metadata is not None
            tensors = sharded.describe_tensors(self._plan.dcp_metadata, self._names_by_rank)
            metadata["marker"] = {**marker_fields(trainer), "tensors": tensors}
        rank, workers = self._world.rank, self._world.size
        info = ReplicaInfo(self._attempt, trainer.step, trainer.images, rank, workers, metadata)
        self._sending = threading.Thread(target=self._send, args=(info, self._buffer), name=REPLICA_THREAD, daemon=True)
        self._sending.start()
        self._copied_step = trainer.step
        self._cost_seconds = time.monotonic() - began

    def copy_and_wait(self, trainer: Trainer, notes: Any) -> bool:
        """Copy the state of this step unless that was done, and wait for it. A collective.

        Returns:
            Whether the parts of all workers were stored.
        """
        if self._copied_step != trainer.step:
            self.copy(trainer, notes)
        self._join()
        return not any(self._world.all_gather_object(self._error is not None))

    def report(self) -> dict[str, float]:
        """Return values to log; warn once if copies fail."""
        if self._error is not None and not self._warned:
            self._warned = True
            logger.warning("replicas: %s; checkpoints in storage continue", self._error)
        return {"checkpoint/memory_every_steps": float(self._fixed_steps or self._cadence.interval[0])}

    def close(self, forget: bool) -> None:
        """Wait for the copy in progress.

        Args:
            forget: whether to delete the stage's replicas, as they are not needed any more.
        """
        self._join()
        if forget and self._world.is_main:
            try:
                self._store.forget(self._key)
            except OSError as error:
                logger.warning("replicas: %s", error)

    def restore(self, trainer: Trainer, newer_than_images: int) -> CommittedCheckpoint | None:
        """Load the newest complete set of replicas if it is newer than that, and set `notes`. A collective."""
        newest = self._world.broadcast_object(self._newest() if self._world.is_main else None)
        if newest is None or newest.parts[0].images <= newer_than_images:
            return None
        infos = {sharded.part_name(info.rank): info for info in newest.parts}

        def read(name: str) -> bytes:
            try:
                return self._store.get(self._key, infos[name])
            except OSError as error:
                raise CorruptCheckpoint(f"{REPLICA_SOURCE} at step {newest.parts[0].step}: {error}") from None

        try:
            restored = load_checkpoint(trainer, REPLICA_SOURCE, newest.marker, read)
        except CorruptCheckpoint as error:
            if self._world.is_main:
                logger.warning("replica not used: %s", error)
            return None
        self.notes = [info.metadata["notes"] for info in newest.parts]
        return restored

    def _newest(self) -> ReplicaSet | None:
        try:
            infos = self._store.list_replicas(self._key)
        except OSError as error:
            logger.warning("replicas: %s", error)
            return None
        sets: dict[tuple[int, str], dict[int, ReplicaInfo]] = {}
        for info in infos:
            sets.setdefault((info.step, info.attempt), {})[info.rank] = info
        for _, parts in sorted(sets.items(), reverse=True):
            first = parts.get(0)
            if first is not None and set(parts) == set(range(first.workers)):
                return ReplicaSet(tuple(parts[rank] for rank in range(first.workers)), dict(first.metadata["marker"]))
        return None

    def _choose_cadence(self) -> None:
        """Choose the seconds between two copies from the cost of the last one. A collective."""
        cost = max(self._world.all_gather_object(self._cost_seconds))
        self._cadence.seconds = max(cost, 1e-6) / MAX_TIME_SHARE

    def _join(self) -> None:
        if self._sending is not None:
            self._sending.join()
            self._sending = None
            self._cost_seconds += self._sent_seconds

    def _send(self, info: ReplicaInfo, buffer: sharded.PartBuffer) -> None:
        began = time.monotonic()
        try:
            self._store.put(self._key, info, buffer.data)
            self._error, self._warned = None, False
        except Exception as error:
            self._error = str(error)
        on_cpu = self._world.device.type == "cpu"  # then sending and storing use the training's cores
        self._sent_seconds = time.monotonic() - began if on_cpu else 0.0
