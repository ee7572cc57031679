"""Penalties on the slope of a discriminator. They differentiate twice: call them inside a role's forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from t2idist.nn.precision import upcast


def slope_penalty(scores: Tensor, images: Tensor) -> Tensor:
    """Mean over pictures of (norm of the slope of the picture's summed scores - 1) squared; differentiable again.

    scores: (N, ...), made of `images` (N, ...), which require a gradient.
    """
    (slope,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    norms: Tensor = torch.linalg.vector_norm(slope.flatten(1), dim=1)
    return (norms - 1).square().mean()


def gradient_penalty(score: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, mixing: Tensor) -> Tensor:
    """WGAN-GP (Gulrajani et al. 2017, eq. 3), between real and generated pictures (N, 3, S, S).

    score: (N, 3, S, S) -> (N, ...), each picture's own, with no statistics over pictures. mixing: (N,) in [0, 1], the
    share of the real picture. The pictures between and the norms are in full precision; what `score` does, and so the
    slope, in the precision that it is called in.
    """
    share = upcast(mixing).view(-1, 1, 1, 1)
    mixed = (share * upcast(real) + (1 - share) * upcast(fake)).detach().requires_grad_()
    return slope_penalty(upcast(score(mixed)), mixed)
