"""A space of captions and pictures that no generator was trained on, for an R-precision that cannot be learnt.

Captions lie in it by their words (tf-idf, then latent semantic analysis), pictures by ridge regression from an
extractor's features to the mean of their captions; both are fitted on real training pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

DIMENSIONS = 128
RIDGE = 1000.0
"""Of features scaled to unit variance."""


class CaptionSpace:
    """Fitted on features (n, D) of real pictures and the captions of each.

    Raises ValueError where scikit-learn is not installed, or the captions have too few words.
    """

    def __init__(self, features: Tensor, captions: Sequence[Sequence[str]], *, seed: int) -> None:
        try:
            from sklearn.decomposition import TruncatedSVD
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.linear_model import Ridge
            from sklearn.preprocessing import StandardScaler
        except ImportError:
            raise ValueError("R-precision by features: install it with: pip install t2idist[scores]") from None
        said = [caption for of_picture in captions for caption in of_picture]
        self._words: Any = TfidfVectorizer(sublinear_tf=True, min_df=2)
        try:
            counted = self._words.fit_transform(said)
        except ValueError:
            raise ValueError("R-precision by features: no word stands in two of the training captions") from None
        dimensions = min(DIMENSIONS, counted.shape[1] - 1, counted.shape[0] - 1)
        if dimensions < 2:
            raise ValueError(f"R-precision by features: {counted.shape[1]} words in the training captions are too few")
        self._meaning: Any = TruncatedSVD(dimensions, random_state=seed)
        places = self._meaning.fit_transform(counted)
        bounds = np.cumsum([0, *(len(of_picture) for of_picture in captions)])
        targets = np.add.reduceat(places, bounds[:-1]) / np.diff(bounds)[:, None]
        self._centre = targets.mean(axis=0)  # what all captions say is no reason to prefer one
        self._scale: Any = StandardScaler()
        self._regression: Any = Ridge(RIDGE).fit(self._scale.fit_transform(features.double().numpy()), targets)

    def read(self, captions: Sequence[str]) -> Tensor:
        """(n, d) of captions."""
        return torch.from_numpy(self._meaning.transform(self._words.transform(captions)) - self._centre)

    def place(self, features: Tensor) -> Tensor:
        """(n, d) of pictures by their features (n, D)."""
        scaled = self._scale.transform(features.double().numpy())
        return torch.from_numpy(self._regression.predict(scaled) - self._centre)
