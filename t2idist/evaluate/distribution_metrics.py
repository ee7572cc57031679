"""Scores of pictures by their features and class scores: FID, KID, Inception score, precision to coverage.

All take what an extractor gave (see `evaluate.extractors`) and compute in float64. Where a score draws at random, it
does so by a seed of its own, so that the same features give the same number anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Moments:
    """Of n features: mean (D,) and covariance (D, D) with divisor n - 1, float64."""

    n: int
    mean: Tensor
    covariance: Tensor


def moments(features: Tensor) -> Moments:
    """Of features (n, D). Raises ValueError for fewer than 2."""
    n = len(features)
    if n < 2:
        raise ValueError(f"moments of {n} features; at least 2 are needed")
    x = features.double()
    mean = x.mean(dim=0)
    centred = x - mean
    return Moments(n, mean, centred.T @ centred / (n - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared Frechet distance of two normal distributions (FID: Heusel et al. 2017, eq. 6).

    The trace of the root of the product is that of the root of A^(1/2) B A^(1/2), which is symmetric: its eigenvalues
    are real, and those below zero are rounding.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    inner = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0)
    apart = (a.mean - b.mean).square().sum()
    trace = a.covariance.diagonal().sum() + b.covariance.diagonal().sum()
    return float(apart + trace - 2 * inner.sqrt().sum())


def fid(real: Tensor, fake: Tensor) -> float:
    """Of features (n, D) and (m, D)."""
    return frechet_distance(moments(real), moments(fake))


@dataclass(frozen=True)
class Spread:
    """A mean, and the standard deviation over subsets or splits."""

    mean: float
    std: float


def kid(real: Tensor, fake: Tensor, *, seed: int, subsets: int = 100, subset_size: int = 1000) -> Spread:
    """Kernel distance (Binkowski et al. 2018, section 4): unbiased squared MMD, kernel (x y / D + 1)^3, over subsets.

    Subsets are drawn without repetition inside one. Raises ValueError where there are too few pictures for one.
    """
    if min(len(real), len(fake)) < subset_size:
        raise ValueError(
            f"KID of subsets of {subset_size}: {len(real)} real and {len(fake)} generated pictures; give more, or a "
            "smaller subset"
        )
    x, y = real.double(), fake.double()
    found = []
    for subset in range(subsets):
        generator = np.random.Generator(np.random.Philox(key=[seed, subset]))
        rows = [torch.from_numpy(generator.choice(len(all_), subset_size, replace=False)) for all_ in (x, y)]
        found.append(_mmd(x[rows[0]], y[rows[1]]))
    values = torch.tensor(found, dtype=torch.float64)
    return Spread(float(values.mean()), float(values.std(unbiased=False)))


def _mmd(x: Tensor, y: Tensor) -> float:
    n, dim = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / dim + 1).pow(3)

    own = kernel(x, x), kernel(y, y)
    within = sum(float(k.sum() - k.diagonal().sum()) for k in own) / (n * (n - 1))
    return within - 2 * float(kernel(x, y).mean())


def inception_score(logits: Tensor, *, splits: int = 10, order: Tensor | None = None) -> Spread:
    """exp of the mean divergence between a picture's classes and those of its split (Salimans et al. 2016, section 4).

    logits: (n, classes). order: (n,) in which pictures go into splits (None: as they come; where their order follows
    their classes, a split would miss most of them). Raises ValueError for fewer pictures than splits.
    """
    n = len(logits)
    if n < splits:
        raise ValueError(f"Inception score of {splits} splits: {n} pictures")
    log = (logits if order is None else logits[order]).double().log_softmax(dim=1)
    bounds = [n * split // splits for split in range(splits + 1)]
    scores = []
    for start, end in pairwise(bounds):
        part = log[start:end]
        sure = part.exp()
        together = torch.xlogy(sure.mean(dim=0), sure.mean(dim=0)).sum()  # classes that nobody has count nothing
        scores.append(float((torch.xlogy(sure, sure).sum(dim=1).mean() - together).exp()))
    values = torch.tensor(scores, dtype=torch.float64)
    return Spread(float(values.mean()), float(values.std(unbiased=False)))


@dataclass(frozen=True)
class Neighbours:
    """precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020)."""

    precision: float
    recall: float
    density: float
    coverage: float


def neighbours(real: Tensor, fake: Tensor, *, nearest: int = 5) -> Neighbours:
    """By balls around features (n, D) and (m, D) that reach to the `nearest`-th neighbour of their own kind.

    Raises ValueError where there are not more pictures than that.
    """
    if min(len(real), len(fake)) <= nearest:
        raise ValueError(
            f"precision and recall by {nearest} neighbours: {len(real)} real and {len(fake)} generated pictures"
        )
    x, y = real.double(), fake.double()
    real_radius, fake_radius = _radii(x, nearest), _radii(y, nearest)
    in_real, covered, density = [], torch.zeros(len(x), dtype=torch.bool), 0.0
    recalled = torch.zeros(len(x), dtype=torch.bool)
    for start in range(0, len(y), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        distances = torch.cdist(y[rows], x)
        inside = distances < real_radius
        in_real.append(inside.any(dim=1))
        density += float(inside.sum())
        covered |= inside.any(dim=0)
        recalled |= (distances < fake_radius[rows, None]).any(dim=0)
    return Neighbours(
        precision=float(torch.cat(in_real).double().mean()),
        recall=float(recalled.double().mean()),
        density=density / (nearest * len(y)),
        coverage=float(covered.double().mean()),
    )


def _radii(x: Tensor, nearest: int) -> Tensor:
    """(n,): the distance of each to its `nearest`-th neighbour."""
    parts = []
    for start in range(0, len(x), _ROWS_AT_ONCE):
        distances = torch.cdist(x[start : start + _ROWS_AT_ONCE], x)
        parts.append(distances.kthvalue(nearest + 1, dim=1).values)  # the first is itself
    return torch.cat(parts)


@dataclass(frozen=True)
class Nearest:
    """Of each of n pictures: the distance to its nearest among others (n,), and which one that is (n,)."""

    distance: Tensor
    row: Tensor


def nearest(features: Tensor, among: Tensor) -> Nearest:
    """By the Euclidean distance of features (n, D) and (m, D)."""
    x, y = features.double(), among.double()
    parts = [torch.cdist(x[start : start + _ROWS_AT_ONCE], y).min(dim=1) for start in range(0, len(x), _ROWS_AT_ONCE)]
    return Nearest(torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts]))


def bootstrap_error(measure: Callable[[Tensor], float], n: int, *, seed: int, times: int) -> float:
    """Standard error of a measure of n pictures: its deviation over `times` draws of n rows with repetition."""
    found = []
    for time in range(times):
        generator = np.random.Generator(np.random.Philox(key=[seed, time]))
        found.append(measure(torch.from_numpy(generator.integers(0, n, n))))
    return float(torch.tensor(found, dtype=torch.float64).std(unbiased=True))
