"""Small blocks of the generators and discriminators; parameter names follow the published networks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2idist.nn.fast import blocks as fast
from t2idist.nn.fast.torch_internals import BatchNormBase

LEAKY_SLOPE = 0.2
"""Negative slope of LeakyReLU in the discriminators of all systems but StarGAN."""
GROUP_SIZE = "group_size"
"""Attribute of the engine's BatchNorm layers: samples of each group."""


class GLU(nn.Module):
    """Gated linear unit over channels: the first half times the sigmoid of the second half, `F.glu(x, dim=1)`."""

    def forward(self, x: Tensor) -> Tensor:
        return fast.glu(x)


class SkipExcitation(nn.Module):
    """Scale channels by the first map: (N, first_channels, 4, 4), (N, C, H, W) -> (N, C, H, W).

    Skip-layer excitation (FastGAN: Liu et al. 2021, section 3.1).
    """

    def __init__(self, first_channels: int, channels: int) -> None:
        super().__init__()
        self.scale = nn.Sequential(
            nn.Conv2d(first_channels, channels, 4), nn.SiLU(), nn.Conv2d(channels, channels, 1), nn.Sigmoid()
        )

    def forward(self, first: Tensor, features: Tensor) -> Tensor:
        out: Tensor = features * self.scale(first)
        return out


def conv3x3(channels_in: int, channels_out: int) -> nn.Conv2d:
    """3x3 convolution that keeps the size, without bias."""
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False)


def up_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """Nearest-neighbour x2, then a 3x3 convolution: (N, C, H, W), (O, C, 3, 3) -> (N, O, 2H, 2W)."""
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1)


class UpConv2d(nn.Conv2d):
    """`up_conv2d` as a layer: (N, C, H, W) -> (N, channels_out, 2H, 2W)."""

    def __init__(self, channels_in: int, channels_out: int, bias: bool = False) -> None:
        super().__init__(channels_in, channels_out, kernel_size=3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out = fast.up_conv2d(x, self.weight)
        return out if self.bias is None else out + self.bias[:, None, None].to(out.dtype)


def joint_conv2d(
    features: Tensor, conditions: Sequence[Tensor], weight: Tensor, *, condition_first: bool
) -> list[Tensor]:
    """3x3 convolution of features (N, C, H, W) joined with each tiled condition (N, D) -> (N, O, H, W) for each."""
    parts = ([features, tile(condition, features)] for condition in conditions)
    joint = [torch.cat(part[::-1] if condition_first else part, dim=1) for part in parts]
    return [F.conv2d(x, weight, padding=1) for x in joint]


class JointConv2d(nn.Conv2d):
    """`joint_conv2d` as a layer: features (N, channels, H, W) and conditions -> (N, channels_out, H, W) for each.

    On CPUs the fast form saves work; on other devices the plain one has a quarter of the launches.

    condition_first: whether the condition's channels come first in the weight.
    """

    def __init__(self, channels: int, condition_dim: int, channels_out: int, *, condition_first: bool = False) -> None:
        super().__init__(channels + condition_dim, channels_out, kernel_size=3, padding=1, bias=False)
        self.condition_first = condition_first

    def cast_weight(self) -> Tensor:
        """Return the weight to use; `nn.fast.layers.CachedCast` returns a copy in half precision."""
        return self.weight

    def forward(self, features: Tensor, *conditions: Tensor) -> list[Tensor]:  # type: ignore[override]
        form = fast.joint_conv2d if features.is_cpu or features.is_meta else joint_conv2d
        return form(features, conditions, self.cast_weight(), condition_first=self.condition_first)


class JointSequential(nn.Sequential):
    """A `JointConv2d` and the layers after it: features, conditions -> one output for each condition."""

    def forward(self, features: Tensor, *conditions: Tensor) -> list[Tensor]:
        joint, *layers = self
        outputs: list[Tensor] = joint(features, *conditions)
        if len(outputs) > 1 and not couples_samples(self):
            whole = torch.cat(outputs)
            for layer in layers:
                whole = layer(whole)
            return list(whole.tensor_split(len(outputs)))
        for layer in layers:
            outputs = [layer(x) for x in outputs]
        return outputs


def up_block(channels_in: int, channels_out: int) -> nn.Sequential:
    """Nearest x2 + conv3x3 + BatchNorm + GLU: (N, channels_in, H, W) -> (N, channels_out, 2H, 2W).

    The nn.Identity stands in for the published upsampling layer, so that parameter names match.
    """
    return nn.Sequential(
        nn.Identity(), UpConv2d(channels_in, 2 * channels_out), nn.BatchNorm2d(2 * channels_out), GLU()
    )


class GLUResidual(nn.Module):
    """x + BN(conv(GLU(BN(conv(x))))), without a final activation (StackGAN-v2, AttnGAN)."""

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
    """conv3x3 + BatchNorm + LeakyReLU: (N, channels_in, H, W) -> (N, channels_out, H, W)."""
    return nn.Sequential(
        conv3x3(channels_in, channels_out), nn.BatchNorm2d(channels_out), nn.LeakyReLU(LEAKY_SLOPE, inplace=True)
    )


def down_block(channels_in: int, channels_out: int, norm: bool = True) -> nn.Sequential:
    """4x4 stride-2 convolution (+ BatchNorm) + LeakyReLU: (N, C, H, W) -> (N, channels_out, H/2, W/2)."""
    conv = nn.Conv2d(channels_in, channels_out, kernel_size=4, stride=2, padding=1, bias=False)
    activation = nn.LeakyReLU(LEAKY_SLOPE, inplace=True)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), activation) if norm else nn.Sequential(conv, activation)


@contextlib.contextmanager
def samples_per_group(net: object, count: int) -> Iterator[None]:
    """Within the context, run a network on `count` samples of each group: BatchNorm normalizes that many together."""
    assert isinstance(net, nn.Module)
    norms = [module for module in net.modules() if hasattr(module, GROUP_SIZE)]
    before = [getattr(norm, GROUP_SIZE) for norm in norms]
    for norm in norms:
        setattr(norm, GROUP_SIZE, count)
    try:
        yield
    finally:
        for norm, size in zip(norms, before, strict=True):
            setattr(norm, GROUP_SIZE, size)


_CHANNELS_OF_GROUP = 8


def couples_samples(net: object) -> bool:
    """Return whether a network has BatchNorm, so that a sample's output depends on the others of its pass."""
    return isinstance(net, nn.Module) and any(isinstance(module, BatchNormBase) for module in net.modules())


def replace_batch_norm(net: nn.Module, norm: str) -> None:
    """Replace every BatchNorm of a network, in place.

    Args:
        norm: "batch": unchanged; "group": GroupNorm with 8 channels a group; "instance": InstanceNorm without weights,
            where there are positions to take statistics of; any other: removed.
    """
    if norm == "batch":
        return
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                channels = child.num_features
                new: nn.Module = nn.Identity()
                if norm == "group":
                    new = nn.GroupNorm(max(1, channels // _CHANNELS_OF_GROUP), channels)
                elif norm == "instance" and isinstance(child, nn.BatchNorm2d):
                    new = nn.InstanceNorm2d(channels)
                setattr(parent, name, new)


def tile(vector: Tensor, like: Tensor) -> Tensor:
    """Repeat (N, C) over the positions of `like` (N, _, H, W), in its dtype: (N, C, H, W)."""
    return vector.to(like.dtype)[:, :, None, None].expand(-1, -1, like.shape[2], like.shape[3])
