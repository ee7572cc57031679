"""AttnGAN with NaN losses in chosen steps: a system outside the package, and the fault `nan` of tools/chaos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from t2idist.contract import Batch, BuildInfo, System, Train
from t2idist.systems import attngan


@dataclass(frozen=True)
class Config(attngan.Config):
    nan_steps: tuple[int, ...] = ()
    """Steps with a NaN loss, on one group."""
    nan_samples: tuple[str, ...] = ()
    """For each of these steps, a sample id of that group."""


class NanAttnGan(attngan.AttnGan):
    """AttnGAN whose losses are NaN in the steps that the config names."""

    def __init__(self, config: Config, info: BuildInfo) -> None:
        super().__init__(config, info)
        self.nan_samples = dict(zip(config.nan_steps, config.nan_samples, strict=True))

    def step(self, batch: Batch, train: Train) -> None:
        is_nan = train.decide(lambda step, images: self.nan_samples.get(step)) in batch.ids
        super().step(batch, _NanLoss(train) if is_nan else train)  # type: ignore[arg-type]


class _NanLoss:
    """Wraps `Train` so that every loss is NaN."""

    def __init__(self, train: Train) -> None:
        self._train = train

    def __getattr__(self, name: str) -> Any:
        return getattr(self._train, name)

    def apply(self, role: str, loss: Tensor) -> None:
        self._train.apply(role, loss * torch.nan)


def build(config: Config, info: BuildInfo) -> System:
    attngan.build(config, info)  # for its checks
    return NanAttnGan(config, info)
