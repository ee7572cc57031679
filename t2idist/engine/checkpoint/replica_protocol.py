"""What is held of a training's state outside its workers, and by whom. Without torch: the holders do not need it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class ReplicaInfo:
    """What a keeper knows of one worker's part of one copy.

    attempt: of the workers that made it together. images, step: the training's. rank, workers: whose part, of how many.
    facts: of the whole copy (only with the first worker's part) and notes (with each).
    """

    attempt: str
    step: int
    images: int
    rank: int
    workers: int
    facts: Mapping[str, Any]


class ReplicaStore(Protocol):
    """Other processes that hold parts by key. All raise OSError where they cannot be reached."""

    def put(self, key: str, info: ReplicaInfo, data: memoryview) -> None:
        """Give a part to keepers on two machines, where there are two; of each worker they hold the last two."""

    def list_replicas(self, key: str) -> list[ReplicaInfo]:
        """What all keepers that still live hold."""

    def get(self, key: str, info: ReplicaInfo) -> bytes:
        """The bytes of a part."""

    def forget(self, prefix: str) -> None:
        """Let go of what is held under keys with this prefix."""
