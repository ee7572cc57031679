"""Exports: what a stage leaves for the next one and for users. Weights in safetensors, all else in ``export.json``.

``export.json`` is written last, so an export is there whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    """A stage's result. config, plan: what the system was built from; weights: by network, then by parameter name."""

    url: str
    system: str
    config: dict[str, Any]
    plan: dict[str, Any]
    vocabulary: list[str]
    images: int
    weights: dict[str, dict[str, Tensor]]
    meta: dict[str, Any]


def exists(url: str) -> bool:
    return storage.exists(storage.join(url, INDEX))


def write(url: str, nets: Mapping[str, nn.Module], index: dict[str, Any]) -> None:
    """Write networks, a file each, and the index.

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


def read_index(url: str) -> dict[str, Any]:
    """The index of an export. Raises ValueError with one sentence where there is none or it is not one."""
    where = storage.join(url, INDEX)
    try:
        index = storage.read_json(where)
    except FileNotFoundError:
        raise ValueError(f"{storage.redact(url)}: no export here ({INDEX} is missing)") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{storage.redact(where)}: not an export index of format {FORMAT}")
    missing = {"system", "config", "plan", "vocabulary", "images", "networks"} - index.keys()
    if missing:
        raise ValueError(f"{storage.redact(where)}: lacks '{sorted(missing)[0]}'")
    return index


def read(url: str, networks: tuple[str, ...] | None = None) -> Export:
    """An export with its weights, hashes checked (`networks`: only these). Raises ValueError that names the file."""
    index = read_index(url)
    weights = {}
    for name in networks if networks is not None else index["networks"]:
        if name not in index["networks"]:
            raise ValueError(f"{storage.redact(url)}: has no network '{name}'; it has {', '.join(index['networks'])}")
        weights[name] = _read_network(url, index["networks"][name])
    known = {"system", "config", "plan", "vocabulary", "images", "networks", "format"}
    meta = {key: value for key, value in index.items() if key not in known}
    return Export(
        url, index["system"], index["config"], index["plan"], index["vocabulary"], index["images"], weights, meta
    )


def _read_network(url: str, entry: dict[str, Any]) -> dict[str, Tensor]:
    where = storage.join(url, entry["file"])
    try:
        data = storage.read_bytes(where)
    except FileNotFoundError:
        raise ValueError(f"{storage.redact(where)}: missing from the export") from None
    if len(data) != entry["bytes"] or storage.sha256(data) != entry["sha256"]:
        raise ValueError(f"{storage.redact(where)}: broken: its size or sha256 is not what {INDEX} says")
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{storage.redact(where)}: not a safetensors file: {error}") from None


def check_fits(net: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Raises ValueError that names the first key or shape of the weights that is not the network's."""
    own = net.state_dict()
    for key in sorted(own.keys() ^ weights.keys()):
        side = "lacks" if key in own else "has an unknown"
        raise ValueError(f"{where}: {side} '{key}'")
    for key, value in own.items():
        if value.shape != weights[key].shape:
            raise ValueError(f"{where}: '{key}' is {list(weights[key].shape)} there and {list(value.shape)} here")


def load_into(net: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Strictly load weights into a network. Raises ValueError as `check_fits` does."""
    check_fits(net, weights, where)
    net.load_state_dict(weights)
