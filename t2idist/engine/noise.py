"""Random draws as functions of (seed, step, group, position in the group), whatever the number of workers."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """Hash integers and names into a 63-bit seed, the same on every machine."""
    packed = b"".join(
        b"i" + struct.pack("<q", part) if isinstance(part, int) else b"s" + part.encode() + b"\0" for part in parts
    )
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class Draw:
    """A draw of (N, *shape) values: standard normal, or uniform in [0, 1)."""

    shape: tuple[int, ...]
    uniform: bool = False


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
        self.noted: list[Draw] | None = None
        """Where draws are noted."""
        self.given: Sequence[Tensor] | None = None
        """What a step gets in place of its draws, in their order."""

    def start(self, step: int) -> None:
        """Begin a step: its draws are numbered from 1."""
        self.step, self.calls = step, 0

    def normal(self, *shape: int) -> Tensor:
        """Draw (N, *shape) standard normal values."""
        return self._next(Draw(shape))

    def uniform(self, *shape: int) -> Tensor:
        """Draw (N, *shape) uniform values in [0, 1)."""
        return self._next(Draw(shape, uniform=True))

    def empty(self, draw: Draw) -> Tensor:
        """Return a tensor for the values of a draw."""
        return torch.empty(len(self.lanes) * self.group_size, *draw.shape, device=self.device, dtype=self.dtype)

    def draw_into(self, tensor: Tensor, draw: Draw) -> None:
        """Write the step's next draw to a tensor."""
        self.calls += 1
        tensor.copy_(self._values(draw), non_blocking=True)

    def _next(self, draw: Draw) -> Tensor:
        self.calls += 1
        if self.noted is not None:
            self.noted.append(draw)
        if self.given is not None:
            return self.given[self.calls - 1]
        return self._values(draw).to(self.device, self.dtype, non_blocking=True)

    def _values(self, draw: Draw) -> Tensor:
        """Return float32 values on the host; page-locked if they go to an accelerator."""
        kind, groups = torch.rand if draw.uniform else torch.randn, []
        for lane in self.lanes:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, self.stage, self.step, lane, self.calls))
            groups.append(kind(self.group_size, *draw.shape, generator=generator))
        if self.device.type == "cpu":
            return torch.cat(groups)
        pinned = torch.empty(len(groups) * self.group_size, *draw.shape, pin_memory=True)
        return torch.cat(groups, out=pinned)
