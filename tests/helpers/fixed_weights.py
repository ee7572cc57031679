"""Weights that depend on nothing but a parameter's name and shape, so that a network can be made again anywhere."""

from __future__ import annotations

import hashlib
import zlib

import torch
from torch import Tensor, nn


def weight(name: str, like: Tensor) -> Tensor:
    if like.dim() == 0:
        return torch.ones_like(like)
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if name.endswith("running_mean"):
        return 0.1 * drawn
    if name.endswith("running_var"):
        return 1 + 0.1 * drawn.abs()
    if like.dim() >= 2:
        return drawn / like[0].numel() ** 0.5
    return 1 + 0.1 * drawn if name.endswith("weight") else 0.1 * drawn


def fill(net: nn.Module) -> nn.Module:
    net.load_state_dict({name: weight(name, value) for name, value in net.state_dict().items()})
    return net.eval()


def fingerprint(net: nn.Module) -> str:
    """Hash of the names and shapes of all that a network's state holds."""
    lines = [f"{name} {list(value.shape)}" for name, value in sorted(net.state_dict().items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())
