"""A worker's rank, its share of the groups, and the collectives that the engine uses."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """A worker among the workers of a run."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    group: dist.ProcessGroup | None = None
    """None: a single worker, without torch.distributed."""
    side_group: dist.ProcessGroup | None = None
    """A second gloo group of the same workers, for the collectives of a background thread."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the workers, in place, and return it."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_gather_object(self, value: T) -> list[T]:
        """Return every worker's value by rank. Values must be small and picklable."""
        return self._all_gather_object(value, self.group)

    def all_gather_object_side_group(self, value: T) -> list[T]:
        """`all_gather_object` for a background thread: its collectives do not mix with those of the training."""
        return self._all_gather_object(value, self.side_group)

    def _all_gather_object(self, value: T, group: dist.ProcessGroup | None) -> list[T]:
        if group is None:
            assert self.size == 1, "several workers without a process group"
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=group)
        return values

    def broadcast_object(self, value: T) -> T:
        """Return the first worker's value on every worker."""
        return self.all_gather_object(value if self.is_main else None)[0]  # type: ignore[return-value]

    def barrier(self) -> None:
        self.all_gather_object(None)


def leave_process_group() -> None:
    """Leave torch's process groups, if this process is a member, and close its connections to the other members."""
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # a connection is closed with the last object that refers to it


@dataclass(frozen=True)
class Share:
    """The groups of a stage that a worker runs: whole groups, contiguous, spread as evenly as possible."""

    lanes: range
    groups: int
    workers: int

    @staticmethod
    def of(world: World, groups: int) -> Share:
        """Return this worker's share. Raises ValueError if there are fewer groups than workers."""
        if world.size > groups:
            raise ValueError(f"{world.size} workers for {groups} groups: a worker runs at least one whole group")
        each, extra = divmod(groups, world.size)
        start = world.rank * each + min(world.rank, extra)
        return Share(range(start, start + each + (world.rank < extra)), groups, world.size)

    @property
    def largest(self) -> int:
        """Groups of the worker that runs most."""
        return -(-self.groups // self.workers)

    @property
    def fraction(self) -> float:
        """This worker's fraction of the global batch."""
        return len(self.lanes) / self.groups

    @property
    def weight(self) -> float:
        """Weight of this worker's mean loss that makes the plain mean over workers the mean over groups."""
        return len(self.lanes) * self.workers / self.groups


def weighted_mean(tensors: Mapping[str, Tensor], world: World, share: Share) -> dict[str, Tensor]:
    """Average each tensor over the workers by share, in float64; return new tensors. One collective."""
    if world.group is None or not tensors:
        return {name: tensor.clone() for name, tensor in tensors.items()}
    flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors.values()]) * share.fraction
    means = torch.split(world.sum(flat), [tensor.numel() for tensor in tensors.values()])
    return {
        name: mean.view_as(tensor).to(tensor.dtype) for (name, tensor), mean in zip(tensors.items(), means, strict=True)
    }
