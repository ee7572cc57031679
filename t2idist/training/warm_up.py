"""Load what the first step of a worker needs, before the step is due."""

from __future__ import annotations

import importlib

import torch
from torch import nn

MODULES = ("torch.utils.tensorboard", "torch._dynamo", "botocore.session", "s3fs", "t2idist.training.worker")


def warm_up() -> None:
    """Import what torch, PIL and storage import on first use, and start torch's kernels on the CPU."""
    from PIL import Image

    for module in MODULES:
        importlib.import_module(module)
    Image.init()
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 1, 3))
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    net(torch.zeros(1, 3, 8, 8)).sum().backward()
    optimizer.step()
