"""The interface to replicas: in-memory copies of checkpoint parts on other nodes. It does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class ReplicaInfo:
    """Describes a replica: a copy of one worker's checkpoint part."""

    attempt: str
    """Id of the attempt at the run; its workers copied all parts of a step together."""
    step: int
    images: int
    rank: int
    workers: int
    """Number of workers, so of parts."""
    metadata: Mapping[str, Any]
    """"notes": the worker's unwritten records. "marker", only with part 0: as a commit marker, of all parts."""


CHECKPOINT_THREAD, REPLICA_THREAD = "checkpoint", "replica"
"""Names of the threads that write a state while training goes on."""


class ReplicaStore(Protocol):
    """Processes on the nodes that store replicas by key. All methods raise OSError if they cannot be reached."""

    def put(self, key: str, info: ReplicaInfo, data: memoryview) -> None:
        """Store a part on two nodes if there are two. Each node keeps a worker's last two."""

    def list_replicas(self, key: str) -> list[ReplicaInfo]:
        """Return the replicas on all nodes that respond."""

    def get(self, key: str, info: ReplicaInfo) -> bytes:
        """Return the bytes of a part."""

    def forget(self, prefix: str) -> None:
        """Delete the replicas under keys with this prefix."""
