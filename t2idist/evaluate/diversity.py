"""Whether a generator collapses: how far pictures of one caption are from each other, as a network sees them."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from t2idist.evaluate.feature_extractors import Layers

WITHIN, BETWEEN = "val/diversity", "val/diversity_of_captions"
COLLAPSED = 0.1
"""Share of the largest diversity so far below which it is said."""


class Diversity:
    """Of grids of captions by noise draws, with a distance like LPIPS's (Zhang et al. 2018, eq. 1, all weights 1).

    The network is EfficientNet-Lite0. Raises ValueError where that is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        self._layers = Layers(device)
        self._largest = 0.0

    def __call__(self, images: Tensor, columns: int) -> dict[str, float]:
        """images (R * columns, 3, S, S) in [-1, 1], a row of the same caption -> mean distances of two pictures.

        "val/diversity": two draws of one caption. "val/diversity_of_captions": two captions with the same noise.
        """
        maps, places = self._layers(images), torch.arange(len(images)).view(-1, columns)
        same_caption = [pair for row in places.tolist() for pair in combinations(row, 2)]
        same_noise = [pair for column in places.T.tolist() for pair in combinations(column, 2)]
        found = {}
        for name, pairs in ((WITHIN, same_caption), (BETWEEN, same_noise)):
            if pairs:
                found[name] = _mean_distance(maps, pairs)
        return found

    def collapsed(self, values: dict[str, float]) -> bool:
        """Whether draws of one caption have come to differ by less than a tenth of what they once did."""
        now = values.get(WITHIN, 0.0)
        self._largest = max(self._largest, now)
        return now < COLLAPSED * self._largest


def _mean_distance(maps: list[Tensor], pairs: list[tuple[int, int]]) -> float:
    first, second = (list(side) for side in zip(*pairs, strict=True))
    by_layer = [(layer[first] - layer[second]).square().sum(dim=1).mean() for layer in maps]
    return float(torch.stack(by_layer).mean())
