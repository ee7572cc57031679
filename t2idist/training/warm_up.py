"""Load what the first step of a worker needs, before the step is due."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence

import torch
from torch import nn

from t2idist import storage
from t2idist.systems import load as load_system

MODULES = ("torch.utils.tensorboard", "torch._dynamo", "botocore.session", "s3fs", "t2idist.training.worker")


def warm_up(run_url: str, systems: Sequence[str]) -> None:
    """Import what torch, PIL, storage and a run import on first use, and start torch's kernels on the CPU.

    Args:
        run_url: The run folder.
        systems: Systems of the stages, as in the configuration. What is wrong with them, the run reports.
    """
    from PIL import Image

    for module in MODULES:
        importlib.import_module(module)
    with contextlib.suppress(Exception):
        storage.start_clients(run_url)
    for name in systems:
        with contextlib.suppress(Exception):
            load_system(name)
    Image.init()
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 1, 3))
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    net(torch.zeros(1, 3, 8, 8)).sum().backward()
    optimizer.step()
