"""The networks of a stage: chosen by name, frozen for a while, copied for evaluation."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn


def for_evaluation(source: nn.Module, prefix: str, buffers: Mapping[str, Tensor]) -> nn.Module:
    """Copy a network in eval mode; the buffers whose name starts with `prefix` replace its own."""
    net = copy.deepcopy(source).eval().requires_grad_(False)
    own = {key.removeprefix(prefix): value for key, value in buffers.items() if key.startswith(prefix)}
    net.load_state_dict(own, strict=False)
    return net


def select_networks(
    names: Sequence[str], frozen: Mapping[str, nn.Module], trained: Mapping[str, nn.Module]
) -> list[nn.Module]:
    """Return networks by name: of a frozen network, of a trained role, or of a part of one (``role.part``)."""
    nets = []
    for name in names:
        role, _, part = name.partition(".")
        nets.append(frozen[name] if name in frozen else trained[role].get_submodule(part))
    return nets


@contextlib.contextmanager
def frozen_parameters(nets: Sequence[nn.Module]) -> Iterator[None]:
    """Within the context, compute no gradients for the weights of these networks."""
    weights = [p for net in nets for p in net.parameters() if p.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)
