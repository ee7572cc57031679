"""Read the authors' files of weights without running code, and adapt files of old PyTorch versions."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from t2idist import storage
from t2idist.engine.checkpoint.pretrained import innermost_tensors
from t2idist.nn.fast.torch_internals import InstanceNormBase

Weights = dict[str, Tensor]

DATA_PARALLEL_PREFIX = "module."
"""Prefix of all names in networks that were saved within DataParallel."""


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors of one file, or of a part of it."""

    file: str
    """Name of the file, for messages."""
    weights: Weights

    def size(self, key: str, axis: int) -> int:
        """Return the length of a tensor along an axis. Raises ValueError if there is no such tensor."""
        if key not in self.weights:
            raise ValueError(f"{self.file}: lacks '{key}', which determines a size")
        if self.weights[key].dim() <= axis:
            raise ValueError(f"{self.file}: '{key}' is {list(self.weights[key].shape)}; it has no axis {axis}")
        return self.weights[key].shape[axis]

    def count(self, pattern: str) -> int:
        """Count the distinct values of the first group of `pattern` among the names that it matches."""
        return len({match.group(1) for key in self.weights if (match := re.match(pattern, key))})

    def with_prefix(self, prefix: str) -> Checkpoint:
        """Return the tensors whose names start with `prefix`, and remove it."""
        weights = {key.removeprefix(prefix): value for key, value in self.weights.items() if key.startswith(prefix)}
        return Checkpoint(self.file, weights)

    def without_prefixes(self, prefixes: tuple[str, ...]) -> Checkpoint:
        """Return the tensors whose names start with none of the prefixes."""
        return Checkpoint(
            self.file, {key: value for key, value in self.weights.items() if not key.startswith(prefixes)}
        )


def read(url: str) -> tuple[Checkpoint, str]:
    """Read a PyTorch file of named tensors with the restricted unpickler.

    Returns:
        The tensors, with the prefix `module.` removed from their names, and the SHA-256 of the file.

    Raises:
        ValueError: the file is missing, unreadable, or holds anything but named tensors with finite values.
    """
    file = storage.redact(url)
    try:
        data = storage.read_bytes(url)
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"{file}: no such file") from None
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises any exception on invalid bytes
        raise ValueError(f"{file}: {_read_error(data, error)}") from None
    try:
        content = innermost_tensors(content)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{file}: contains a {type(content).__name__}; expected a state_dict of named tensors")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{file}: '{key}' is a {type(value).__name__}; expected a state_dict of named tensors")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"{file}: '{key}' has values that are not finite")
    weights = {key.removeprefix(DATA_PARALLEL_PREFIX): value for key, value in content.items()}
    if len(weights) != len(content):
        raise ValueError(f"{file}: has names that differ only by the prefix '{DATA_PARALLEL_PREFIX}'")
    return Checkpoint(file, weights), storage.sha256(data)


def _read_error(data: bytes, error: Exception) -> str:
    if match := re.search(r"[Uu]nsupported (?:global: )?(?:GLOBAL|class) ([\w.]+)", str(error)):
        return (
            f"is a pickle that needs {match[1]}, and opening it would run code; if you trust it, load it with the "
            "authors' code and save only its state_dict()"
        )
    if stranger := storage.describe_stranger(data):
        return f"not a PyTorch file but {stranger}" if data else "not a PyTorch file: it is empty"
    if data[:2] != b"PK" and data[:1] != b"\x80":
        return "not a PyTorch file"
    first = str(error).rpartition("WeightsUnpickler error:")[2].strip().split("\n")[0][:160]
    return f"unreadable for torch ({first or type(error).__name__}): truncated, damaged, or not a file of tensors"


def adapt_weights(checkpoint: Checkpoint, net: nn.Module) -> Weights:
    """Add or remove entries so that the weights of a file from 2017 or 2018 match `net`.

    PyTorch had no `num_batches_tracked` then (nothing here depends on it), and saved instance normalization with or
    without running statistics (which no system uses).
    """
    own = net.state_dict()
    weights = dict(checkpoint.weights)
    for key in own.keys() - weights.keys():
        kind = key.rpartition(".")[2]
        if kind == "num_batches_tracked":
            weights[key] = torch.zeros((), dtype=torch.int64)
        elif kind in ("running_mean", "running_var") and _is_instance_norm(net, key):
            weights[key] = torch.full(own[key].shape, float(kind == "running_var"))
    for key in weights.keys() - own.keys():
        kind = key.rpartition(".")[2]
        if kind in ("running_mean", "running_var", "num_batches_tracked") and _is_instance_norm(net, key):
            del weights[key]
    return weights


def _is_instance_norm(net: nn.Module, key: str) -> bool:
    try:
        return isinstance(net.get_submodule(key.rpartition(".")[0]), InstanceNormBase)
    except AttributeError:
        return False
