"""Gradient penalties of a discriminator. They differentiate twice: call them inside a role's forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from t2idist.nn.fast.convolution import gradient_of_images
from t2idist.nn.precision import upcast


def unit_gradient_penalty(scores: Tensor, images: Tensor) -> Tensor:
    """Mean over images of (norm of the gradient of the image's summed scores - 1) squared; differentiable.

    Args:
        scores: (N, ...), computed from `images`.
        images: (N, ...), which require a gradient.
    """
    with gradient_of_images():
        (gradient,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    norms: Tensor = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    return (norms - 1).square().mean()


def r1_penalty(score: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    """R1: mean over real images of the squared norm of their score's gradient (Mescheder et al. 2018, eq. 9).

    It is half as large there; the factor is part of the weight here.

    Args:
        score: (N, 3, S, S) -> (N, ...), the scores of each image.
        real: (N, 3, S, S).
    """
    images = upcast(real).detach().requires_grad_()
    with gradient_of_images():
        scores = upcast(score(images))
        (gradient,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    return gradient.square().sum() / len(images)


def matching_aware_penalty(score: Callable[..., Tensor], real: Tensor, *conditions: Tensor) -> Tensor:
    """MA-GP: mean over real pairs of the score's gradient norm to the power 6 (Tao et al. 2022, DF-GAN, eq. 2).

    The norm is that of the gradients to image and condition together, as released. It is twice as large there; the
    factor is part of the weight here.

    Args:
        score: ``score(real, *conditions)`` -> (N, ...), the scores of each pair.
        real: (N, 3, S, S).
        conditions: (N, D) each; none for scores of images alone.
    """
    inputs = [upcast(each).detach().requires_grad_() for each in (real, *conditions)]
    with gradient_of_images():
        scores = upcast(score(*inputs))
        gradients = torch.autograd.grad(scores.sum(), inputs, create_graph=True)
    squares = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0)
    return squares.pow(3).mean()


def gradient_penalty(score: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, mixing: Tensor) -> Tensor:
    """Gradient penalty of WGAN-GP (Gulrajani et al. 2017, eq. 3), between real and generated images (N, 3, S, S).

    Interpolates and norms are in float32 at least; `score`, and so the gradient, is in the precision of the caller.

    Args:
        score: (N, 3, S, S) -> (N, ...), the scores of each image, without statistics over images.
        mixing: (N,) in [0, 1], the share of the real image.
    """
    share = upcast(mixing).view(-1, 1, 1, 1)
    mixed = (share * upcast(real) + (1 - share) * upcast(fake)).detach().requires_grad_()
    with gradient_of_images():
        scores = upcast(score(mixed))
    return unit_gradient_penalty(scores, mixed)
