"""The small blocks that generators and discriminators are built of; parameter names follow the published networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from t2idist.nn.precision import upcast

LEAKY_SLOPE = 0.2
"""Slope of LeakyReLU in every discriminator of the family."""


class GLU(nn.Module):
    """Gated linear unit over channels: the first half times the sigmoid of the second half."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            rows = x.permute(0, 2, 3, 1)  # along dim 1 of such features torch takes ten times as long
            narrow = x.is_cpu and x.dtype == torch.bfloat16
            out: Tensor = GatedRows.apply(rows) if narrow else F.glu(rows, dim=-1)  # type: ignore[no-untyped-call]
            return out.permute(0, 3, 1, 2)
        return F.glu(x, dim=1)


class GatedRows(torch.autograd.Function):
    """`F.glu` over the last dimension, for rows in half precision on CPUs.

    torch goes through halves of less than 64 channels number by number; here they are first moved apart.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor) -> Tensor:
        value, gate = (half.clone(memory_format=torch.contiguous_format) for half in rows.chunk(2, dim=-1))
        gate.sigmoid_()
        ctx.save_for_backward(value, gate)
        return value * gate

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        value, gate = ctx.saved_tensors  # type: ignore[attr-defined]
        return torch.cat([gradient * gate, torch.ops.aten.sigmoid_backward(gradient * value, gate)], dim=-1)


def conv3x3(channels_in: int, channels_out: int) -> nn.Conv2d:
    """3x3 convolution that keeps the size, without bias."""
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False)


class UpConv2d(nn.Conv2d):
    """Nearest x2, then this 3x3 convolution, in one pass: (N, C, H, W) -> (N, channels_out, 2H, 2W).

    The two linear maps are one transposed convolution of stride 2, whose 4x4 kernel is the 3x3 one spread over 2x2
    places: 16 products for each input place instead of 36. The weight is that of the 3x3 convolution. Channels last,
    which takes half the time.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, kernel_size=3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        taps = self.weight.permute(2, 3, 1, 0).contiguous()  # (3, 3, C, channels_out)
        kernel = _spread(_spread(taps, 0), 1).permute(2, 3, 0, 1).to(x.dtype, memory_format=torch.channels_last)
        return F.conv_transpose2d(x.contiguous(memory_format=torch.channels_last), kernel, stride=2, padding=1)


def _spread(taps: Tensor, dim: int) -> Tensor:
    """Three taps along a dimension to the four that each place has where its neighbour was the same place before."""
    first, second, third = taps.unbind(dim)
    return torch.stack([third, third + second, second + first, first], dim)


class JointConv2d(nn.Conv2d):
    """A 3x3 convolution of features beside a condition that is the same at all places, without the work of tiling it.

    features (N, channels, H, W), conditions (N, condition_dim) -> (N, channels_out, H, W) for each condition. It is a
    sum of the features' part, which serves all conditions, and the condition's, which differs along the border alone.
    condition_first: whether its channels come first in the weight.
    """

    def __init__(self, channels: int, condition_dim: int, channels_out: int, *, condition_first: bool = False) -> None:
        super().__init__(channels + condition_dim, channels_out, kernel_size=3, padding=1, bias=False)
        self.channels, self.condition_first = channels, condition_first

    def cast_weight(self) -> Tensor:
        """The weight that a pass takes; the engine puts a copy in half precision in its place."""
        return self.weight

    def forward(self, features: Tensor, *conditions: Tensor) -> list[Tensor]:  # type: ignore[override]
        weight = self.cast_weight()
        rest = weight.shape[1] - self.channels
        if self.condition_first:
            of_condition, of_features = weight.split([rest, self.channels], 1)
        else:
            of_features, of_condition = weight.split([self.channels, rest], 1)
        seen = F.conv2d(features, of_features, padding=1)
        return [seen + _of_condition(condition, of_condition, seen) for condition in conditions]


def _of_condition(condition: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    """The 3x3 convolution (O, D, 3, 3) of a condition (N, D) tiled over the places of `like` (N, O, H, W)."""
    products = F.linear(condition.to(like.dtype), weight.permute(0, 2, 3, 1).flatten(0, 2))
    taps = upcast(products.unflatten(1, (-1, 3, 3)).permute(0, 2, 3, 1))
    places = _by_border(_by_border(taps, 1), 2).to(like.dtype)
    return _fill(_fill(places, 2, like.shape[3]), 1, like.shape[2]).permute(0, 3, 1, 2)


def _by_border(taps: Tensor, dim: int) -> Tensor:
    """Sums of the three taps along a dimension that fall inside: for the first place, those between, the last one."""
    before, here, after = taps.unbind(dim)
    return torch.stack([here + after, before + here + after, before + here], dim)


def _fill(places: Tensor, dim: int, count: int) -> Tensor:
    """Of three places along a dimension the one in the middle repeated, until there are `count`."""
    first, middle, last = places.split(1, dim)
    sizes = [-1] * places.dim()
    sizes[dim] = count - 2
    return torch.cat([first, middle.expand(sizes), last], dim)


class JointSequential(nn.Sequential):
    """A `JointConv2d` and the layers that follow it: features, conditions -> what comes out for each condition."""

    def forward(self, features: Tensor, *conditions: Tensor) -> list[Tensor]:
        joint, *layers = self
        each: list[Tensor] = joint(features, *conditions)
        for layer in layers:
            each = [layer(x) for x in each]
        return each


def up_block(channels_in: int, channels_out: int) -> nn.Sequential:
    """Nearest x2 + conv3x3 + BatchNorm + GLU: (N, channels_in, H, W) -> (N, channels_out, 2H, 2W).

    The first entry stands where the published networks have the layer that repeats pixels.
    """
    return nn.Sequential(
        nn.Identity(), UpConv2d(channels_in, 2 * channels_out), nn.BatchNorm2d(2 * channels_out), GLU()
    )


class GLUResidual(nn.Module):
    """x + BN(conv(GLU(BN(conv(x))))), without an activation at the end (StackGAN-v2, AttnGAN)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            conv3x3(channels, 2 * channels),
            nn.BatchNorm2d(2 * channels),
            GLU(),
            conv3x3(channels, channels),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.block(x)
        return out


def leaky_block(channels_in: int, channels_out: int) -> nn.Sequential:
    """conv3x3 + BatchNorm + LeakyReLU, the discriminators' block that keeps the size."""
    return nn.Sequential(
        conv3x3(channels_in, channels_out), nn.BatchNorm2d(channels_out), nn.LeakyReLU(LEAKY_SLOPE, inplace=True)
    )


def down_block(channels_in: int, channels_out: int, norm: bool = True) -> nn.Sequential:
    """4x4 stride-2 convolution (+ BatchNorm) + LeakyReLU: (N, C, H, W) -> (N, channels_out, H/2, W/2)."""
    conv = nn.Conv2d(channels_in, channels_out, kernel_size=4, stride=2, padding=1, bias=False)
    activation = nn.LeakyReLU(LEAKY_SLOPE, inplace=True)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), activation) if norm else nn.Sequential(conv, activation)


def tile(vector: Tensor, like: Tensor) -> Tensor:
    """(N, C) repeated over the places of `like` (N, _, H, W), in its precision: (N, C, H, W)."""
    return vector.to(like.dtype)[:, :, None, None].expand(-1, -1, like.shape[2], like.shape[3])
