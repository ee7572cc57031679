"""Faster layers that replace those of a network in place; parameter names do not change.

Networks become channels last, the layout that convolutions prefer in half precision on every device. On CPUs a
convolution whose weight is larger than its input (the last ones of a discriminator: millions of weights for 8x8
positions and fewer) runs as a matrix product: oneDNN's convolutions reorder the whole weight in every pass. On other
devices convolutions cast their weight once per update, and have a second derivative for gradient penalties.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.utils import parametrize

from t2idist.nn.fast.convolution import conv2d, is_inside_penalty

MIN_MATRIX_ELEMENTS = 1 << 20
"""Smallest weight, in elements, for which the matrix product is faster than oneDNN's convolution."""

Window = tuple[int, int, int]
"""Kernel size, stride and padding of a square convolution."""


def use_fast_layers(net: nn.Module) -> nn.Module:
    """Replace layers of the network by faster ones, in place; returns the network."""
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in net.modules():
        if parametrize.is_parametrized(module):
            continue  # the weight is another one in each pass
        if type(module) is nn.Conv2d and module.weight.is_cpu and _is_plain(module):
            module.__class__ = FastConv2d
        elif type(module) is nn.Conv2d and not (module.weight.is_cpu or module.weight.is_meta):
            module.__class__ = AcceleratorConv2d
        elif type(module) is nn.LeakyReLU:
            module.__class__ = FastLeakyReLU
        elif hasattr(module, "cast_weight") and not isinstance(module, CachedCast) and not module.weight.is_meta:
            kind = type(module)
            module.__class__ = type(f"Fast{kind.__name__}", (CachedCast, kind), {})
    return net


def _is_plain(conv: nn.Conv2d) -> bool:
    square = all(len(set(pair)) == 1 for pair in (conv.kernel_size, conv.stride, conv.padding))
    return square and conv.groups == 1 and set(conv.dilation) == {1} and conv.padding_mode == "zeros"


class CachedCast(nn.Conv2d):
    """A convolution whose weight is cast to half precision once per update.

    Autocast casts it in every pass, and does not cache the cast of a frozen weight.
    """

    _half: _CachedWeight | None = None

    def cast_weight(self) -> Tensor:
        """Return the weight in the dtype of matrix products."""
        device = self.weight.device.type
        if not torch.is_autocast_enabled(device) or self.weight.dtype != torch.float32:
            return self.weight
        kind = torch.get_autocast_dtype(device)
        if self._half is None or self._half.version != self.weight._version or self._half.frozen.dtype != kind:
            with torch.inference_mode(False):  # so that a cast made while sampling can be used in training
                self._half = _CachedWeight(
                    self.weight._version, self.weight.detach().to(kind, memory_format=torch.channels_last)
                )
        if not (self.weight.requires_grad and torch.is_grad_enabled()):
            return self._half.frozen
        if self._half.trained is None:
            linked: Tensor = CastWithGradient.apply(self.weight, self._half.frozen)  # type: ignore[no-untyped-call]
            self._half.trained = linked
        return self._half.trained

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_half"}


class FastConv2d(CachedCast):
    """A square convolution with a cached cast; a matrix product if the weight has more elements than the input."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.cast_weight()
        out: Tensor
        if weight.numel() < max(input.numel(), MIN_MATRIX_ELEMENTS):
            out = self._conv_forward(input, weight, self.bias)
            return out
        window = (self.kernel_size[0], self.stride[0], int(self.padding[0]))
        patches: Tensor = Unfold.apply(input.to(weight.dtype), window)  # type: ignore[no-untyped-call]
        out = F.linear(patches.flatten(3), weight.permute(0, 2, 3, 1).flatten(1), self.bias)
        return out.permute(0, 3, 1, 2)


class AcceleratorConv2d(CachedCast):
    """A convolution with a cached cast; inside a gradient penalty, with a second derivative made for accelerators."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.cast_weight()
        if is_inside_penalty() and self.padding_mode == "zeros" and not isinstance(self.padding, str):
            bias = None if self.bias is None else self.bias.to(weight.dtype)
            return conv2d(input.to(weight.dtype), weight, bias, (self.stride, self.padding, self.dilation, self.groups))
        out: Tensor = self._conv_forward(input, weight, self.bias)
        return out


@dataclass
class _CachedWeight:
    """The copy of a weight in half precision."""

    version: int
    """Version counter of the weight when it was copied."""
    frozen: Tensor
    """The copy without gradient."""
    trained: Tensor | None = None
    """The copy with gradient to the weight, created on first use."""


class CastWithGradient(torch.autograd.Function):
    """Return the copy of a weight, with gradients that reach the weight."""

    @staticmethod
    def forward(ctx: FunctionCtx, weight: Tensor, half: Tensor) -> Tensor:
        ctx.kind = weight.dtype  # type: ignore[attr-defined]
        ctx.set_materialize_grads(False)
        return half.view_as(half)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor | None) -> tuple[Tensor | None, None]:  # type: ignore[override]
        return None if gradient is None else gradient.to(ctx.kind), None  # type: ignore[attr-defined]


def clear_cached_casts(net: nn.Module) -> None:
    """Drop the cached casts after weights changed, perhaps without a new version (DeepSpeed)."""
    for module in net.modules():
        if isinstance(module, CachedCast):
            module._half = None


class FastLeakyReLU(nn.LeakyReLU):
    """LeakyReLU without a second derivative, which is 0.

    When a gradient penalty is differentiated, PyTorch back-propagates zeros from LeakyReLU through every earlier layer,
    a third of the work of the penalty; this layer skips them.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and input.requires_grad):
            return super().forward(input)
        out: Tensor = LeakyReLUFunction.apply(input, self.negative_slope)  # type: ignore[no-untyped-call]
        return out


class LeakyReLUFunction(torch.autograd.Function):
    """LeakyReLU whose backward is differentiable in the incoming gradient only."""

    @staticmethod
    def forward(ctx: FunctionCtx, input: Tensor, slope: float) -> Tensor:
        out = F.leaky_relu(input, slope)
        ctx.save_for_backward(out)
        ctx.slope = slope  # type: ignore[attr-defined]
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor | None) -> tuple[Tensor | None, None]:  # type: ignore[override]
        if gradient is None:
            return None, None
        (out,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return torch.ops.aten.leaky_relu_backward(gradient, out.detach(), ctx.slope, True), None  # type: ignore[attr-defined]


class Unfold(torch.autograd.Function):
    """Extract the windows of a convolution: (N, C, H, W) -> (N, rows, columns, side, side, C)."""

    @staticmethod
    def forward(ctx: FunctionCtx, images: Tensor, window: Window) -> Tensor:
        ctx.size, ctx.window = images.shape[2:], window  # type: ignore[attr-defined]
        ctx.set_materialize_grads(False)
        side, stride, padding = window
        padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding)).contiguous()
        count, height, width, channels = padded.shape
        rows, columns = (height - side) // stride + 1, (width - side) // stride + 1
        a, b, c, d = padded.stride()
        shape = (count, rows, columns, side, side, channels)
        return padded.as_strided(shape, (a, b * stride, c * stride, b, c, d)).contiguous()

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor | None) -> tuple[Tensor | None, None]:  # type: ignore[override]
        if gradient is None:
            return None, None
        return Fold.apply(gradient, ctx.size, ctx.window), None  # type: ignore[no-untyped-call, attr-defined]


class Fold(torch.autograd.Function):
    """The adjoint of `Unfold`, which sums overlaps: (N, rows, columns, side, side, C) -> (N, C, height, width)."""

    @staticmethod
    def forward(ctx: FunctionCtx, patches: Tensor, size: tuple[int, int], window: Window) -> Tensor:
        ctx.window = window  # type: ignore[attr-defined]
        ctx.set_materialize_grads(False)
        (side, stride, padding), (height, width) = window, size
        count, rows, columns, *_, channels = patches.shape
        total = patches.new_zeros(count, height + 2 * padding, width + 2 * padding, channels)
        for i in range(side):
            for j in range(side):
                below, right = i + stride * (rows - 1) + 1, j + stride * (columns - 1) + 1
                total[:, i:below:stride, j:right:stride] += patches[:, :, :, i, j]
        return total[:, padding : padding + height, padding : padding + width].permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor | None) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        if gradient is None:
            return None, None, None
        return Unfold.apply(gradient, ctx.window), None, None  # type: ignore[no-untyped-call, attr-defined]
