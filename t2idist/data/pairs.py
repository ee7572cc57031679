"""Pairs of images: stored side by side, or made of an image and its outlines."""

from __future__ import annotations

from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from t2idist.data.samples import DecodedImage
from t2idist.data.shards import Dataset

OUTLINE_STEP = 24
"""Smallest difference of a colour channel between neighbours, of 255, that is an outline."""
_WHITE, _BLACK = 0xFFFFFF, 0


class Pairs(Enum):
    """How a stored image becomes two."""

    STORED = auto()
    """It is two images of equal size, side by side."""
    OUTLINES = auto()
    """It is the second one; its outlines are the first one."""

    @classmethod
    def of(cls, dataset: Dataset) -> Pairs | None:
        """Return how a data set's images become two (None: they are single)."""
        if dataset.stored_pairs:
            return cls.STORED
        return cls.OUTLINES if dataset.outlines else None


def halves(image: DecodedImage) -> tuple[DecodedImage, DecodedImage]:
    """Return the left and the right half of an image. Raises ValueError, with the reason, if its width is odd."""
    width, height = image.size
    if width % 2:
        raise ValueError(f"is no pair of images of equal size: it is {width} pixels wide")
    middle = width // 2
    left, right = image.pixels[:, :middle], image.pixels[:, middle:]
    return DecodedImage(left, (middle, height), image.vectors), DecodedImage(right, (middle, height), image.vectors)


def outlines(pixels: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Draw the outlines of an image (H, W): black where it differs from its right or lower neighbour, else white."""
    colours = pixels.view(np.uint8).reshape(*pixels.shape, 4)[..., :3].astype(np.int16)
    is_outline = np.zeros(pixels.shape, dtype=np.bool_)
    is_outline[:, :-1] = np.abs(np.diff(colours, axis=1)).max(axis=2) >= OUTLINE_STEP
    is_outline[:-1] |= np.abs(np.diff(colours, axis=0)).max(axis=2) >= OUTLINE_STEP
    return np.where(is_outline, np.uint32(_BLACK), np.uint32(_WHITE))
