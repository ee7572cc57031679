"""Image encoders of DAMSM and char-CNN-RNN: an image to a vector for each region and one for the whole image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2idist.nn.blocks import down_block
from t2idist.nn.inception import InceptionTrunk

TRUNKS = ("inception", "small")
MIN_INCEPTION_SIZE = 75


def resize(images: Tensor, size: int, antialias: bool = True) -> Tensor:
    """Resize (N, 3, H, W) to (N, 3, size, size), bilinear, antialiased if it shrinks and `antialias` is true."""
    if images.shape[2] == size and images.shape[3] == size:
        return images
    antialias = antialias and images.shape[2] > size
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False, antialias=antialias)


class InceptionEncoder(InceptionTrunk):
    """AttnGAN's image encoder (section 3.2): frozen Inception-v3 and two trained projections.

    Images (N, 3, S, S) in [-1, 1] -> regions (N, embedding_dim, 289), or (N, embedding_dim, 0) if `regions` is false,
    and whole (N, embedding_dim). The trunk has no gradient to its weights and stays in eval mode. (The released code
    left it in train mode, so its running statistics drifted, and then used it in eval mode.)
    """

    def __init__(self, embedding_dim: int, image_size: int = 299, regions: bool = True) -> None:
        super().__init__()
        self.image_size = image_size
        self.requires_grad_(False)
        self.emb_features = _region_projection(768, embedding_dim) if regions else None
        self.emb_cnn_code = nn.Linear(2048, embedding_dim)
        nn.init.uniform_(self.emb_cnn_code.weight, -0.1, 0.1)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for name, child in self.named_children():
            child.train(mode and name in ("emb_features", "emb_cnn_code"))
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        regions, pooled = self.features(resize(images, self.image_size))
        return _with_regions(self.emb_features, regions, self.emb_cnn_code(pooled))


class SmallTrunk(nn.Module):
    """A trunk small enough to be trained from scratch on small images.

    `features`: images (N, 3, S, S) in [-1, 1] -> regions (N, 4 * width, image_size / 8, image_size / 8) and pooled
    features (N, 8 * width).
    """

    def __init__(self, image_size: int, width: int) -> None:
        super().__init__()
        if image_size < 32 or image_size % 16:
            raise ValueError(f"image_size is {image_size}; the small trunk needs a multiple of 16, at least 32")
        self.image_size = image_size
        self.local = nn.Sequential(
            down_block(3, width, norm=False), down_block(width, 2 * width), down_block(2 * width, 4 * width)
        )
        self.whole = down_block(4 * width, 8 * width)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        regions = self.local(resize(images, self.image_size))
        return regions, self.whole(regions).mean(dim=(2, 3))


class SmallEncoder(SmallTrunk):
    """The small trunk with the DAMSM's two projections.

    Images (N, 3, S, S) in [-1, 1] -> regions (N, embedding_dim, (image_size / 8)**2), or (N, embedding_dim, 0) if
    `regions` is false, and whole (N, embedding_dim).
    """

    def __init__(self, embedding_dim: int, image_size: int, width: int, regions: bool = True) -> None:
        super().__init__(image_size, width)
        self.emb_features = _region_projection(4 * width, embedding_dim) if regions else None
        self.emb_cnn_code = nn.Linear(8 * width, embedding_dim)
        nn.init.uniform_(self.emb_cnn_code.weight, -0.1, 0.1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        regions, pooled = self.features(images)
        return _with_regions(self.emb_features, regions, self.emb_cnn_code(pooled))


def _region_projection(channels: int, embedding_dim: int) -> nn.Conv2d:
    projection = nn.Conv2d(channels, embedding_dim, kernel_size=1, bias=False)
    nn.init.uniform_(projection.weight, -0.1, 0.1)
    return projection


def _with_regions(projection: nn.Conv2d | None, regions: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    if projection is None:
        return whole.new_zeros(*whole.shape, 0), whole
    projected: Tensor = projection(regions)
    return projected.flatten(2), whole


def damsm_image_encoder(config: Mapping[str, Any], regions: bool = True) -> InceptionEncoder | SmallEncoder:
    """Build the image encoder of a `damsm` stage or, without `regions`, a `char_text` stage, with new weights.

    Raises ValueError for an unknown trunk or an unsupported image size.
    """
    if config["trunk"] not in TRUNKS:
        raise ValueError(f"trunk is '{config['trunk']}'; it must be one of {', '.join(TRUNKS)}")
    if config["trunk"] == "inception":
        return InceptionEncoder(config["embedding_dim"], config["image_size"], regions)
    return SmallEncoder(config["embedding_dim"], config["image_size"], config["trunk_width"], regions)


def check_trunk(trunk: str, image_size: int, trunk_weights: str) -> None:
    """Raise ValueError, naming the key, if a stage cannot train with this trunk."""
    if trunk == "inception" and image_size < MIN_INCEPTION_SIZE:
        raise ValueError(
            f"image_size is {image_size}; the trunk 'inception' needs at least {MIN_INCEPTION_SIZE} "
            "and was trained at 299"
        )
    if trunk != "inception" and trunk_weights:
        raise ValueError(f"trunk_weights is given, but trunk is '{trunk}'; only 'inception' takes weights")


class TextImageEncoders(nn.Module):
    """A text and an image encoder as one role, trained by one Adam, as published."""

    def __init__(self, text: nn.Module, image: nn.Module) -> None:
        super().__init__()
        self.text = text
        self.image = image


def load_trunk(encoder: InceptionEncoder, weights: Mapping[str, Tensor]) -> None:
    """Load torchvision's Inception-v3 weights into the frozen trunk of an image encoder, in place.

    Classifiers (`fc.*`, `AuxLogits.*`) are ignored. Raises ValueError, naming the key, if the rest does not fit.
    """
    own = {k: v for k, v in encoder.state_dict().items() if not k.startswith(("emb_features.", "emb_cnn_code."))}
    given = {k.removeprefix("module."): v for k, v in weights.items()}
    given = {k: v for k, v in given.items() if not k.startswith(("fc.", "AuxLogits."))}
    copy_trunk_weights(own, given, "Inception-v3")


def copy_trunk_weights(own: Mapping[str, Tensor], given: Mapping[str, Tensor], kind: str) -> None:
    """Copy weights by name into the tensors of a trunk; missing `num_batches_tracked` keep their value.

    Raises ValueError, naming the key, if names or shapes do not fit. kind: name of the trunk, for the message.
    """
    unknown = sorted(given.keys() - own.keys())
    missing = sorted(k for k in own.keys() - given.keys() if not k.endswith("num_batches_tracked"))
    if unknown or missing:
        problem = f"does not have '{missing[0]}'" if missing else f"has '{unknown[0]}', which {kind} does not"
        raise ValueError(f"trunk_weights {problem} ({len(missing)} names missing, {len(unknown)} unknown)")
    for key, value in given.items():
        if value.shape != own[key].shape:
            raise ValueError(
                f"trunk_weights: '{key}' has shape {tuple(value.shape)}; {kind} has {tuple(own[key].shape)}"
            )
        with torch.no_grad():
            own[key].copy_(value)
