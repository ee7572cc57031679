"""The style encoder of GAN-CLS: it inverts a trained generator, from an image to its noise (Reed et al. 2016)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from t2idist.contract import Adam, Batch, BuildInfo, Captions, Frozen, NoiseFn, Role, Sample, Train, check_ranges
from t2idist.nn.dcgan import generator_from_export, trunk
from t2idist.nn.image_encoders import resize
from t2idist.nn.init import normal_
from t2idist.nn.precision import upcast
from t2idist.nn.text_encoders import sentence_encoder
from t2idist.systems import _sentences


@dataclass(frozen=True)
class Config:
    """The paper specifies no layers; we use the trunk and learning rate of GAN-CLS's plain discriminator."""

    width: int = 64
    """Channels after the first layer."""
    lr: float = 2e-4
    ema_half_life_images: float | None = None
    """Half-life of the encoder's EMA; none: no EMA."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            at_least_1="width",
            above_0="lr ema_half_life_images",
        )


class StyleEncoder(nn.Module):
    """Images (N, 3, S, S) in [-1, 1] -> z (N, z_dim)."""

    def __init__(self, width: int, image_size: int, z_dim: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.trunk, channels = trunk(width, image_size)
        self.code = nn.Linear(channels * 16, z_dim)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.code(self.trunk(resize(images, self.image_size)).flatten(1))
        return out


class Style:
    """The system. Slot "generator": the export to invert. Exports: "style", "generator" and, if it has one, "text"."""

    def __init__(self, config: Config, info: BuildInfo) -> None:
        source = info.sources["generator"]
        vector_dim = source["plan"]["vector_dim"]
        encoder, text_dim = sentence_encoder(source["plan"]["sources"], info.vocabulary_size, vector_dim)
        if encoder is None and info.data.vector_dim != vector_dim:
            raise ValueError(
                f"uses.generator: it was trained on sentence vectors of {vector_dim} elements and this data has "
                f"{info.data.vector_dim}; use the data that it was trained on"
            )
        self.frozen = {"generator": Frozen(generator_from_export(source, text_dim), "generator", "generator")}
        if encoder is not None:
            self.frozen["text"] = Frozen(encoder, "generator", "text")
        self.z_dim: int = source["config"]["z_dim"]
        self.unit_text: bool = source["config"]["unit_text"]
        image_size: int = source["config"]["image_size"]
        self.sizes = (image_size,)
        style = StyleEncoder(config.width, image_size, self.z_dim)
        normal_(style)
        self.roles = {"style": Role(style, Adam(lr=config.lr), config.ema_half_life_images)}
        self.exports = ("style", *self.frozen)

    def step(self, batch: Batch, train: Train) -> None:
        """L_style (section 4.4, eq. 6): recover the noise of generated images; real images are not used."""
        z = train.noise(self.z_dim)
        text = _sentences.for_step(batch.captions, train, self.frozen, self.unit_text)
        with torch.no_grad(), train.frozen("generator") as generator:
            images = generator(z, text)
        train.report("style/squared_error", train.update("style", _error, images, z))

    def sample(self, nets: Mapping[str, nn.Module], captions: Captions, noise: NoiseFn) -> Sample:
        """Generate images; if the first noise is the z of `invert`, in the style of the inverted image."""
        return Sample((nets["generator"](noise(self.z_dim), _sentences.for_sample(captions, nets, self.unit_text)),))

    def invert(self, nets: Mapping[str, nn.Module], images: Tensor) -> Tensor:
        z: Tensor = nets["style"](images)
        return z


def _error(net: nn.Module, images: Tensor, z: Tensor) -> Tensor:
    """Squared error, mean over samples and dimensions: the best constant guess has an error of 1."""
    return (upcast(net(images)) - upcast(z)).square().mean()


def build(config: Config, info: BuildInfo) -> Style:
    """Build the system with new weights. Raises ValueError, naming the key, if the config is invalid."""
    if "generator" not in info.sources:
        raise ValueError("uses.generator is missing; style inverts the generator of a gan_cls or dcgan stage or export")
    return Style(config, info)
