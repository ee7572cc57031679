"""What the groups of a worker keep from step to step, other than weights (`contract.KeepsMemory`)."""

from __future__ import annotations

import torch
from torch import Tensor

from t2idist.contract import KeepsMemory, System

PREFIX = "memory/"
"""Prefix of the names of these tensors in the state of a trainer."""


class GroupMemory:
    """The tensors that a system declares, for each group of a worker; zeros at first.

    Args:
        lanes: Numbers of the worker's groups.
    """

    def __init__(self, system: System, lanes: range, device: torch.device, dtype: torch.dtype) -> None:
        shapes = system.memory if isinstance(system, KeepsMemory) else {}
        self._lanes = lanes
        self._tensors = {
            name: torch.zeros(len(lanes), *shape, device=device, dtype=dtype) for name, shape in shapes.items()
        }

    def of(self, name: str, lanes: range) -> Tensor:
        """Return a tensor (groups, *shape) of these groups, to write in place."""
        first = self._lanes.start
        return self._tensors[name][lanes.start - first : lanes.stop - first]

    def state(self) -> dict[str, Tensor]:
        """Return the live tensor of each group by name: ``memory/<group>/<name>``."""
        return {
            f"{PREFIX}{lane}/{name}": of_group
            for name, of_groups in self._tensors.items()
            for lane, of_group in zip(self._lanes, of_groups, strict=True)
        }
