"""R-precision: how often a picture picks its own caption out of 100 (AttnGAN, arXiv:1711.10485, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class RPrecision:
    """mean: share of pictures whose own caption comes first. standard_error: of that mean. fold_std: standard deviation
    over the folds, the published "+-". n: pictures. candidates: captions that each picture chose from. chance: what a
    blind choice scores. hits: (n,) 1 where the own caption comes first, a share of 1 in a tie, 0 elsewhere. margins:
    (n,) the cosine of the own caption above that of the nearest other."""

    mean: float
    standard_error: float
    fold_std: float
    n: int
    candidates: int
    hits: Tensor
    margins: Tensor

    @property
    def chance(self) -> float:
        return 1.0 / self.candidates


def most_candidates(class_ids: Tensor) -> int:
    """The most candidates that every picture of classes (n,) can be given: its own caption and all of other classes."""
    _, counts = torch.unique(class_ids, return_counts=True)
    return len(class_ids) - int(counts.max()) + 1


def r_precision(
    image_codes: Tensor,
    caption_codes: Tensor,
    *,
    seed: int,
    class_ids: Tensor | None = None,
    candidates: int = 100,
    folds: int = 10,
) -> RPrecision:
    """Each picture's cosine with its own caption against those of `candidates` - 1 random captions of other pictures.

    image_codes, caption_codes: (n, D); row i belongs to picture i. class_ids: (n,): captions of the same class are not
    used against each other (CUB's protocol); None: every picture is a class. All n samples count; the ten folds are as
    equal as n allows (the public implementation drops one sample a fold). Which captions picture i meets depends on
    (seed, i) only. A tie at the top counts as 1 / number of tied captions, so codes that are all equal score chance.
    Raises ValueError where some picture has too few captions to choose from.
    """
    n = len(image_codes)
    if image_codes.shape != caption_codes.shape:
        raise ValueError(
            f"R-precision: image codes {tuple(image_codes.shape)} and caption codes {tuple(caption_codes.shape)}"
        )
    ids = np.arange(n) if class_ids is None else class_ids.cpu().numpy()
    most = most_candidates(torch.as_tensor(ids)) if n else 0
    if most < candidates:
        raise ValueError(f"R-precision of {candidates} candidates: {n} pictures give one of them only {most}")
    others = _others(ids, candidates - 1, seed)
    images = functional.normalize(image_codes.detach().double().cpu(), dim=-1)
    captions = functional.normalize(caption_codes.detach().double().cpu(), dim=-1)
    own = (images * captions).sum(-1)
    scores = torch.stack([_rivals(images, captions, others, k) for k in range(candidates - 1)], dim=1)
    # Codes that are equal up to rounding tie: without this, a collapsed encoder would win or lose by the last bit.
    margin = scores - own[:, None]
    beaten = (margin > 1e-12).any(1)
    ties = (margin.abs() <= 1e-12).sum(1)
    hits = torch.where(beaten, 0.0, 1.0 / (1 + ties))
    return RPrecision(
        mean=float(hits.mean()),
        standard_error=float(hits.std(unbiased=True)) / n**0.5,
        fold_std=float(np.std([float(f.mean()) for f in torch.tensor_split(hits, min(folds, n))])),
        n=n,
        candidates=candidates,
        hits=hits,
        margins=-margin.max(dim=1).values,
    )


def _rivals(images: Tensor, captions: Tensor, others: Tensor, k: int) -> Tensor:
    """(n,): each picture's cosine with its k-th rival caption; one rival at a time keeps memory at n x D."""
    return (images * captions[others[:, k]]).sum(-1)


def _others(ids: np.ndarray, count: int, seed: int) -> Tensor:
    """(n, count) rows of other classes, without repetition."""
    rows = np.arange(len(ids))
    allowed, previous = rows, None
    chosen = np.empty((len(ids), count), dtype=np.int64)
    for i in np.argsort(ids, kind="stable"):
        if ids[i] != previous:
            allowed, previous = rows[ids != ids[i]], ids[i]
        generator = np.random.Generator(np.random.Philox(key=[seed, int(i)]))
        chosen[i] = generator.choice(allowed, size=count, replace=False)
    return torch.from_numpy(chosen)
