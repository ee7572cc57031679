"""The accelerator of a worker: whether torch can use it, and who else does."""

from __future__ import annotations

import torch

_OWN_SHARE = 0.9
"""Share of the memory that a process has at least if no other process uses the device."""


def check(gpus: int) -> None:
    """Raise ValueError if a worker has been given a GPU and torch cannot use it; the sentence says why."""
    if gpus and not torch.accelerator.is_available():
        raise ValueError(f"cluster.gpus_per_worker: {gpus}, but {_reason()}")


def is_usable() -> bool:
    return torch.accelerator.is_available()


def _reason() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this machine's PyTorch {torch.__version__} is built for CPUs; install the build for its GPU"
    return (
        f"PyTorch {torch.__version__} finds no GPU that it can use; it needs a driver for CUDA {torch.version.cuda} "
        "(nvidia-smi shows the driver)"
    )


def is_shared(device: torch.device) -> bool:
    """Return whether another process holds a good part of the device's memory."""
    if device.type != "cuda":
        return False
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) < _OWN_SHARE * total


def describe(device: torch.device) -> str:
    """Return the name of a device and, if it is known, its memory."""
    if device.type != "cuda":
        return str(device)
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)"
