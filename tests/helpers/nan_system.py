"""AttnGAN of which chosen steps lose their head: a system outside the package, and what chaos.py's `nan` is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from t2idist.contract import Batch, BuildInfo, System, Train
from t2idist.systems import attngan


@dataclass(frozen=True)
class Config(attngan.Config):
    """nan_steps: steps whose loss is not a number, for one group: that which takes the sample at the same place in
    nan_samples."""

    nan_steps: tuple[int, ...] = ()
    nan_samples: tuple[str, ...] = ()


class Poisoned(attngan.AttnGan):
    def __init__(self, config: Config, plan: BuildInfo) -> None:
        super().__init__(config, plan)
        self.nan_samples = dict(zip(config.nan_steps, config.nan_samples, strict=True))

    def step(self, batch: Batch, train: Train) -> None:
        bad = self.nan_samples.get(train.step) in batch.ids
        super().step(batch, _Poisoning(train) if bad else train)  # type: ignore[arg-type]


class _Poisoning:
    """A step's view of the engine in which no loss is a number."""

    def __init__(self, train: Train) -> None:
        self._train = train

    def __getattr__(self, name: str) -> Any:
        return getattr(self._train, name)

    def apply(self, role: str, loss: Tensor) -> None:
        self._train.apply(role, loss * torch.nan)


def build(config: Config, plan: BuildInfo) -> System:
    attngan.build(config, plan)  # its checks
    return Poisoned(config, plan)
