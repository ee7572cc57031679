"""An export made into networks that draw or match."""

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
from t2idist.nn.init import shapes_only
from t2idist.systems import load as load_system


@dataclass(frozen=True)
class Loaded:
    """An export, ready to use: nets by export name, in eval mode and without gradient, on the chosen device."""

    url: str
    name: str
    system: System
    nets: dict[str, nn.Module]
    vocabulary: Vocabulary
    plan: BuildInfo
    images: int
    meta: Mapping[str, Any]


def load(url: str, device: torch.device, own_system: str = "") -> Loaded:
    """Read the export at `url`, build its system and put the weights in.

    own_system: the module of somebody's own that the export may name; no other is imported, for its code would run.
    Raises ValueError, one sentence, where the export is missing, torn, or does not fit the system that it names.
    """
    where = storage.redact(url)
    index = export.read_index(url)
    if "." in index["system"] and index["system"] != own_system:
        raise ValueError(
            f"{where}: is of system '{index['system']}', a module whose code would run; if you trust it, give --system "
            f"{index['system']}"
        )
    module = load_system(index["system"])
    config = from_dict(module.Config, index["config"], f"{where}: config")
    try:
        plan = BuildInfo.of(index["plan"], index["vocabulary"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where}: plan: {error!r}") from None
    with shapes_only():  # so that nothing is drawn for networks that the export does not hold
        system = module.build(config, plan)
    named = {dotted.rpartition(".")[2]: dotted for dotted in system.exports}
    found, nets = export.read(url, tuple(named)), {}
    for name, dotted in named.items():
        net = network(system, dotted).to_empty(device=device)
        export.load_into(net, found.weights[name], f"{where}: network '{name}'")
        nets[name] = net.eval().requires_grad_(False)
    return Loaded(url, found.system, system, nets, Vocabulary(found.vocabulary), plan, found.images, found.meta)


def open_device(name: str) -> torch.device:
    """The device of a command's --device. Raises ValueError where this machine has none of it."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name}: not available on this machine") from None
    return device


def network(system: System, dotted: str) -> nn.Module:
    """The network of a name in `exports`: a role, a frozen network, or a part of one ("damsm.text")."""
    head, _, part = dotted.partition(".")
    net = system.roles[head].net if head in system.roles else system.frozen[head].net
    return net.get_submodule(part)
