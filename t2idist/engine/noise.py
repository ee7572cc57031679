"""Random draws as functions of (seed, step, group, position in the group), whatever the number of workers."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """Hash integers and names into a 63-bit seed, the same on every machine."""
    packed = b"".join(
        b"i" + struct.pack("<q", part) if isinstance(part, int) else b"s" + part.encode() + b"\0" for part in parts
    )
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


class Noise:
    """Draws for the samples of one worker, group by group, each group from its own generator.

    Values are drawn on the CPU in float32 and then converted, so that every device and machine gets the same ones.
    """

    def __init__(
        self, seed: int, stage: str, lanes: range, group_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.seed, self.stage, self.lanes, self.group_size = seed, stage, lanes, group_size
        self.device, self.dtype = device, dtype
        self.step, self.calls = 0, 0

    def start(self, step: int) -> None:
        """Begin a step: its draws are numbered from 1."""
        self.step, self.calls = step, 0

    def normal(self, *shape: int) -> Tensor:
        """Draw (N, *shape) standard normal values."""
        return self._draw(lambda g: torch.randn(self.group_size, *shape, generator=g))

    def uniform(self, *shape: int) -> Tensor:
        """Draw (N, *shape) uniform values in [0, 1)."""
        return self._draw(lambda g: torch.rand(self.group_size, *shape, generator=g))

    def _draw(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        self.calls += 1
        groups = []
        for lane in self.lanes:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, self.stage, self.step, lane, self.calls))
            groups.append(draw(generator))
        if self.device.type == "cpu":
            return torch.cat(groups).to(self.dtype)
        pinned = torch.empty(len(groups) * self.group_size, *groups[0].shape[1:], pin_memory=True)
        return torch.cat(groups, out=pinned).to(self.device, self.dtype, non_blocking=True)
