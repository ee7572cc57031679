"""Detect mode collapse by the perceptual distance of images that are generated from one caption."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from t2idist.evaluate.feature_extractors import PerceptualFeatures

WITHIN, BETWEEN = "val/diversity", "val/diversity_of_captions"
COLLAPSE_THRESHOLD = 0.1
"""Collapse is reported below this share of the largest diversity so far."""


class Diversity:
    """Measures the diversity of a grid by a distance like LPIPS (Zhang et al. 2018, eq. 1, with all weights 1).

    The network is EfficientNet-Lite0. Raises ValueError if it is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        self._features = PerceptualFeatures(device)
        self._largest = 0.0

    def __call__(self, images: Tensor, columns: int) -> dict[str, float]:
        """Compute the mean distances of two images of a grid.

        Args:
            images: (R * columns, 3, S, S) in [-1, 1], one caption per row and one noise per column.
            columns: columns of the grid.

        Returns:
            "val/diversity": of two images of one caption. "val/diversity_of_captions": of two captions with the same
            noise. A distance without pairs is left out.
        """
        maps, indices = self._features(images), torch.arange(len(images)).view(-1, columns)
        same_caption = [pair for row in indices.tolist() for pair in combinations(row, 2)]
        same_noise = [pair for column in indices.T.tolist() for pair in combinations(column, 2)]
        named_pairs = {WITHIN: same_caption, BETWEEN: same_noise}
        return {name: _mean_distance(maps, pairs) for name, pairs in named_pairs.items() if pairs}

    def collapsed(self, values: dict[str, float]) -> bool:
        """Return whether the diversity within captions is below a tenth of its largest value so far."""
        diversity = values.get(WITHIN, 0.0)
        self._largest = max(self._largest, diversity)
        return diversity < COLLAPSE_THRESHOLD * self._largest


def _mean_distance(maps: list[Tensor], pairs: list[tuple[int, int]]) -> float:
    first, second = (list(side) for side in zip(*pairs, strict=True))
    by_layer = [(layer[first] - layer[second]).square().sum(dim=1).mean() for layer in maps]
    return float(torch.stack(by_layer).mean())
