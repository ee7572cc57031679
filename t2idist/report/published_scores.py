"""Scores that were published for these models, each with its source. None compares with one of another protocol.

What was only quoted from memory is not here. FID of "CUB" and "COCO" is of 256 px pictures; IS of CUB by an Inception
that was fine-tuned on birds, of COCO by ImageNet's.
"""

from __future__ import annotations

from dataclasses import dataclass

_DM_GAN = "DM-GAN README"
_TISE = "TISE, one code for all (arXiv 2112.01398)"
_ATTNGAN = "tables of the AttnGAN and StackGAN papers"


@dataclass(frozen=True)
class Published:
    """A score as its source gives it. by: how it was measured, where the source says so."""

    data: str
    model: str
    metric: str
    value: str
    by: str
    source: str


PUBLISHED = (
    Published("CUB", "GAN-INT-CLS", "IS", "2.88 ± .04", "", _ATTNGAN),
    Published("CUB", "StackGAN", "IS", "3.70 ± .04", "", "StackGAN-v2 README"),
    Published("CUB", "StackGAN", "FID", "51.89", "", "StackGAN-v2 README"),
    Published("CUB", "StackGAN++", "IS", "4.04 ± .05", "", "StackGAN-v2 README"),
    Published("CUB", "StackGAN++", "FID", "15.30", "", "StackGAN-v2 README"),
    Published("CUB", "StackGAN++", "FID", "27.40", "", _TISE),
    Published("CUB", "AttnGAN", "IS", "4.36 ± .03", "", _DM_GAN),
    Published("CUB", "AttnGAN", "FID", "23.98", "PyTorch's Inception", _DM_GAN),
    Published("CUB", "AttnGAN", "FID", "14.01", "TensorFlow's Inception, the same pictures", _DM_GAN),
    Published("CUB", "AttnGAN", "FID", "24.27", "", _TISE),
    Published("CUB", "AttnGAN", "R-precision", "67.82 ± 4.43 %", "DAMSM", _DM_GAN),
    Published("CUB", "AttnGAN", "R-precision", "65.30 %", "DAMSM", _TISE),
    Published("CUB", "real photographs", "R-precision", "22.57 %", "DAMSM", _TISE),
    Published("CUB", "a model made to cheat", "R-precision", "84.63 %", "DAMSM", _TISE),
    Published("COCO", "GAN-INT-CLS", "IS", "7.88 ± .07", "", _ATTNGAN),
    Published("COCO", "StackGAN", "IS", "8.45 ± .03", "", _ATTNGAN),
    Published("COCO", "StackGAN", "FID", "74.05", "", "StackGAN-v2 README"),
    Published("COCO", "StackGAN", "FID", "53.44", "", _TISE),
    Published("COCO", "AttnGAN", "IS", "25.89 ± .47", "", _DM_GAN),
    Published("COCO", "AttnGAN", "FID", "35.49", "PyTorch's Inception", _DM_GAN),
    Published("COCO", "AttnGAN", "FID", "29.53", "TensorFlow's Inception, the same pictures", _DM_GAN),
    Published("COCO", "AttnGAN", "FID", "36.90", "", _TISE),
    Published("COCO", "AttnGAN", "R-precision", "85.47 ± 3.69 %", "DAMSM", _DM_GAN),
    Published("COCO", "AttnGAN", "R-precision", "50.56 %", "CLIP", _TISE),
    Published("COCO", "real photographs", "R-precision", "83.54 %", "CLIP", _TISE),
    Published("COCO", "real photographs", "FID", "2.62", "one half against the other", _TISE),
    Published("Oxford-102", "StackGAN", "FID", "55.28", "", "StackGAN-v2 README"),
)
