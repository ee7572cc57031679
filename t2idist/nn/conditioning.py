"""Conditioning augmentation: a text vector parametrises a Gaussian from which the condition is sampled."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from t2idist.nn.blocks import GLU
from t2idist.nn.precision import upcast


class ConditioningAugmentation(nn.Module):
    """Conditioning augmentation with GLU (StackGAN, section 3.2; GLU as in StackGAN-v2 and AttnGAN).

    (N, text_dim) and standard normal (N, condition_dim) -> condition, mean and log-variance, each (N, condition_dim).
    """

    def __init__(self, text_dim: int, condition_dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(text_dim, 4 * condition_dim)
        self.glu = GLU()

    def forward(self, text: Tensor, normal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _sample_gaussian(self.glu(self.fc(text)), normal)


class LinearConditioning(nn.Module):
    """Conditioning augmentation of StackGAN (section 3.2): one linear map gives mean and log-variance.

    (N, text_dim) and standard normal (N, condition_dim) -> condition, mean and log-variance, each (N, condition_dim).
    compat "authors": a ReLU on both, as in the released code; the standard deviation is then at least 1.
    """

    def __init__(self, text_dim: int, condition_dim: int, compat: str = "") -> None:
        super().__init__()
        self.fc = nn.Linear(text_dim, 2 * condition_dim)
        self.activation = nn.ReLU() if compat == "authors" else nn.Identity()

    def forward(self, text: Tensor, normal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _sample_gaussian(self.activation(self.fc(text)), normal)


def _sample_gaussian(statistics: Tensor, normal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Concatenated mean and log-variance (N, 2 * D) -> sample, mean and log-variance, each (N, D)."""
    mean, log_variance = upcast(statistics).chunk(2, dim=1)
    return mean + torch.exp(0.5 * log_variance) * normal, mean, log_variance
