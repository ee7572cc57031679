"""AttnGAN: word attention in a tree of generators, and a matching loss by a trained DAMSM (Xu et al. 2018).

The training step, and the matching loss (section 3.2, eq. 3 and 14), are those of `_tree_gan.AttentionGan`.
"""

from __future__ import annotations

from dataclasses import dataclass

from t2idist.contract import BuildInfo
from t2idist.systems._tree_gan import AttentionConfig, AttentionGan, damsm_encoders


@dataclass(frozen=True)
class Config(AttentionConfig):
    """Defaults: the paper's settings for CUB, else the released ones."""

    generator_width: int = 32
    """GF_DIM; 48 for COCO."""
    discriminator_width: int = 64
    """DF_DIM; 96 for COCO."""
    residuals: int = 2
    """R_NUM; 3 for COCO."""
    kl_weight: float = 1.0
    """Released code; the paper gives none."""
    damsm_weight: float = 5.0
    """lambda, section 4: 5 for CUB, 50 for COCO."""
    gamma_attention: float = 5.0
    """Section 4; 4 in the released settings."""
    ema_half_life_images: float = 13856.0
    """Released code: 0.999 for each step of 20 images; 9699 for COCO's 14."""
    single_output: bool = False
    """AttnDCGAN, the baseline of section 4.2; with residuals 0 and damsm_weight 1 as released."""


class AttnGan(AttentionGan):
    """The system. Slot "damsm": its text and image encoder. Exports: "generator", "text"."""

    def __init__(self, config: Config, info: BuildInfo) -> None:
        text_dim = info.sources["damsm"]["config"]["embedding_dim"]
        super().__init__(config, text_dim, single_output=config.single_output)
        self.frozen = damsm_encoders(info)


def build(config: Config, info: BuildInfo) -> AttnGan:
    """Build the system with new weights. Raises ValueError, naming the key, if the config is invalid."""
    if "damsm" not in info.sources:
        raise ValueError("uses.damsm is missing; attngan takes its text and image encoder from a damsm stage or export")
    info.require_pairs("attngan")
    return AttnGan(config, info)
