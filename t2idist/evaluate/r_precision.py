"""R-precision: how often an image retrieves its own caption from 100 (AttnGAN, arXiv:1711.10485, section 4).

Embeddings come from a system that embeds images and captions (a DAMSM), from CLIP, or from `CaptionSpace`, which no
generator was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from t2idist.contract import Batch, SupportsEmbed
from t2idist.nn.images import to_float
from t2idist.sampling.generate import eval_mode

CANDIDATES = 100
DIMENSIONS = 128
RIDGE = 1000.0
"""Regularisation for features scaled to unit variance."""


@dataclass(frozen=True)
class RPrecision:
    mean: float
    """Share of images whose own caption is retrieved first."""
    standard_error: float
    """Standard error of the mean."""
    fold_std: float
    """Standard deviation over the folds, the published "+-"."""
    n: int
    candidates: int
    """Captions that each image chose from."""
    hits: Tensor
    """(n,) 1 if the own caption is first, 1 / number of tied captions in a tie, otherwise 0."""
    margins: Tensor
    """(n,) cosine of the own caption minus the largest cosine of another candidate."""

    @property
    def chance(self) -> float:
        """R-precision of a random choice."""
        return 1.0 / self.candidates


def max_candidates(class_ids: Tensor) -> int:
    """Return how many candidates every image of classes (n,) can have: its caption and those of all other classes."""
    _, counts = torch.unique(class_ids, return_counts=True)
    return len(class_ids) - int(counts.max()) + 1


def r_precision(
    image_embeddings: Tensor,
    caption_embeddings: Tensor,
    *,
    seed: int,
    class_ids: Tensor | None = None,
    candidates: int = 100,
    folds: int = 10,
) -> RPrecision:
    """Retrieve captions by cosine, each image's own among `candidates` - 1 random captions of other images.

    All n images count; the folds are as equal as n allows (the published code drops one sample per fold). The
    mismatched captions of image i depend on (seed, i) only. Captions that tie for the first rank share it, so a
    collapsed embedding scores chance.

    Args:
        image_embeddings: (n, D).
        caption_embeddings: (n, D); row i is the caption of image i.
        seed: seed of the mismatched captions.
        class_ids: (n,); captions of the same class are not candidates for each other's images (CUB's protocol). None:
            every image is its own class.
        candidates: captions that each image chooses from.
        folds: number of folds of `fold_std`.

    Raises:
        ValueError: an image has fewer than `candidates` captions to choose from.
    """
    n = len(image_embeddings)
    if image_embeddings.shape != caption_embeddings.shape:
        raise ValueError(
            f"R-precision: image embeddings {tuple(image_embeddings.shape)} and caption embeddings "
            f"{tuple(caption_embeddings.shape)} differ in shape"
        )
    ids = np.arange(n) if class_ids is None else class_ids.cpu().numpy()
    available = max_candidates(torch.as_tensor(ids)) if n else 0
    if available < candidates:
        raise ValueError(f"R-precision of {candidates} candidates: one of {n} images has only {available}")
    negatives = _negative_rows(ids, candidates - 1, seed)
    images = functional.normalize(image_embeddings.detach().double().cpu(), dim=-1)
    captions = functional.normalize(caption_embeddings.detach().double().cpu(), dim=-1)
    own = (images * captions).sum(-1)
    # One negative at a time keeps memory at n x D.
    similarities = [(images * captions[negatives[:, k]]).sum(-1) for k in range(candidates - 1)]
    excess = torch.stack(similarities, dim=1) - own[:, None]
    # Embeddings that are equal up to rounding tie; otherwise a collapsed encoder would win or lose by the last bit.
    beaten = (excess > 1e-12).any(1)
    ties = (excess.abs() <= 1e-12).sum(1)
    hits = torch.where(beaten, 0.0, 1.0 / (1 + ties))
    return RPrecision(
        mean=float(hits.mean()),
        standard_error=float(hits.std(unbiased=True)) / n**0.5,
        fold_std=float(np.std([float(f.mean()) for f in torch.tensor_split(hits, min(folds, n))])),
        n=n,
        candidates=candidates,
        hits=hits,
        margins=-excess.max(dim=1).values,
    )


def _negative_rows(ids: np.ndarray, count: int, seed: int) -> Tensor:
    """Draw `count` rows of other classes for each image, without replacement, (n, count)."""
    rows = np.arange(len(ids))
    allowed, previous = rows, None
    chosen = np.empty((len(ids), count), dtype=np.int64)
    for i in np.argsort(ids, kind="stable"):
        if ids[i] != previous:
            allowed, previous = rows[ids != ids[i]], ids[i]
        generator = np.random.Generator(np.random.Philox(key=[seed, int(i)]))
        chosen[i] = generator.choice(allowed, size=count, replace=False)
    return torch.from_numpy(chosen)


def metric_name(score: RPrecision) -> str:
    """Return "val/r_precision" for 100 candidates; else the name holds their number ("val/r_precision_of_37")."""
    return "val/r_precision" if score.candidates == CANDIDATES else f"val/r_precision_of_{score.candidates}"


def validation_score(
    system: SupportsEmbed,
    nets: Mapping[str, nn.Module],
    batch: Batch,
    *,
    seed: int,
    device: torch.device,
    batch_size: int = 100,
) -> RPrecision | None:
    """Compute the R-precision of all images of `batch`, the val split; None if there are less than two candidates."""
    candidates = min(CANDIDATES, max_candidates(batch.class_ids))
    if candidates < 2:
        return None
    with eval_mode(nets):
        images, captions = embed_batch(system, nets, batch, device=device, batch_size=batch_size)
    return r_precision(images, captions, seed=seed, class_ids=batch.class_ids, candidates=candidates)


def embed_batch(
    system: SupportsEmbed, nets: Mapping[str, nn.Module], batch: Batch, *, device: torch.device, batch_size: int = 100
) -> tuple[Tensor, Tensor]:
    """Embed the largest images and the captions of all samples: two (n, D) float32 tensors on the host."""
    pairs: list[tuple[Tensor, Tensor]] = []
    dtype = next(weight.dtype for net in nets.values() for weight in net.parameters())
    with torch.inference_mode():
        for start in range(0, len(batch.ids), batch_size):
            rows = slice(start, start + batch_size)
            images = to_float(batch.images[-1][rows], dtype).to(device)
            captions = batch.captions[rows].to(device)
            pairs.append((system.embed_images(nets, images), system.embed_captions(nets, captions)))
    return torch.cat([a.float().cpu() for a, _ in pairs]), torch.cat([b.float().cpu() for _, b in pairs])


class CaptionSpace:
    """Embedding of captions and images that no generator was trained on, so its R-precision cannot be optimised.

    Captions are embedded by their words (tf-idf, then latent semantic analysis), images by ridge regression from an
    extractor's features to the mean of their captions' embeddings.

    Args:
        features: (n, D) features of real training images.
        captions: captions of each image.
        seed: seed of the analysis.

    Raises:
        ValueError: scikit-learn is not installed, or the captions have too few words.
    """

    def __init__(self, features: Tensor, captions: Sequence[Sequence[str]], *, seed: int) -> None:
        try:
            from sklearn.decomposition import TruncatedSVD
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.linear_model import Ridge
            from sklearn.preprocessing import StandardScaler
        except ImportError:
            raise ValueError("R-precision by features: install it with: pip install 't2idist[scores]'") from None
        self._tfidf: Any = TfidfVectorizer(sublinear_tf=True, min_df=2)
        try:
            counts = self._tfidf.fit_transform([caption for of_image in captions for caption in of_image])
        except ValueError:
            raise ValueError("R-precision by features: no word occurs in two of the training captions") from None
        dimensions = min(DIMENSIONS, counts.shape[1] - 1, counts.shape[0] - 1)
        if dimensions < 2:
            raise ValueError(f"R-precision by features: {counts.shape[1]} words in the training captions are too few")
        self._svd: Any = TruncatedSVD(dimensions, random_state=seed)
        embeddings = self._svd.fit_transform(counts)
        bounds = np.cumsum([0, *(len(of_image) for of_image in captions)])
        targets = np.add.reduceat(embeddings, bounds[:-1]) / np.diff(bounds)[:, None]
        self._mean = targets.mean(axis=0)  # removed, because it favours no caption
        self._scaler: Any = StandardScaler()
        self._regression: Any = Ridge(RIDGE).fit(self._scaler.fit_transform(features.double().numpy()), targets)

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Embed captions, (n, d)."""
        return torch.from_numpy(self._svd.transform(self._tfidf.transform(captions)) - self._mean)

    def embed_images(self, features: Tensor) -> Tensor:
        """Embed images by their features (n, D), (n, d)."""
        scaled = self._scaler.transform(features.double().numpy())
        return torch.from_numpy(self._regression.predict(scaled) - self._mean)
