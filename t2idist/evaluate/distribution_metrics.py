"""Metrics of image distributions from features and class scores: FID, KID, Inception score, precision, recall.

All take the output of an extractor (`evaluate.feature_extractors`) and compute in float64. Random draws have a seed of
their own, so the same features give the same value everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

_BATCH_ROWS = 1024


@dataclass(frozen=True)
class Moments:
    """First and second moments of n features, float64."""

    n: int
    mean: Tensor
    """(D,)"""
    covariance: Tensor
    """(D, D), with divisor n - 1."""


def moments(features: Tensor) -> Moments:
    """Compute the moments of features (n, D). Raises ValueError for fewer than 2."""
    n = len(features)
    if n < 2:
        raise ValueError(f"moments of {n} features; at least 2 are needed")
    x = features.double()
    mean = x.mean(dim=0)
    centered = x - mean
    return Moments(n, mean, centered.T @ centered / (n - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Compute the squared Frechet distance of two normal distributions (FID: Heusel et al. 2017, eq. 6).

    The square root of AB has the same trace as that of A^(1/2) B A^(1/2). The latter is symmetric, so its eigenvalues
    are real; negative ones are rounding errors.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    inner = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0)
    means = (a.mean - b.mean).square().sum()
    trace = a.covariance.diagonal().sum() + b.covariance.diagonal().sum()
    return float(means + trace - 2 * inner.sqrt().sum())


def fid(real: Tensor, fake: Tensor) -> float:
    """Compute the Frechet Inception distance of features (n, D) and (m, D)."""
    return frechet_distance(moments(real), moments(fake))


@dataclass(frozen=True)
class MeanStd:
    """Mean and standard deviation over subsets or splits."""

    mean: float
    std: float


def kid(real: Tensor, fake: Tensor, *, seed: int, subsets: int = 100, subset_size: int = 1000) -> MeanStd:
    """Compute the kernel Inception distance: unbiased squared MMD with kernel (x y / D + 1)^3, over random subsets.

    Binkowski et al. 2018, section 4. A subset is drawn without replacement. Raises ValueError if there are fewer images
    than `subset_size`.
    """
    if min(len(real), len(fake)) < subset_size:
        raise ValueError(
            f"KID of subsets of {subset_size}: {len(real)} real and {len(fake)} generated images; give more, or a "
            "smaller subset"
        )
    x, y = real.double(), fake.double()
    estimates = []
    for subset in range(subsets):
        generator = np.random.Generator(np.random.Philox(key=[seed, subset]))
        rows = [torch.from_numpy(generator.choice(len(features), subset_size, replace=False)) for features in (x, y)]
        estimates.append(_mmd(x[rows[0]], y[rows[1]]))
    values = torch.tensor(estimates, dtype=torch.float64)
    return MeanStd(float(values.mean()), float(values.std(unbiased=False)))


def _mmd(x: Tensor, y: Tensor) -> float:
    n, dim = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / dim + 1).pow(3)

    same = kernel(x, x), kernel(y, y)
    within = sum(float(k.sum() - k.diagonal().sum()) for k in same) / (n * (n - 1))
    return within - 2 * float(kernel(x, y).mean())


def inception_score(logits: Tensor, *, splits: int = 10, order: Tensor | None = None) -> MeanStd:
    """Compute the Inception score: exp of the mean divergence of an image's classes from those of its split.

    Salimans et al. 2016, section 4.

    Args:
        logits: (n, classes).
        splits: number of splits.
        order: (n,) permutation of the images before they are split. None keeps their order, in which a split misses
            classes if the images are sorted by class.

    Raises:
        ValueError: there are fewer images than splits.
    """
    n = len(logits)
    if n < splits:
        raise ValueError(f"Inception score of {splits} splits: {n} images")
    log = (logits if order is None else logits[order]).double().log_softmax(dim=1)
    bounds = [n * split // splits for split in range(splits + 1)]
    scores = []
    for start, end in pairwise(bounds):
        part = log[start:end]
        probabilities = part.exp()
        marginal = probabilities.mean(dim=0)
        negative_entropy = torch.xlogy(marginal, marginal).sum()  # xlogy: a class without images counts 0
        scores.append(float((torch.xlogy(probabilities, probabilities).sum(dim=1).mean() - negative_entropy).exp()))
    values = torch.tensor(scores, dtype=torch.float64)
    return MeanStd(float(values.mean()), float(values.std(unbiased=False)))


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020)."""

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(real: Tensor, fake: Tensor, *, k: int = 5) -> PrecisionRecall:
    """Compute precision, recall, density and coverage of features (n, D) and (m, D).

    The manifold of a set is the union of balls around its features that reach to the k-th neighbour in the set. Raises
    ValueError for k images or fewer.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall by {k} neighbours: {len(real)} real and {len(fake)} generated images")
    x, y = real.double(), fake.double()
    real_radius, fake_radius = _kth_neighbour_distances(x, k), _kth_neighbour_distances(y, k)
    in_real, covered, density = [], torch.zeros(len(x), dtype=torch.bool), 0.0
    recalled = torch.zeros(len(x), dtype=torch.bool)
    for start in range(0, len(y), _BATCH_ROWS):
        rows = slice(start, start + _BATCH_ROWS)
        distances = torch.cdist(y[rows], x)
        inside = distances < real_radius
        in_real.append(inside.any(dim=1))
        density += float(inside.sum())
        covered |= inside.any(dim=0)
        recalled |= (distances < fake_radius[rows, None]).any(dim=0)
    return PrecisionRecall(
        precision=float(torch.cat(in_real).double().mean()),
        recall=float(recalled.double().mean()),
        density=density / (k * len(y)),
        coverage=float(covered.double().mean()),
    )


def _kth_neighbour_distances(x: Tensor, k: int) -> Tensor:
    """Return the distance of each row to its k-th neighbour, (n,)."""
    parts = []
    for start in range(0, len(x), _BATCH_ROWS):
        distances = torch.cdist(x[start : start + _BATCH_ROWS], x)
        parts.append(distances.kthvalue(k + 1, dim=1).values)  # the nearest is the row itself
    return torch.cat(parts)


@dataclass(frozen=True)
class NearestNeighbours:
    """The nearest neighbour of each of n images in another set."""

    distance: Tensor
    """(n,) Euclidean distance of the features."""
    row: Tensor
    """(n,) index in the other set."""


def nearest_neighbours(features: Tensor, others: Tensor) -> NearestNeighbours:
    """Find the nearest of features (m, D) for each of features (n, D)."""
    x, y = features.double(), others.double()
    parts = [torch.cdist(x[start : start + _BATCH_ROWS], y).min(dim=1) for start in range(0, len(x), _BATCH_ROWS)]
    return NearestNeighbours(torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts]))


def bootstrap_error(measure: Callable[[Tensor], float], n: int, *, seed: int, times: int) -> float:
    """Estimate the standard error of a metric of n images.

    Args:
        measure: computes the metric from row indices (n,).
        n: number of images.
        seed: seed of the draws.
        times: number of draws of n rows with replacement.

    Returns:
        Standard deviation of the metric over the draws.
    """
    values = []
    for draw in range(times):
        generator = np.random.Generator(np.random.Philox(key=[seed, draw]))
        values.append(measure(torch.from_numpy(generator.integers(0, n, n))))
    return float(torch.tensor(values, dtype=torch.float64).std(unbiased=True))
