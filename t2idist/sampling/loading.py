"""Load an export: build its system and read the weights of its networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from t2idist import storage
from t2idist.config.strict import from_dict
from t2idist.contract import BuildInfo, System
from t2idist.data.tokenizer import Vocabulary
from t2idist.engine.checkpoint import export
from t2idist.engine.kernels import allow_tf32
from t2idist.nn.init import shapes_only
from t2idist.systems import is_custom
from t2idist.systems import load as load_system


@dataclass(frozen=True)
class LoadedExport:
    """An export whose networks are ready for inference."""

    url: str
    name: str
    """Name of the system."""
    system: System
    nets: dict[str, nn.Module]
    """By export name; in eval mode, without gradients, on the requested device."""
    vocabulary: Vocabulary
    build_info: BuildInfo
    images: int
    """Images seen in training."""
    meta: Mapping[str, Any]
    """The remaining keys of the export's index."""


def load_export(url: str, device: torch.device, custom_system: str = "", *, option: str = "--system") -> LoadedExport:
    """Read an export, build its system and load the weights.

    Args:
        url: folder of the export.
        device: where the networks are put.
        custom_system: module of a custom system that the export may name. No other module is imported, because
            importing runs its code.
        option: how the caller names that module, for messages.

    Raises:
        ValueError: the export is missing or damaged, or does not fit the system that it names.
    """
    where = storage.redact(url)
    index = export.read_index(url)
    if is_custom(index["system"]) and index["system"] != custom_system:
        raise ValueError(
            f"{where}: is of the custom system '{index['system']}', a module whose code would run; if you trust it, "
            f"give {option} {index['system']}"
        )
    module = load_system(index["system"])
    config = from_dict(module.Config, index["config"], f"{where}: config")
    try:
        build_info = BuildInfo.from_description(index["plan"], index["vocabulary"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where}: plan: {error!r}") from None
    with shapes_only():  # no initial weights are drawn for networks that the export does not hold
        system = module.build(config, build_info)
    dotted_names = {dotted.rpartition(".")[2]: dotted for dotted in system.exports}
    content, nets = export.read(url, tuple(dotted_names)), {}
    for name, dotted in dotted_names.items():
        net = exported_network(system, dotted).to_empty(device=device)
        export.load_into(net, content.weights[name], f"{where}: network '{name}'")
        nets[name] = net.eval().requires_grad_(False)
    try:
        vocabulary = Vocabulary.from_index(index)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return LoadedExport(url, content.system, system, nets, vocabulary, build_info, content.images, content.meta)


def open_device(name: str, option: str = "--device") -> torch.device:
    """Return the device of this name, given as `option`. Raises ValueError if this machine does not have it."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has no values
    except (RuntimeError, AssertionError, TypeError):
        raise ValueError(f"{option} {name}: not available on this machine") from None
    allow_tf32(False)
    return device


def exported_network(system: System, dotted: str) -> nn.Module:
    """Return the network that a name in `exports` means: a role, a frozen network, or a part of one ("damsm.text")."""
    head, _, part = dotted.partition(".")
    net = system.roles[head].net if head in system.roles else system.frozen[head].net
    return net.get_submodule(part)
