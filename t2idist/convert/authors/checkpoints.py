"""The authors' files of weights: read without running code, and filled up with what their age lacks."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from t2idist import storage

Weights = dict[str, Tensor]

PARALLEL = "module."
"""What networks that were saved through DataParallel have before every name."""


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors of one file, or of a part of it. file: for messages."""

    file: str
    weights: Weights

    def size(self, key: str, axis: int) -> int:
        """The length of a tensor along an axis. Raises ValueError where there is no such tensor."""
        if key not in self.weights:
            raise ValueError(f"{self.file}: lacks '{key}', which tells its size")
        if self.weights[key].dim() <= axis:
            raise ValueError(f"{self.file}: '{key}' is {list(self.weights[key].shape)}; it tells no size")
        return self.weights[key].shape[axis]

    def count(self, pattern: str) -> int:
        """How many different numbers stand in the pattern's group, over all names that it matches from their start."""
        return len({found.group(1) for key in self.weights if (found := re.match(pattern, key))})

    def under(self, prefix: str) -> Checkpoint:
        """The tensors whose name begins with `prefix`, without it."""
        kept = {key.removeprefix(prefix): value for key, value in self.weights.items() if key.startswith(prefix)}
        return Checkpoint(self.file, kept)

    def outside(self, prefixes: tuple[str, ...]) -> Checkpoint:
        """The tensors whose name begins with none of the prefixes."""
        return Checkpoint(
            self.file, {key: value for key, value in self.weights.items() if not key.startswith(prefixes)}
        )


def read(url: str) -> tuple[Checkpoint, str]:
    """The named tensors of a torch file, without `module.`, and the sha256 of its bytes.

    Only tensors are read (torch's restricted reader), whatever the file asks for. Raises ValueError, one sentence.
    """
    file = storage.redact(url)
    try:
        data = storage.read_bytes(url)
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"{file}: no such file") from None
    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # bytes from anywhere: torch's readers raise what they meet
        raise ValueError(f"{file}: {_why_not(data, error)}") from None
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"{file}: holds a {type(found).__name__}; a state_dict of named tensors is expected")
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{file}: '{key}' is a {type(value).__name__}; a state_dict of named tensors is expected")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"{file}: '{key}' has values that are no numbers")
    weights = {key.removeprefix(PARALLEL): value for key, value in found.items()}
    if len(weights) != len(found):
        raise ValueError(f"{file}: has names that differ in '{PARALLEL}' only")
    return Checkpoint(file, weights), storage.sha256(data)


def _why_not(data: bytes, error: Exception) -> str:
    if asked := re.search(r"[Uu]nsupported (?:global: )?(?:GLOBAL|class) ([\w.]+)", str(error)):
        return (
            f"is a pickle that asks for {asked[1]}, and to open it would run code from it; where you trust it, load it "
            "with the authors' code and save its state_dict() alone"
        )
    if data[:2] != b"PK" and data[:1] != b"\x80":
        return "not a file that torch wrote"
    first = str(error).rpartition("WeightsUnpickler error:")[2].strip().split("\n")[0][:160]
    return f"torch cannot read it ({first or type(error).__name__}): it is cut short, broken, or not a file of tensors"


def fitted(checkpoint: Checkpoint, net: nn.Module) -> Weights:
    """The weights with what files of 2017 and 2018 lack beside `net`, or have too much.

    Then, `num_batches_tracked` was not counted (nothing here depends on it), and instance normalisation was saved with
    or without running statistics (which no system uses).
    """
    own = net.state_dict()
    weights = dict(checkpoint.weights)
    for key in own.keys() - weights.keys():
        kind = key.rpartition(".")[2]
        if kind == "num_batches_tracked":
            weights[key] = torch.zeros((), dtype=torch.int64)
        elif kind in ("running_mean", "running_var") and _normalises_instances(net, key):
            weights[key] = torch.full(own[key].shape, float(kind == "running_var"))
    for key in weights.keys() - own.keys():
        kind = key.rpartition(".")[2]
        if kind in ("running_mean", "running_var", "num_batches_tracked") and _normalises_instances(net, key):
            del weights[key]
    return weights


def _normalises_instances(net: nn.Module, key: str) -> bool:
    try:
        return isinstance(net.get_submodule(key.rpartition(".")[0]), _InstanceNorm)
    except AttributeError:
        return False
