"""The environment that a run trained in: package versions, the commit, the hardware."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import t2idist
from t2idist.observability.process import COMMIT_VARIABLE


def environment_info(workers: int, device: torch.device) -> dict[str, Any]:
    """Collect versions, commit and hardware of this process, one of `workers` workers."""
    info: dict[str, Any] = {
        "t2idist": t2idist.__version__,
        "git": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ray": importlib.metadata.version("ray"),
        "deepspeed": _version("deepspeed"),
        "workers": workers,
        "device": str(device),
        "cpu": _cpu(),
        "cpu_cores": os.cpu_count(),
        "threads_per_worker": torch.get_num_threads(),
    }
    if device.type != "cpu":
        info["accelerator"] = torch.get_device_module(device).get_device_name(device)
    return info


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Return the commit of the checkout, with "+" if files differ from it.

    Without a checkout (an installed package, or a Ray job, whose working directory is uploaded without .git), the value
    of `COMMIT_VARIABLE`, else "unknown".
    """
    return _described(Path(t2idist.__file__).parent.parent) or os.environ.get(COMMIT_VARIABLE, "unknown")[:64]


@functools.cache
def _described(root: Path) -> str:
    """Return git's description of a checkout; "" if it is none."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
