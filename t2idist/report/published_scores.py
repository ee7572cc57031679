"""Published scores of these models, each with its source. Scores of different protocols are not comparable.

Scores without a source at hand are left out. FID of "CUB" and "COCO" is for 256 px images; IS of CUB uses an Inception
network fine-tuned on birds, IS of COCO the ImageNet one.
"""

from __future__ import annotations

from dataclasses import dataclass

_DM_GAN = "DM-GAN README"
_DF_GAN = "DF-GAN README"
_TISE = "TISE, one code for all (arXiv 2112.01398)"
_ATTNGAN = "tables of the AttnGAN and StackGAN papers"


@dataclass(frozen=True)
class PublishedScore:
    """A score as its source reports it."""

    data: str
    model: str
    metric: str
    value: str
    measured_by: str
    """How it was measured, if the source says so."""
    source: str


PUBLISHED_SCORES = (
    PublishedScore("CUB", "GAN-INT-CLS", "IS", "2.88 ± .04", "", _ATTNGAN),
    PublishedScore("CUB", "StackGAN", "IS", "3.70 ± .04", "", "StackGAN-v2 README"),
    PublishedScore("CUB", "StackGAN", "FID", "51.89", "", "StackGAN-v2 README"),
    PublishedScore("CUB", "StackGAN++", "IS", "4.04 ± .05", "", "StackGAN-v2 README"),
    PublishedScore("CUB", "StackGAN++", "FID", "15.30", "", "StackGAN-v2 README"),
    PublishedScore("CUB", "StackGAN++", "FID", "27.40", "", _TISE),
    PublishedScore("CUB", "AttnGAN", "IS", "4.36 ± .03", "", _DM_GAN),
    PublishedScore("CUB", "AttnGAN", "FID", "23.98", "PyTorch's Inception", _DM_GAN),
    PublishedScore("CUB", "AttnGAN", "FID", "14.01", "TensorFlow's Inception, the same images", _DM_GAN),
    PublishedScore("CUB", "AttnGAN", "FID", "24.27", "", _TISE),
    PublishedScore("CUB", "AttnGAN", "R-precision", "67.82 ± 4.43 %", "DAMSM", _DM_GAN),
    PublishedScore("CUB", "AttnGAN", "R-precision", "65.30 %", "DAMSM", _TISE),
    PublishedScore("CUB", "real photographs", "R-precision", "22.57 %", "DAMSM", _TISE),
    PublishedScore("CUB", "a model made to cheat", "R-precision", "84.63 %", "DAMSM", _TISE),
    PublishedScore("CUB", "DM-GAN", "IS", "4.75 ± .07", "", _DM_GAN),
    PublishedScore("CUB", "DM-GAN", "FID", "16.09", "PyTorch's Inception", _DM_GAN),
    PublishedScore("CUB", "DM-GAN", "FID", "15.34", "PyTorch's Inception, released weights", _DM_GAN),
    PublishedScore("CUB", "DM-GAN", "R-precision", "72.31 ± .91 %", "DAMSM", _DM_GAN),
    PublishedScore("CUB", "DF-GAN", "FID", "14.81", "", _DF_GAN),
    PublishedScore("CUB", "DF-GAN", "FID", "12.10", "released weights", _DF_GAN),
    PublishedScore("COCO", "GAN-INT-CLS", "IS", "7.88 ± .07", "", _ATTNGAN),
    PublishedScore("COCO", "StackGAN", "IS", "8.45 ± .03", "", _ATTNGAN),
    PublishedScore("COCO", "StackGAN", "FID", "74.05", "", "StackGAN-v2 README"),
    PublishedScore("COCO", "StackGAN", "FID", "53.44", "", _TISE),
    PublishedScore("COCO", "AttnGAN", "IS", "25.89 ± .47", "", _DM_GAN),
    PublishedScore("COCO", "AttnGAN", "FID", "35.49", "PyTorch's Inception", _DM_GAN),
    PublishedScore("COCO", "AttnGAN", "FID", "29.53", "TensorFlow's Inception, the same images", _DM_GAN),
    PublishedScore("COCO", "AttnGAN", "FID", "36.90", "", _TISE),
    PublishedScore("COCO", "AttnGAN", "R-precision", "85.47 ± 3.69 %", "DAMSM", _DM_GAN),
    PublishedScore("COCO", "AttnGAN", "R-precision", "50.56 %", "CLIP", _TISE),
    PublishedScore("COCO", "DM-GAN", "IS", "30.49 ± .57", "", _DM_GAN),
    PublishedScore("COCO", "DM-GAN", "FID", "32.64", "PyTorch's Inception", _DM_GAN),
    PublishedScore("COCO", "DM-GAN", "FID", "26.55", "PyTorch's Inception, released weights", _DM_GAN),
    PublishedScore("COCO", "DM-GAN", "R-precision", "88.56 ± .28 %", "DAMSM", _DM_GAN),
    PublishedScore("COCO", "DF-GAN", "FID", "19.32", "", _DF_GAN),
    PublishedScore("COCO", "DF-GAN", "FID", "15.41", "released weights", _DF_GAN),
    PublishedScore("COCO", "real photographs", "R-precision", "83.54 %", "CLIP", _TISE),
    PublishedScore("COCO", "real photographs", "FID", "2.62", "one half against the other", _TISE),
    PublishedScore("Oxford-102", "StackGAN", "FID", "55.28", "", "StackGAN-v2 README"),
)
