"""Exports: the result of a stage, for the next one and for users. Weights are safetensors, the rest is ``export.json``.

``export.json`` is written last, so an export is complete if it has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from t2idist import storage

INDEX = "export.json"
FORMAT = 1


@dataclass(frozen=True)
class Export:
    """An export that was read."""

    url: str
    system: str
    config: dict[str, Any]
    """The config of the system (``systems/<system>.py``'s `Config`)."""
    plan: dict[str, Any]
    """The `BuildInfo` from which the system was built (`BuildInfo.describe`)."""
    vocabulary: list[str]
    images: int
    """Images seen in training."""
    weights: dict[str, dict[str, Tensor]]
    """By network, then by parameter name."""
    meta: dict[str, Any]
    """The other values of ``export.json``."""


def exists(url: str) -> bool:
    return storage.exists(storage.join(url, INDEX))


def write(url: str, nets: Mapping[str, nn.Module], index: dict[str, Any]) -> None:
    """Write networks, one file each, and the index.

    Args:
        index: at least ``system``, ``config``, ``plan``, ``vocabulary`` and ``images``.
    """
    networks = {}
    for name, net in nets.items():
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in net.state_dict().items()}
        data = safetensors.torch.save(tensors)
        file = f"{name}.safetensors"
        storage.write_bytes(storage.join(url, file), data)
        networks[name] = {"file": file, "bytes": len(data), "sha256": storage.sha256(data)}
    storage.write_json(storage.join(url, INDEX), {"format": FORMAT, **index, "networks": networks})


def copy(source: str, target: str, facts: Mapping[str, Any]) -> None:
    """Copy an export and add `facts` to its index. Raises ValueError if a file is missing or damaged."""
    read(source)
    index = read_index(source)
    for entry in index["networks"].values():
        data = storage.read_bytes(storage.join(source, entry["file"]))
        storage.write_bytes(storage.join(target, entry["file"]), data)
    storage.write_json(storage.join(target, INDEX), {**index, **facts})


def read_index(url: str) -> dict[str, Any]:
    """Read the index of an export. Raises ValueError if it is missing or invalid."""
    index_url = storage.join(url, INDEX)
    try:
        index = storage.read_json(index_url)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{storage.redact(url)}: no export here ({INDEX} is missing)") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{storage.redact(index_url)}: not an export index of format {FORMAT}")
    missing = {"system", "config", "plan", "vocabulary", "images", "networks"} - index.keys()
    if missing:
        raise ValueError(f"{storage.redact(index_url)}: lacks '{sorted(missing)[0]}'")
    return index


def read(url: str, networks: tuple[str, ...] | None = None) -> Export:
    """Read an export and check its hashes. Raises ValueError that names the file.

    Args:
        networks: names of the networks to read; None for all.
    """
    index = read_index(url)
    names = networks if networks is not None else tuple(index["networks"])
    for name in names:
        if name not in index["networks"]:
            raise ValueError(f"{storage.redact(url)}: has no network '{name}'; it has {', '.join(index['networks'])}")
    with ThreadPoolExecutor(max(1, len(names)), "network") as pool:
        weights = dict(
            zip(names, pool.map(lambda name: _read_network(url, index["networks"][name]), names), strict=True)
        )
    known = {"system", "config", "plan", "vocabulary", "images", "networks", "format"}
    meta = {key: value for key, value in index.items() if key not in known}
    return Export(
        url, index["system"], index["config"], index["plan"], index["vocabulary"], index["images"], weights, meta
    )


def _read_network(url: str, entry: dict[str, Any]) -> dict[str, Tensor]:
    file_url = storage.join(url, entry["file"])
    if not entry["file"].endswith(".safetensors"):
        raise ValueError(f"{storage.redact(file_url)}: weights are read from .safetensors only; a pickle can run code")
    try:
        data = storage.read_bytes(file_url)
    except FileNotFoundError:
        raise ValueError(f"{storage.redact(file_url)}: missing from the export") from None
    if len(data) != entry["bytes"] or storage.sha256(data) != entry["sha256"]:
        raise ValueError(f"{storage.redact(file_url)}: damaged: its size or sha256 differs from {INDEX}")
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{storage.redact(file_url)}: not a safetensors file: {error}") from None


def check_fits(net: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError that names the first key or shape that differs between the weights and the network."""
    state = net.state_dict()
    for key in sorted(state.keys() ^ weights.keys()):
        difference = "lacks" if key in state else "has an unknown"
        raise ValueError(f"{where}: {difference} '{key}'")
    for key, value in state.items():
        if value.shape != weights[key].shape:
            shape = list(weights[key].shape)
            raise ValueError(f"{where}: '{key}' has shape {shape}; the network has {list(value.shape)}")


def load_into(net: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Load weights into a network, strictly. Raises ValueError as `check_fits` does."""
    check_fits(net, weights, where)
    net.load_state_dict(weights)
