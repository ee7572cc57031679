"""Copies of the state in the memory of other processes, every few steps: a restart loses seconds, not minutes.

Each worker gives its part (that of the sharded checkpoint) to keepers that outlive it, on two machines where there are
two. Where the parts lie is `ReplicaStore`' business; how often, and which copy is whole, is decided here.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

from t2idist.config import CheckpointConfig
from t2idist.engine.checkpoint import sharded
from t2idist.engine.checkpoint.format import CorruptCheckpoint
from t2idist.engine.checkpoint.manager import CommittedCheckpoint, marker_fields, load_checkpoint, checkpoint_state
from t2idist.engine.checkpoint.replica_protocol import ReplicaInfo, ReplicaStore
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import World

logger = logging.getLogger(__name__)

REPLICA_SOURCE = "copy in memory"
MAX_TIME_SHARE = 0.01
"""Of the training's time that the copies may take."""


@dataclass(frozen=True)
class ReplicaSet:
    """A whole copy. parts: by rank. marker: as a checkpoint's commit marker."""

    parts: tuple[ReplicaInfo, ...]
    marker: dict[str, Any]


class ReplicaManager:
    """Takes copies of a stage's state, one at a time, beside the training.

    key: of the stage. every_steps of the config: fixed, or 0: as often as it costs less than a hundredth of the time.
    """

    def __init__(self, keepers: ReplicaStore, key: str, world: World, config: CheckpointConfig, attempt: str) -> None:
        self._keepers, self._key, self._world, self._attempt = keepers, key, world, attempt
        self._fixed = config.memory_every_steps
        self.every_steps = self._fixed or 1
        self._placement: sharded.PartPlan | None = None
        self._part: sharded.PartBuffer | None = None
        self._sending: threading.Thread | None = None
        self._fault: str | None = None
        self._told = False
        self._cost_seconds = self._sent_seconds = 0.0
        self._copies = 0
        self._taken_step: int | None = None
        self.notes: list[Any] = []

    def due(self, step: int) -> bool:
        return step % self.every_steps == 0

    def take(self, trainer: Trainer, notes: Any) -> None:
        """Copy this worker's part of the state and begin to send it, with its notes (plain values). A collective."""
        began = time.monotonic()
        self._join()
        state = checkpoint_state(trainer)
        if self._placement is None or self._part is None:
            self._placement = sharded.plan_parts(state, self._world)
            self._part = sharded.PartBuffer(state, self._placement.mine)
            self._names = self._world.all_gather_object(self._placement.mine)
            began = time.monotonic()  # once in a stage, and no part of what a copy costs
        self._part.fill(state)
        facts: dict[str, Any] = {"notes": notes}
        if self._world.is_main:
            assert self._placement.metadata is not None
            facts["marker"] = {**marker_fields(trainer), "tensors": sharded.describe_tensors(self._placement.metadata, self._names)}
        held = ReplicaInfo(self._attempt, trainer.step, trainer.images, self._world.rank, self._world.size, facts)
        self._sending = threading.Thread(target=self._send, args=(held, self._part), name="memory", daemon=True)
        self._sending.start()
        self._taken_step = trainer.step
        self._cost_seconds += time.monotonic() - began
        self._copies += 1

    def keep(self, trainer: Trainer, notes: Any) -> bool:
        """See that the state of this very step is held, and whether it is by all workers. A collective."""
        if self._taken_step != trainer.step:
            self.take(trainer, notes)
        self._join()
        return not any(self._world.all_gather_object(self._fault is not None))

    def settle(self, step_seconds: float) -> dict[str, float]:
        """Choose how often to copy from what it has cost; values to log. A collective.

        step_seconds: what a step takes, the same on all workers.
        """
        costs = [cost for cost in self._world.all_gather_object((self._cost_seconds, self._copies)) if cost[1]]
        if not self._fixed and costs:
            cost = max(seconds / copies for seconds, copies in costs)
            self.every_steps = max(1, round(cost / (MAX_TIME_SHARE * max(step_seconds, 1e-6)) + 0.5))
        if self._fault is not None and not self._told:
            self._told = True
            logger.warning("copies in memory: %s; checkpoints in storage go on", self._fault)
        self._cost_seconds, self._copies = 0.0, 0
        return {"checkpoint/memory_every_steps": float(self.every_steps)}

    def close(self, forget: bool) -> None:
        """Wait for what is under way. forget: the stage is done, so no copy of it is of use."""
        self._join()
        if forget and self._world.is_main:
            try:
                self._keepers.forget(self._key)
            except OSError as error:
                logger.warning("copies in memory: %s", error)

    def restore(self, trainer: Trainer, newer_than_images: int) -> CommittedCheckpoint | None:
        """Put the newest whole copy into the trainer, if it is newer; its notes are in `notes`. A collective."""
        copy = self._world.broadcast_object(self._newest() if self._world.is_main else None)
        if copy is None or copy.parts[0].images <= newer_than_images:
            return None
        by_name = {sharded.part_name(held.rank): held for held in copy.parts}

        def read(name: str) -> bytes:
            try:
                return self._keepers.get(self._key, by_name[name])
            except OSError as error:
                raise CorruptCheckpoint(f"{REPLICA_SOURCE} at step {copy.parts[0].step}: {error}") from None

        try:
            found = load_checkpoint(trainer, REPLICA_SOURCE, copy.marker, read)
        except CorruptCheckpoint as error:
            if self._world.is_main:
                logger.warning("passed over: %s", error)
            return None
        self.notes = [held.facts["notes"] for held in copy.parts]
        return found

    def _newest(self) -> ReplicaSet | None:
        try:
            found = self._keepers.list_replicas(self._key)
        except OSError as error:
            logger.warning("copies in memory: %s", error)
            return None
        copies: dict[tuple[int, str], dict[int, ReplicaInfo]] = {}
        for held in found:
            copies.setdefault((held.step, held.attempt), {})[held.rank] = held
        for _, parts in sorted(copies.items(), reverse=True):
            first = parts.get(0)
            if first is not None and set(parts) == set(range(first.workers)):
                return ReplicaSet(tuple(parts[rank] for rank in range(first.workers)), dict(first.facts["marker"]))
        return None

    def _join(self) -> None:
        if self._sending is not None:
            self._sending.join()
            self._sending = None
            self._cost_seconds += self._sent_seconds

    def _send(self, held: ReplicaInfo, part: sharded.PartBuffer) -> None:
        began = time.monotonic()
        try:
            self._keepers.put(self._key, held, part.data)
            self._fault, self._told = None, False
        except Exception as error:
            self._fault = str(error)
        on_cores = self._world.device.type == "cpu"  # then sender and keepers take from the training's own cores
        self._sent_seconds = time.monotonic() - began if on_cores else 0.0
