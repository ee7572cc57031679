"""Weights from outside: files, checked against their hash and only then opened, and exports to fine-tune from."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from t2idist import storage
from t2idist.contract import Pretrained, System
from t2idist.engine.checkpoint import export


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


def check_init(system: System, url: str, vocabulary: Sequence[str], where: str) -> None:
    """Whether the export at `url` can be what the system's training starts from. Raises ValueError that names `where`.

    The system may be on the meta device; vocabulary: of the stage.
    """
    _matching_networks(system, url, vocabulary, where)


def load_init(system: System, url: str, vocabulary: Sequence[str], where: str) -> None:
    """Start the roles that an export holds from its weights; the others keep theirs. Raises as `check_init` does."""
    for net, weights in _matching_networks(system, url, vocabulary, where):
        net.load_state_dict(weights)


def _matching_networks(
    system: System, url: str, vocabulary: Sequence[str], where: str
) -> list[tuple[nn.Module, dict[str, Tensor]]]:
    """The networks that are trained here and that the export holds, each with its weights there."""
    place = f"{where}: {storage.redact(url)}"
    dotted = {name.rpartition(".")[2]: name for name in system.exports if name.partition(".")[0] in system.roles}
    held = export.read_index(url)
    shared = tuple(name for name in dotted if name in held["networks"])
    if not shared:
        raise ValueError(
            f"{place}: holds {', '.join(held['networks'])} of system {held['system']}; the stage trains "
            f"{', '.join(dotted)}"
        )
    found, fitting = export.read(url, shared), []
    for name in shared:
        role, _, part = dotted[name].partition(".")
        net = system.roles[role].net.get_submodule(part)
        export.check_fits(net, found.weights[name], f"{place}: network '{name}'")
        numbered = [m for m in net.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == len(vocabulary)]
        if numbered and list(vocabulary) != found.vocabulary:
            raise ValueError(
                f"{place}: network '{name}' numbers words by its vocabulary of {len(found.vocabulary)}, which is not "
                f"this stage's of {len(vocabulary)}"
            )
        fitting.append((net, found.weights[name]))
    return fitting
