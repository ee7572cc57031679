"""Conditioning augmentation: a text vector becomes a Gaussian from which the condition is drawn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from t2idist.nn.blocks import GLU
from t2idist.nn.precision import full


class ConditioningAugmentation(nn.Module):
    """Conditioning augmentation with GLU (StackGAN, section 3.2; GLU as in StackGAN-v2 and AttnGAN).

    (N, text_dim) and standard normal (N, condition_dim) -> condition, mean and log-variance, each (N, condition_dim).
    """

    def __init__(self, text_dim: int, condition_dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(text_dim, 4 * condition_dim)
        self.glu = GLU()

    def forward(self, text: Tensor, normal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = full(self.glu(self.fc(text))).chunk(2, dim=1)
        return mean + torch.exp(0.5 * log_variance) * normal, mean, log_variance
