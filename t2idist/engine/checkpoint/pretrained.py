"""Pretrained weights: files, which are checked against their hash before they are opened, and exports to fine-tune."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from t2idist import storage
from t2idist.contract import Pretrained, System
from t2idist.engine.checkpoint import export

_DEEPEST = 3
"""Levels of keys above the tensors."""


def check(pretrained: Pretrained, where: str) -> None:
    """Check that the file exists and that its hash is given. Raises ValueError that names the key under `where`."""
    if not pretrained.url:
        raise ValueError(f"{where}.{pretrained.key}: missing; give the path or URL of the weights, and their sha256")
    path = storage.local_path(pretrained.url)
    if path is not None and not path.is_absolute():
        raise ValueError(
            f"{where}.{pretrained.key}: {pretrained.url}: workers may run elsewhere; give an absolute path or a URL"
        )
    if len(pretrained.sha256) != 64:
        raise ValueError(f"{where}: {pretrained.key} has no sha256 of 64 digits; an unchecked file is not opened")
    if not storage.exists(pretrained.url):
        raise ValueError(f"{where}.{pretrained.key}: {storage.redact(pretrained.url)}: no such file")


def check_content(pretrained: Pretrained, where: str) -> None:
    """Check the file as `check` does, and that it has its hash and contains named tensors. Raises ValueError."""
    _read(pretrained, where)


def load(pretrained: Pretrained, where: str) -> None:
    """Load the weights. Raises ValueError that names the key and the file."""
    tensors = _read(pretrained, where)
    try:
        pretrained.load(tensors)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{where}.{pretrained.key}: {storage.redact(pretrained.url)}: {error}") from None


def _read(pretrained: Pretrained, where: str) -> dict[str, Tensor]:
    check(pretrained, where)
    file = storage.redact(pretrained.url)
    try:
        data = storage.read_bytes(pretrained.url)
    except IsADirectoryError:
        raise ValueError(f"{where}.{pretrained.key}: {file}: a folder; give the file of the weights") from None
    if (digest := storage.sha256(data)) != pretrained.sha256.lower():
        stranger = storage.describe_stranger(data)
        raise ValueError(
            f"{where}.{pretrained.key}: {file} "
            + (f"is {stranger}" if stranger else f"has sha256 {digest}; {pretrained.sha256} was expected")
        )
    try:
        return _tensors(data)
    except (ValueError, pickle.UnpicklingError, safetensors.SafetensorError, RuntimeError) as error:
        raise ValueError(f"{where}.{pretrained.key}: {file}: {error}") from None


def _tensors(data: bytes) -> dict[str, Tensor]:
    """Parse a safetensors file, or a PyTorch file of plain tensors (weights_only)."""
    if stranger := storage.describe_stranger(data):
        raise ValueError(stranger)
    is_safetensors = data[8:9] == b"{"  # after the length of its header, which may begin as PyTorch's files do
    if is_safetensors or (data[:2] != b"PK" and data[:1] != b"\x80"):  # PyTorch's, from 1.6 on and before
        return safetensors.torch.load(data)
    content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    tensors = innermost_tensors(content)
    if not is_named_tensors(tensors):
        raise ValueError("contains other values than named tensors")
    return dict(tensors)


def is_named_tensors(value: Any) -> bool:
    """Return whether this is a state_dict."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )


def innermost_tensors(content: Any) -> Any:
    """Enter a checkpoint that keeps its named tensors below a key (``state_dict``, ``netG``), next to other values.

    Returns:
        The named tensors; `content` itself if there are none.

    Raises:
        ValueError: There are several sets of named tensors.
    """
    found: dict[str, Any] = {}

    def search(value: Any, path: str, depth: int) -> None:
        if is_named_tensors(value):
            found[path] = value
        elif isinstance(value, Mapping) and "param_groups" not in value and depth < _DEEPEST:  # of an optimizer
            for key, inner in value.items():
                search(inner, f"{path}.{key}" if path else str(key), depth + 1)

    search(content, "", 0)
    if len(found) > 1:
        raise ValueError(f"contains several sets of named tensors: {', '.join(found)}; save each in a file of its own")
    return next(iter(found.values()), content)


def check_init(system: System, url: str, vocabulary: Sequence[str], where: str) -> None:
    """Check that the system can start from the export at `url`. Raises ValueError that names `where`.

    Args:
        system: may be on the meta device.
        vocabulary: that of the stage.
    """
    _matching_networks(system, url, vocabulary, where)


def load_init(system: System, url: str, vocabulary: Sequence[str], where: str) -> None:
    """Load an export's weights into the roles that it contains. Raises ValueError as `check_init` does."""
    for net, weights in _matching_networks(system, url, vocabulary, where):
        net.load_state_dict(weights)


def _matching_networks(
    system: System, url: str, vocabulary: Sequence[str], where: str
) -> list[tuple[nn.Module, dict[str, Tensor]]]:
    """Return the networks that are trained and that the export contains, with their weights from the export."""
    location = f"{where}: {storage.redact(url)}"
    dotted = {name.rpartition(".")[2]: name for name in system.exports if name.partition(".")[0] in system.roles}
    index = export.read_index(url)
    shared = tuple(name for name in dotted if name in index["networks"])
    if not shared:
        raise ValueError(
            f"{location}: contains {', '.join(index['networks'])} of system {index['system']}; the stage trains "
            f"{', '.join(dotted)}"
        )
    source, matches = export.read(url, shared), []
    for name in shared:
        role, _, part = dotted[name].partition(".")
        net = system.roles[role].net.get_submodule(part)
        export.check_fits(net, source.weights[name], f"{location}: network '{name}'")
        embeds = any(isinstance(m, nn.Embedding) and m.num_embeddings == len(vocabulary) for m in net.modules())
        if embeds and list(vocabulary) != source.vocabulary:
            raise ValueError(
                f"{location}: network '{name}' was trained with a vocabulary of {len(source.vocabulary)} words, which "
                f"differs from the stage's vocabulary of {len(vocabulary)}"
            )
        matches.append((net, source.weights[name]))
    return matches
