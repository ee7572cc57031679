"""Batch normalisation of several groups of samples, each by its own statistics, in a training step.

On CPUs, torch adds the channels-last values of a channel one by one in float32: of 20 images of 256 px it loses four
digits, and the result depends on the number of threads. Here sums have at most `MAX_SUMMANDS` summands; their means and
variances are joined in float64. In half precision only sums of more than `_MAX_SUMMANDS_HALF` are split: below that,
torch's error (1e-4) is less than the rounding of the values. On other devices all groups are one operation: a channel
of a group is a channel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

MAX_SUMMANDS = 1024
_MAX_SUMMANDS_HALF = 1 << 17
_MAX_COLUMNS = 2048
"""Partial sums of one call: they should stay in a core's first cache."""
_aten = torch.ops.aten


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise each group by its own statistics.

    Args:
        x: (N, C, ...), the samples of a group contiguous.
        weight: (C,), like bias.

    Returns:
        The normalised x; the mean and the variance, with Bessel's correction, of each group: (groups, C).
    """
    weight = x.new_ones(x.shape[1], dtype=torch.float32) if weight is None else weight
    bias = torch.zeros_like(weight) if bias is None else bias
    if needs_exact_sums(x, groups):
        exact: tuple[Tensor, Tensor, Tensor] = ExactBatchNorm.apply(x, weight, bias, groups, eps)  # type: ignore[no-untyped-call]
        return exact
    if x.is_cpu and groups > 1:
        parts = [_native(part, weight, bias, eps) for part in x.chunk(groups)]
        outs, mean_list, variance_list = zip(*parts, strict=True)
        return torch.cat(outs), torch.stack(mean_list), torch.stack(variance_list)
    out, mean, variance = _native(_groups_to_channels(x, groups), weight.repeat(groups), bias.repeat(groups), eps)
    return _channels_to_groups(out, groups), mean.view(groups, -1), variance.view(groups, -1)


def needs_exact_sums(x: Tensor, groups: int) -> bool:
    """Return whether torch's own sums over a group of x (N, C, ...) would lose digits."""
    most = MAX_SUMMANDS if x.dtype == torch.float32 else _MAX_SUMMANDS_HALF
    if not x.is_cpu or x.dtype == torch.float64 or x.numel() // (groups * x.shape[1]) <= most:
        return False
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _native(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, variance = torch.zeros_like(weight), torch.ones_like(weight)
    return F.batch_norm(x, mean, variance, weight, bias, training=True, momentum=1.0, eps=eps), mean, variance


def _groups_to_channels(x: Tensor, groups: int) -> Tensor:
    """(G * B, C, ...) -> (B, G * C, ...), with the layout of x."""
    if groups == 1:
        return x
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        rows = x.permute(0, 2, 3, 1)  # (G * B, H, W, C)
        return rows.view(groups, -1, *rows.shape[1:]).permute(1, 2, 3, 0, 4).flatten(3).permute(0, 3, 1, 2)
    return x.reshape(groups, -1, *x.shape[1:]).transpose(0, 1).flatten(1, 2)


def _channels_to_groups(x: Tensor, groups: int) -> Tensor:
    """Invert `_groups_to_channels`."""
    if groups == 1:
        return x
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        rows = x.permute(0, 2, 3, 1)  # (B, H, W, G * C)
        return rows.view(*rows.shape[:3], groups, -1).permute(3, 0, 1, 2, 4).flatten(0, 1).permute(0, 3, 1, 2)
    return x.reshape(len(x), groups, -1, *x.shape[2:]).transpose(0, 1).flatten(0, 1)


class ExactBatchNorm(torch.autograd.Function):
    """`batch_norm` on CPUs of channels-last images, with sums of few summands."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        statistics = [_statistics(_rows(part), weight.dtype) for part in x.chunk(groups)]
        out = torch.empty_like(x)
        for part, result, (mean, variance) in zip(x.chunk(groups), out.chunk(groups), statistics, strict=True):
            _scale(part, weight, bias, mean, variance, eps, result)
        means, variances = (torch.stack(column) for column in zip(*statistics, strict=True))
        ctx.save_for_backward(x, weight, bias, means, variances)
        ctx.groups, ctx.eps = groups, eps  # type: ignore[attr-defined]
        count = x.numel() // (groups * x.shape[1])
        unbiased = variances * (count / (count - 1))
        ctx.mark_non_differentiable(means, unbiased)
        return out, means, unbiased

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, means, variances = ctx.saved_tensors  # type: ignore[attr-defined]
        groups, eps = ctx.groups, ctx.eps  # type: ignore[attr-defined]
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted: torch's own has one
            out = torch.cat([_native(part, weight, bias, eps)[0] for part in x.chunk(groups)])
            wanted = [each for each in (x, weight, bias) if each.requires_grad]
            found = iter(torch.autograd.grad(out, wanted, gradient, create_graph=True))
            return *(next(found) if each.requires_grad else None for each in (x, weight, bias)), None, None
        out = torch.empty_like(x)
        of_weight, of_bias = torch.zeros_like(weight), torch.zeros_like(weight)
        backward = _backward if x.dtype == weight.dtype else _backward_mixed
        parts = zip(x.chunk(groups), gradient.chunk(groups), out.chunk(groups), strict=True)
        for (own, own_gradient, result), mean, variance in zip(parts, means, variances, strict=True):
            by_weight, by_bias = backward(own, own_gradient, result, weight, mean, variance, eps)
            of_weight += by_weight
            of_bias += by_bias
        return out, of_weight, of_bias, None, None


def _rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _blocks(rows: int, channels: int) -> Iterator[tuple[slice, int]]:
    """Split rows into blocks, each with the number of partial sums of a channel that it is added up in."""
    most = 2 ** int(math.log2(max(1, _MAX_COLUMNS // channels)))
    start = 0
    while start < rows:
        sums = most
        while sums > 1 and sums * MAX_SUMMANDS > rows - start:
            sums //= 2
        end = min(rows, start + sums * MAX_SUMMANDS)
        yield slice(start, end), sums
        start = end


def _interleaved(rows: Tensor, sums: int) -> Tensor:
    """(R, C) -> (R / sums, sums * C, 1, 1), channels last, without a copy."""
    return rows.view(-1, 1, 1, sums * rows.shape[1]).permute(0, 3, 1, 2)


def _statistics(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance (C,) of rows (R, C)."""
    channels = rows.shape[1]
    counts: list[int] = []
    partial: list[tuple[Tensor, Tensor]] = []
    for block, sums in _blocks(*rows.shape):
        running = torch.zeros(sums * channels, dtype=dtype)  # without it the results have the dtype of the rows
        mean, variance = _aten.batch_norm_update_stats(_interleaved(rows[block], sums), running, running, 0.0)
        partial.append((mean.view(sums, channels), variance.view(sums, channels)))
        counts += [(block.stop - block.start) // sums] * sums
    means, variances = (torch.cat(column).double() for column in zip(*partial, strict=True))
    share = torch.tensor(counts, dtype=torch.float64).unsqueeze(1) / len(rows)
    mean = (share * means).sum(0)
    variance = (share * (variances + (means - mean) ** 2)).sum(0)
    return mean.to(dtype), variance.to(dtype)


def _scale(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float, out: Tensor) -> None:
    """Write (x - mean) / sqrt(variance + eps) * weight + bias into out."""
    unused = torch.empty(0)
    _aten.native_batch_norm.out(
        x, weight, bias, mean, variance, False, 0.0, eps, out=out, save_mean=unused, save_invstd=unused
    )


def _backward(
    x: Tensor, gradient: Tensor, out: Tensor, weight: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Write the gradient of a group's x into out; return the gradients of weight and bias."""
    rows, gradient_rows, channels = _rows(x), _rows(gradient), x.shape[1]
    inverse = (variance.double() + eps).rsqrt()
    partial = []
    for block, sums in _blocks(*rows.shape):
        _, by_weight, by_bias = _aten.native_batch_norm_backward(
            _interleaved(gradient_rows[block], sums), _interleaved(rows[block], sums), None, None, None,
            mean.repeat(sums), inverse.to(mean.dtype).repeat(sums), True, eps, (False, True, True),
        )  # fmt: skip
        partial.append((by_weight.view(sums, channels), by_bias.view(sums, channels)))
    by_weight, by_bias = (torch.cat(column).double().sum(0) for column in zip(*partial, strict=True))
    scale = weight.double() * inverse
    # scale * (gradient - mean(gradient) - normalised * mean(gradient * normalised))
    slope, offset = (-scale * inverse * by_weight / len(rows), -scale * by_bias / len(rows))
    _scale(x, slope.to(weight.dtype), offset.to(weight.dtype), mean, torch.ones_like(mean), 0.0, out)
    out.addcmul_(gradient, scale.to(weight.dtype).view(1, -1, 1, 1))
    return by_weight.to(weight.dtype), by_bias.to(weight.dtype)


def _backward_mixed(
    x: Tensor, gradient: Tensor, out: Tensor, weight: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Do as `_backward` for x in half precision, whose rounding exceeds that of long sums."""
    inverse = (variance + eps).rsqrt()
    by_weight, by_bias = torch.empty_like(weight), torch.empty_like(weight)
    _aten.native_batch_norm_backward.out(
        gradient, x, weight, None, None, mean, inverse, True, eps, (True, True, True), out0=out, out1=by_weight,
        out2=by_bias,
    )  # fmt: skip
    return by_weight, by_bias
