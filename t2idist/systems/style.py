"""The style encoder of GAN-CLS: it inverts a trained generator, from a picture to its noise (Reed et al. 2016)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from t2idist.contract import Adam, Batch, BuildInfo, Captions, Frozen, NoiseFn, Role, Sample, Train
from t2idist.nn.dcgan import generator_from_export, trunk
from t2idist.nn.image_encoders import resize
from t2idist.nn.init import normal_
from t2idist.nn.precision import upcast
from t2idist.nn.text_encoders import sentence_encoder
from t2idist.systems import _sentences


@dataclass(frozen=True)
class Config:
    """The paper gives no layers: they are those of GAN-CLS's plain discriminator, and its learning rate.

    width: channels after the first layer. ema_half_life_images: none: no average.
    """

    width: int = 64
    lr: float = 2e-4
    ema_half_life_images: float | None = None


class StyleEncoder(nn.Module):
    """Pictures (N, 3, S, S) in [-1, 1] -> z (N, z_dim)."""

    def __init__(self, width: int, image_size: int, z_dim: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.trunk, channels = trunk(width, image_size)
        self.code = nn.Linear(channels * 16, z_dim)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.code(self.trunk(resize(images, self.image_size)).flatten(1))
        return out


class Style:
    """The system; slot "generator" gives what it inverts. Its export holds "style", "generator" and, if any, "text"."""

    def __init__(self, config: Config, plan: BuildInfo) -> None:
        source = plan.sources["generator"]
        given = source["plan"]["vector_dim"]
        encoder, text_dim = sentence_encoder(source["plan"]["sources"], plan.vocabulary_size, given)
        if encoder is None and plan.extent.vector_dim != given:
            raise ValueError(
                f"uses.generator: it was trained on sentence vectors of {given} numbers and this data's have "
                f"{plan.extent.vector_dim}; give the data that it was trained on"
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
        """L_style (section 4.4, eq. 6): the noise of generated pictures; the real ones are not looked at."""
        z = train.noise(self.z_dim)
        text = _sentences.for_step(batch.captions, train, self.frozen, self.unit_text)
        with torch.no_grad(), train.frozen("generator") as generator:
            images = generator(z, text)
        train.report("style/squared_error", train.update("style", _error, images, z))

    def sample(self, nets: Mapping[str, nn.Module], captions: Captions, draw: NoiseFn) -> Sample:
        """What the generator draws; with z of `invert` as the first draw, in the style of another picture."""
        return Sample((nets["generator"](draw(self.z_dim), _sentences.for_sample(captions, nets, self.unit_text)),))

    def invert(self, nets: Mapping[str, nn.Module], images: Tensor) -> Tensor:
        z: Tensor = nets["style"](images)
        return z


def _error(net: nn.Module, images: Tensor, z: Tensor) -> Tensor:
    """Mean over samples and dimensions, so that the best blind guess scores 1."""
    return (upcast(net(images)) - upcast(z)).square().mean()


def build(config: Config, plan: BuildInfo) -> Style:
    """The system with newly drawn weights. Raises ValueError, naming the key, where the config cannot be had."""
    if "generator" not in plan.sources:
        raise ValueError("uses.generator is missing; style inverts the generator of a gan_cls or dcgan stage or export")
    return Style(config, plan)
