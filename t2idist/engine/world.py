"""Who this worker is: its place among the workers, its share of the groups, and the few collectives that are used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """A worker's place. group: the process group; None: alone, without torch.distributed.

    aside: another group of the same workers, on the CPU, for collectives of a thread beside the training's.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    group: dist.ProcessGroup | None = None
    aside: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over workers, on every worker; the argument is overwritten."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_gather_object(self, value: T) -> list[T]:
        """Every worker's (small, picklable) value, by rank."""
        return self._gather(value, self.group)

    def all_gather_object_side_group(self, value: T) -> list[T]:
        """The same for one thread beside the training: its collectives do not meet the training's."""
        return self._gather(value, self.aside)

    def _gather(self, value: T, group: dist.ProcessGroup | None) -> list[T]:
        if group is None:
            assert self.size == 1, "workers without a process group"
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=group)
        return values

    def broadcast_object(self, value: T) -> T:
        """The first worker's value, on every worker."""
        return self.all_gather_object(value if self.is_main else None)[0]  # type: ignore[return-value]

    def barrier(self) -> None:
        self.all_gather_object(None)


@dataclass(frozen=True)
class Share:
    """Which of a stage's groups a worker runs: whole groups, contiguous, as even as can be."""

    lanes: range
    groups: int
    workers: int

    @staticmethod
    def of(world: World, groups: int) -> Share:
        """Raises ValueError where there are fewer groups than workers."""
        if world.size > groups:
            raise ValueError(f"{world.size} workers for {groups} groups: a worker runs at least one whole group")
        each, extra = divmod(groups, world.size)
        start = world.rank * each + min(world.rank, extra)
        return Share(range(start, start + each + (world.rank < extra)), groups, world.size)

    @property
    def fraction(self) -> float:
        """This worker's part of the global batch."""
        return len(self.lanes) / self.groups

    @property
    def weight(self) -> float:
        """Factor on a worker's mean loss that makes the plain mean over workers the mean over groups."""
        return len(self.lanes) * self.workers / self.groups


def weighted_mean(tensors: Mapping[str, Tensor], world: World, share: Share) -> dict[str, Tensor]:
    """Each tensor's mean over workers, weighted by their share, in float64; one collective. Inputs stay as they are."""
    if world.group is None or not tensors:
        return {name: tensor.clone() for name, tensor in tensors.items()}
    flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors.values()]) * share.fraction
    parts = torch.split(world.sum(flat), [tensor.numel() for tensor in tensors.values()])
    return {
        name: part.view_as(tensor).to(tensor.dtype) for (name, tensor), part in zip(tensors.items(), parts, strict=True)
    }
