"""Weights from outside: read, checked against their hash, and only then opened."""

from __future__ import annotations

import io
import pickle

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from t2idist import storage
from t2idist.contract import Pretrained


def check(pretrained: Pretrained, where: str) -> None:
    """Whether the file is named with its hash and is there. Raises ValueError that names the key under `where`."""
    if not pretrained.url:
        raise ValueError(f"{where}.{pretrained.key}: missing; give the path or URL of the weights, and their sha256")
    path = storage.local_path(pretrained.url)
    if path is not None and not path.is_absolute():
        raise ValueError(
            f"{where}.{pretrained.key}: {pretrained.url}: workers may run elsewhere; give an absolute path or a URL"
        )
    if len(pretrained.sha256) != 64:
        raise ValueError(
            f"{where}: {pretrained.key} has no sha256 of 64 digits beside it; an unchecked file is not opened"
        )
    if not storage.exists(pretrained.url):
        raise ValueError(f"{where}.{pretrained.key}: {storage.redact(pretrained.url)}: no such file")


def load(pretrained: Pretrained, where: str) -> None:
    """Load the weights. Raises ValueError that names the key and the file."""
    check(pretrained, where)
    file = storage.redact(pretrained.url)
    data = storage.read_bytes(pretrained.url)
    if (found := storage.sha256(data)) != pretrained.sha256.lower():
        raise ValueError(f"{where}.{pretrained.key}: {file} has sha256 {found}; {pretrained.sha256} was expected")
    try:
        pretrained.load(_tensors(data))
    except (ValueError, pickle.UnpicklingError, safetensors.SafetensorError, RuntimeError) as error:
        raise ValueError(f"{where}.{pretrained.key}: {file}: {error}") from None


def _tensors(data: bytes) -> dict[str, Tensor]:
    """A safetensors file, or a torch file (plain tensors only: torch's restricted reader)."""
    if data[:2] != b"PK":
        return safetensors.torch.load(data)
    found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError("holds something else than named tensors")
    return found
