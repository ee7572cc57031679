"""Random draws that do not know how many workers there are: functions of (seed, step, group, place)."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from whole numbers and names, the same on every machine."""
    packed = b"".join(
        b"i" + struct.pack("<q", part) if isinstance(part, int) else b"s" + part.encode() + b"\0" for part in parts
    )
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


class Noise:
    """Draws for the samples of one worker: group by group, each from a generator of its own.

    Drawn on the CPU in float32 whatever the device and precision, so that every worker and machine agrees.
    """

    def __init__(
        self, seed: int, stage: str, lanes: range, group_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.seed, self.stage, self.lanes, self.group_size = seed, stage, lanes, group_size
        self.device, self.dtype = device, dtype
        self.step, self.calls = 0, 0

    def start(self, step: int) -> None:
        self.step, self.calls = step, 0

    def normal(self, *shape: int) -> Tensor:
        """(N, *shape) standard normal."""
        return self._each(lambda g: torch.randn(self.group_size, *shape, generator=g))

    def uniform(self, *shape: int) -> Tensor:
        """(N, *shape) uniform in [0, 1)."""
        return self._each(lambda g: torch.rand(self.group_size, *shape, generator=g))

    def _each(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        self.calls += 1
        parts = []
        for lane in self.lanes:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, self.stage, self.step, lane, self.calls))
            parts.append(draw(generator))
        return torch.cat(parts).to(self.device, self.dtype, non_blocking=True)
