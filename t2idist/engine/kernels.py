"""How exact kernels are, and what a device computes fast.

The settings of CUDA's kernels hold for the whole process; they have no effect on CPUs.
"""

from __future__ import annotations

import os

import torch


def allow_tf32(allowed: bool) -> None:
    """Let float32 products and convolutions on CUDA round their inputs to 10 bits (TF32), or not.

    By default torch allows it for convolutions.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def use_deterministic_kernels(deterministic: bool) -> None:
    """Choose CUDA's kernels: the fastest, or those that add in a fixed order, as far as torch has them."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions for products in bfloat16; without them they are slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return any(bool(value) for name, value in torch.cpu.get_capabilities().items() if "bf16" in name)
    return True
