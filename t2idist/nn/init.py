"""Weight initialisation as in the papers, and networks without values for shape checks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_RANDOM_INITS = ("normal_", "uniform_", "orthogonal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_")


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Enter a context in which networks are built on the meta device: tensors with shape and dtype, without values."""
    with torch.device("meta"), _SkipRandomInit():
        yield


class _SkipRandomInit(TorchFunctionMode):
    """Skip random initialisation on the meta device, where it only imports torch's compiler, for seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _RANDOM_INITS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def orthogonal_(net: nn.Module) -> None:
    """StackGAN-v2, AttnGAN and MirrorGAN: orthogonal convolutions and linear maps, BatchNorm N(1, 0.02), biases 0."""
    _initialise(net, nn.init.orthogonal_)


def normal_(net: nn.Module) -> None:
    """DCGAN and most others: convolutions and linear maps N(0, 0.02), norms with weights N(1, 0.02), biases 0."""
    _initialise(net, functools.partial(nn.init.normal_, mean=0.0, std=0.02))


def _initialise(net: nn.Module, draw: Callable[[Tensor], Tensor]) -> None:
    """Initialise convolutions and linear maps by `draw`, norms with weights as N(1, 0.02), biases as 0."""
    for module in net.modules():
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            draw(module.weight)
        elif isinstance(module, (*BATCH_NORMS, nn.InstanceNorm2d)) and module.weight is not None:
            nn.init.normal_(module.weight, 1.0, 0.02)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
