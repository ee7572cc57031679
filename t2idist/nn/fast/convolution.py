"""Convolutions for gradient penalties on accelerators: no pass uses a feature map as the kernel.

torch's second derivative of a convolution computes the weight's gradient as a dilated convolution with a feature map as
its kernel, for which cuDNN has only slow algorithms. Here every pass is a convolution or one of the two passes of
`aten.convolution_backward`, which are what accelerators are built for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
"""Stride, padding, dilation and number of groups of a convolution."""
_inside_penalty = False
"""Global, because autograd runs the backward pass of an accelerator in a thread of its own."""


@contextlib.contextmanager
def gradient_of_images() -> Iterator[None]:
    """Within the context, layers prepare for a second derivative, and backward passes give no gradient of weights.

    Without it, autograd would compute the gradients of weights as well, and drop them.
    """
    global _inside_penalty
    before, _inside_penalty = _inside_penalty, True
    try:
        yield
    finally:
        _inside_penalty = before


def is_inside_penalty() -> bool:
    """Return whether `gradient_of_images` is active."""
    return _inside_penalty


def conv2d(images: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """`F.conv2d` of (N, C, H, W), (O, C / groups, h, w) and (O,), with derivatives of any order."""
    out: Tensor = Convolution.apply(images, weight, bias, geometry)  # type: ignore[no-untyped-call]
    return out


class Convolution(torch.autograd.Function):
    """A convolution whose gradients are `ImageGradient` and `WeightGradient`."""

    @staticmethod
    def forward(ctx: FunctionCtx, images: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.geometry = geometry  # type: ignore[attr-defined]
        ctx.set_materialize_grads(False)
        stride, padding, dilation, groups = geometry
        return F.conv2d(images, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        images, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        geometry = ctx.geometry  # type: ignore[attr-defined]
        for_images, for_weight, for_bias, _ = ctx.needs_input_grad  # type: ignore[attr-defined]
        if gradient is None:
            return None, None, None, None
        wanted = not _inside_penalty
        return (
            ImageGradient.apply(gradient, weight, images.shape, geometry) if for_images else None,  # type: ignore[no-untyped-call]
            WeightGradient.apply(gradient, images, weight.shape, geometry) if for_weight and wanted else None,  # type: ignore[no-untyped-call]
            gradient.sum((0, 2, 3)) if for_bias and wanted else None,
            None,
        )


class ImageGradient(torch.autograd.Function):
    """Gradient of the images, linear in the gradient of the output and in the weight."""

    @staticmethod
    def forward(ctx: FunctionCtx, gradient: Tensor, weight: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(gradient, weight)
        ctx.geometry = geometry  # type: ignore[attr-defined]
        ctx.set_materialize_grads(False)
        return _backward(gradient, gradient.new_empty(1).expand(shape), weight, geometry, 0)

    @staticmethod
    def backward(ctx: FunctionCtx, second: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        gradient, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        geometry, needs = ctx.geometry, ctx.needs_input_grad  # type: ignore[attr-defined]
        if second is None:
            return None, None, None, None
        of_gradient = Convolution.apply(second, weight, None, geometry) if needs[0] else None  # type: ignore[no-untyped-call]
        of_weight = WeightGradient.apply(gradient, second, weight.shape, geometry) if needs[1] else None  # type: ignore[no-untyped-call]
        return of_gradient, of_weight, None, None


class WeightGradient(torch.autograd.Function):
    """Gradient of the weight, linear in the gradient of the output and in the images."""

    @staticmethod
    def forward(ctx: FunctionCtx, gradient: Tensor, images: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(gradient, images)
        ctx.geometry = geometry  # type: ignore[attr-defined]
        ctx.set_materialize_grads(False)
        return _backward(gradient, images, gradient.new_empty(1).expand(shape), geometry, 1)

    @staticmethod
    def backward(ctx: FunctionCtx, second: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        gradient, images = ctx.saved_tensors  # type: ignore[attr-defined]
        geometry, needs = ctx.geometry, ctx.needs_input_grad  # type: ignore[attr-defined]
        if second is None:
            return None, None, None, None
        of_gradient = Convolution.apply(images, second, None, geometry) if needs[0] else None  # type: ignore[no-untyped-call]
        of_images = ImageGradient.apply(gradient, second, images.shape, geometry) if needs[1] else None  # type: ignore[no-untyped-call]
        return of_gradient, of_images, None, None


def _backward(gradient: Tensor, images: Tensor, weight: Tensor, geometry: Geometry, wanted: int) -> Tensor:
    """Return one result of `aten.convolution_backward`: 0 the gradient of the images, 1 of the weight."""
    stride, padding, dilation, groups = geometry
    mask = [wanted == 0, wanted == 1, False]
    out: Tensor = torch.ops.aten.convolution_backward(
        gradient, images, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
    )[wanted]
    return out
