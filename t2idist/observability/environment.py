"""What a run ran on: versions of what computes, the commit, the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import t2idist
from t2idist.engine.world import World

GIT = "T2IDIST_GIT"
"""The variable of the environment that holds the commit of a working directory without .git."""


def environment_info(world: World) -> dict[str, Any]:
    """What the run ran on."""
    found: dict[str, Any] = {
        "t2idist": t2idist.__version__,
        "git": _git(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ray": importlib.metadata.version("ray"),
        "deepspeed": _version_if_there("deepspeed"),
        "workers": world.size,
        "device": str(world.device),
        "cpu": _cpu(),
        "cpu_cores": os.cpu_count(),
        "threads_per_worker": torch.get_num_threads(),
    }
    if world.device.type != "cpu":
        found["accelerator"] = torch.get_device_module(world.device).get_device_name(world.device)
    return found


def _version_if_there(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git() -> str:
    """The commit of the checkout, "+" where files differ from it.

    Without a checkout (an installed package, or a job's working directory, which Ray uploads without .git) what the
    environment says in `GIT`, else "unknown".
    """
    root = Path(t2idist.__file__).parent.parent
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get(GIT, "unknown")[:64]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
