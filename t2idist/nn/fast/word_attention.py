"""Fast form of the word-region similarity in losses/matching.py, with its gradients written by hand."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from t2idist.nn.fast.torch_internals import softmax, softmax_backward

MIN_NORM = 1e-8

CaptionRuns = list[tuple[int, int]]
"""Consecutive captions of equal length: how many, and how many words each has."""


def word_similarity(
    regions: Tensor, words: Tensor, lengths: Tensor, gamma_attention: float, gamma_words: float
) -> Tensor:
    """Score every image with every caption, as `losses.matching.word_similarity` does, skipping padded words.

    Args:
        regions: (G, I, D, R).
        words: (G, J, D, T).
        lengths: (G, J).

    Returns:
        (G, I, J).
    """
    groups = zip(regions, words, lengths, strict=True)
    return torch.stack([_group_similarity(*group, gamma_attention, gamma_words) for group in groups])


def _group_similarity(
    regions: Tensor, words: Tensor, lengths: Tensor, gamma_attention: float, gamma_words: float
) -> Tensor:
    """regions (I, D, R), words (J, D, T), lengths (J,) -> (I, J).

    The region context c = sum_r weights_r region_r is never formed: c.e = weights . scores, and |c|^2 comes from the
    regions' Gram matrix, which is smaller than c if there are fewer regions than dimensions.
    """
    images, dim, positions = regions.shape
    ordered, order = lengths.sort()
    caption = order.repeat_interleave(ordered)
    word = torch.arange(len(caption)) - (ordered.cumsum(0) - ordered).repeat_interleave(ordered)
    kept = words.transpose(1, 2)[caption, word]  # (P, D), the P words of all captions, shortest caption first
    scores = (kept @ regions.transpose(0, 1).reshape(dim, -1)).view(-1, images, positions)
    distinct, counts = ordered.unique_consecutive(return_counts=True)
    runs = list(zip(counts.tolist(), distinct.tolist(), strict=True))
    gram: Tensor = Gram.apply(regions)  # type: ignore[no-untyped-call]
    product, square = RegionContext.apply(scores, gram, runs, gamma_attention)  # type: ignore[no-untyped-call]
    norms = square.clamp(min=MIN_NORM**2).sqrt() * kept.norm(dim=1, keepdim=True)
    cosine = product / norms.clamp(min=MIN_NORM)
    evidence = cosine.new_full((*words.shape[::2], images), float("-inf"))
    evidence = evidence.index_put((caption, word), gamma_words * cosine)
    similarity: Tensor = evidence.logsumexp(dim=1).t()
    return similarity


class Gram(torch.autograd.Function):
    """Gram matrix of the columns, (I, D, R) -> (I, R, R); only for uses whose gradient is symmetric."""

    @staticmethod
    def forward(ctx: FunctionCtx, columns: Tensor) -> Tensor:
        ctx.save_for_backward(columns)
        return columns.transpose(1, 2) @ columns

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (columns,) = ctx.saved_tensors  # type: ignore[attr-defined]
        doubled: Tensor = 2 * (columns @ gradient)
        return doubled


class RegionContext(torch.autograd.Function):
    """c.e and |c|^2, each (P, I), of the region contexts c of P words e.

    The weights of c are softmax(gamma * a) over regions, a being the softmax of the scores over the words of a caption
    (AttnGAN, eq. 8 and 9). Inputs: scores (P, I, R), the regions' Gram matrix (I, R, R), the runs of the captions that
    the P words belong to, and gamma.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, scores: Tensor, gram: Tensor, runs: CaptionRuns, gamma: float
    ) -> tuple[Tensor, Tensor]:
        over_words = torch.empty_like(scores)
        for run_scores, out in _by_caption(runs, scores, over_words):
            softmax(run_scores, 1, False, out=out)
        weights = (gamma * over_words).softmax(dim=2)
        mixed = torch.bmm(weights.transpose(0, 1), gram).transpose(0, 1)
        ctx.save_for_backward(scores, over_words, weights, mixed)
        ctx.runs, ctx.gamma = runs, gamma  # type: ignore[attr-defined]
        return torch.linalg.vecdot(weights, scores), torch.linalg.vecdot(weights, mixed)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(  # type: ignore[override]
        ctx: FunctionCtx, product_grad: Tensor, square_grad: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None]:
        scores, over_words, weights, mixed = ctx.saved_tensors  # type: ignore[attr-defined]
        runs, gamma = ctx.runs, ctx.gamma  # type: ignore[attr-defined]
        product_grad, square_grad = product_grad.unsqueeze(2), square_grad.unsqueeze(2)
        weights_grad = (scores * (gamma * product_grad)).addcmul_(mixed, 2 * gamma * square_grad)
        over_words_grad = softmax_backward(weights_grad, weights, 2, weights.dtype)
        scores_grad = weights_grad  # reuses its memory
        for gradient, result, out in _by_caption(runs, over_words_grad, over_words, scores_grad):
            softmax_backward(gradient, result, 1, weights.dtype, grad_input=out)
        scores_grad.addcmul_(weights, product_grad)
        gram_grad = None
        if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            gram_grad = torch.bmm((weights * square_grad).permute(1, 2, 0), weights.transpose(0, 1))
        return scores_grad, gram_grad, None, None


def _by_caption(runs: CaptionRuns, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """View tensors (P, ...) as (captions, words, elements of a word), run by run."""
    sizes = [count * length for count, length in runs]
    for (count, length), *parts in zip(runs, *(tensor.split(sizes) for tensor in tensors), strict=True):
        yield [part.view(count, length, -1) for part in parts]
