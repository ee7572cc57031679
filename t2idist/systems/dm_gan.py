"""DM-GAN: AttnGAN's tree with a dynamic memory in place of attention (Zhu et al. 2019).

The training step is that of `_tree_gan.AttentionGan`, the memory that of `nn.tree.MemoryStage`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from t2idist.contract import BuildInfo
from t2idist.nn.tree import MemoryStage
from t2idist.systems._tree_gan import AttentionConfig, AttentionGan, damsm_encoders


@dataclass(frozen=True)
class Config(AttentionConfig):
    """Defaults: the paper's settings for CUB, else the released ones."""

    generator_width: int = 64
    """N_r, the dimension of image features (section 3.5); that of the memory, N_m, is twice as large."""
    discriminator_width: int = 32
    """DF_DIM of the released settings."""
    residuals: int = 2
    """R_NUM of the released settings; 3 for COCO."""
    discriminator_norm: Literal["batch", "group", "spectral", "none"] = "spectral"
    """Section 3.5: spectral normalisation of every convolution of the discriminators."""
    kl_weight: float = 1.0
    """lambda_1, section 3.5."""
    damsm_weight: float = 5.0
    """lambda_2, section 3.5: 5 for CUB, 50 for COCO."""
    ema_half_life_images: float = 6928.0
    """Released code: 0.999 for each step of 10 images."""


class DmGan(AttentionGan):
    """The system. Slot "damsm": its text and image encoder. Exports: "generator", "text"."""

    def __init__(self, config: Config, info: BuildInfo) -> None:
        super().__init__(config, info.sources["damsm"]["config"]["embedding_dim"], stage=MemoryStage)
        self.frozen = damsm_encoders(info)


def build(config: Config, info: BuildInfo) -> DmGan:
    """Build the system with new weights. Raises ValueError, naming the key, if the config is invalid."""
    if "damsm" not in info.sources:
        raise ValueError("uses.damsm is missing; dm_gan takes its text and image encoder from a damsm stage or export")
    info.require_pairs("dm_gan")
    return DmGan(config, info)
