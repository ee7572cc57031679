"""Initial weights as the papers draw them. All work on the meta device too, where they draw nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def orthogonal_(net: nn.Module) -> None:
    """StackGAN-v2, AttnGAN and MirrorGAN: orthogonal convolutions and linear maps, BatchNorm N(1, 0.02), biases 0."""
    _initialise(net, nn.init.orthogonal_)


def normal_(net: nn.Module) -> None:
    """DCGAN, GAN-CLS and StackGAN v1: convolutions and linear maps N(0, 0.02), BatchNorm N(1, 0.02), biases 0."""
    _initialise(net, functools.partial(nn.init.normal_, mean=0.0, std=0.02))


def _initialise(net: nn.Module, draw: Callable[[Tensor], Tensor]) -> None:
    """Draw the weights of convolutions and linear maps; BatchNorm N(1, 0.02), biases 0."""
    for module in net.modules():
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            draw(module.weight)
        elif isinstance(module, BATCH_NORMS):
            nn.init.normal_(module.weight, 1.0, 0.02)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
