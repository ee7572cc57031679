"""Spectral normalisation of weights (Miyato et al. 2018)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from t2idist.nn.precision import no_autocast

ITERATIONS = 10


class SpectralNorm(nn.Module):
    """Divide a weight (O, ...), as a matrix (O, I), by its largest singular value.

    The value comes from `ITERATIONS` power iterations that start from a fixed vector: it depends on the weight alone,
    not on how often a network has run, and so not on the number of workers. It is computed at every use of the weight.
    """

    def forward(self, weight: Tensor) -> Tensor:
        with no_autocast(weight):
            matrix = weight.flatten(1)
            with torch.no_grad():
                left = torch.arange(1, len(matrix) + 1, device=weight.device, dtype=weight.dtype).cos()
                for _ in range(ITERATIONS):
                    right = F.normalize(matrix.T @ left, dim=0)
                    left = F.normalize(matrix @ right, dim=0)
            return weight / (left @ (matrix @ right))


def add_spectral_norm(net: nn.Module) -> None:
    """Normalise the weights of all convolutions and linear layers, in place. Initialise them before."""
    for module in list(net.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            parametrize.register_parametrization(module, "weight", SpectralNorm())
