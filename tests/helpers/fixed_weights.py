"""Weights that depend only on the name and the shape of a parameter, for networks that are equal everywhere."""

from __future__ import annotations

import hashlib
import zlib

import torch
from torch import Tensor, nn


def weight(name: str, like: Tensor) -> Tensor:
    """Return the weights of a parameter or buffer."""
    if like.dim() == 0:
        return torch.ones_like(like)
    values = torch.randn(like.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if name.endswith("running_mean"):
        return 0.1 * values
    if name.endswith("running_var"):
        return 1 + 0.1 * values.abs()
    if like.dim() >= 2:
        return values / like[0].numel() ** 0.5
    return 1 + 0.1 * values if name.endswith("weight") else 0.1 * values


def fill(net: nn.Module) -> nn.Module:
    """Set all weights of a network, and put it in evaluation mode."""
    net.load_state_dict({name: weight(name, value) for name, value in net.state_dict().items()})
    return net.eval()


def fingerprint(net: nn.Module) -> str:
    """Hash the names and shapes in the state dict of a network."""
    lines = [f"{name} {list(value.shape)}" for name, value in sorted(net.state_dict().items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())
