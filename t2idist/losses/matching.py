"""What couples pictures and captions: mismatched pairs, the DAMSM's losses and Reed's, inside each group of samples.

N samples are ``groups`` x B, those of one group contiguous; nothing crosses a group's border, so several groups in one
call give the mean of the losses that each would give alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from t2idist.nn.precision import upcast, no_autocast

MIN_NORM = 1e-8


@dataclass(frozen=True)
class WrongPairs:
    """Mismatches: picture n of the batch meets caption ``caption[n]``.

    keep (N,): false where both are of one class, which makes no mismatch.
    """

    caption: Tensor
    keep: Tensor


def wrong_pairs(class_ids: Tensor, groups: int) -> WrongPairs:
    """Mismatched pairs of N samples: every picture with the caption of the next sample of its group, round the end.

    So every sample serves once as picture and once as caption, BatchNorm sees whole groups, and a pair of one class,
    whose caption may well be true, is marked to be left out. (AttnGAN's released code gives the last picture no
    partner and takes pairs of one class for mismatches.) Raises ValueError where a group has one sample.
    """
    size = class_ids.shape[0] // groups
    if size < 2:
        raise ValueError(f"group_size is {size}; a mismatched pair needs at least 2 samples in a group")
    caption = torch.arange(class_ids.shape[0], device=class_ids.device).view(groups, size).roll(-1, dims=1).reshape(-1)
    return WrongPairs(caption, class_ids != class_ids[caption])


@dataclass(frozen=True)
class Gammas:
    """AttnGAN's sharpness of attention over regions, of the words' maximum, and of the ranking (eq. 8, 10, 11)."""

    attention: float = 5.0
    words: float = 5.0
    ranking: float = 10.0


@dataclass(frozen=True)
class RankingLosses:
    """Losses of ranking inside a group: the caption of each picture, the picture of each caption."""

    caption_of_image: Tensor
    image_of_caption: Tensor

    def sum(self) -> Tensor:
        return self.caption_of_image + self.image_of_caption


def _ranking_losses(similarity: Tensor, class_ids: Tensor) -> RankingLosses:
    """similarity (groups, B pictures, B captions), class_ids (N,): others of one's own class are no negatives."""
    groups, size, _ = similarity.shape
    classes = _by_group(class_ids, groups)
    same = classes.unsqueeze(2) == classes.unsqueeze(1)
    others = ~torch.eye(size, dtype=torch.bool, device=similarity.device)
    logits = similarity.masked_fill(same & others, float("-inf"))
    target = torch.arange(size, device=logits.device).repeat(groups)
    return RankingLosses(
        F.cross_entropy(logits.reshape(-1, size), target),
        F.cross_entropy(logits.transpose(1, 2).reshape(-1, size), target),
    )


def word_similarity(regions: Tensor, words: Tensor, lengths: Tensor, gammas: Gammas) -> Tensor:
    """AttnGAN's attention-driven score of every picture with every caption (section 3.2, eq. 7 to 10).

    regions (G, I, D, R), words (G, J, D, T), lengths (G, J) -> (G, I, J), log sum exp over words, without the factor
    of the ranking. As in the released code, all words count and the sum is not raised to 1 / gamma.
    """
    each = zip(regions, words, lengths, strict=True)
    return torch.stack([_similarity_in_group(*of_group, gammas) for of_group in each])


def _similarity_in_group(regions: Tensor, words: Tensor, lengths: Tensor, gammas: Gammas) -> Tensor:
    """regions (I, D, R), words (J, D, T), lengths (J,) -> (I, J). No work is done for the places past a caption's end.

    The context c = sum_r weights_r region_r is never formed: c.e = weights . scores, and |c|^2 comes from the regions'
    Gram matrix, which is smaller where there are fewer regions than dimensions.
    """
    device, (pictures, dim, places) = words.device, regions.shape
    ordered, order = lengths.cpu().sort()
    caption = order.repeat_interleave(ordered)
    place = torch.arange(len(caption)) - (ordered.cumsum(0) - ordered).repeat_interleave(ordered)
    caption, place = caption.to(device, non_blocking=True), place.to(device, non_blocking=True)
    spoken = words.transpose(1, 2)[caption, place]  # (P, D), the P words of all captions, shortest caption first
    scores = (spoken @ regions.transpose(0, 1).reshape(dim, -1)).view(-1, pictures, places)
    kinds, counts = ordered.unique_consecutive(return_counts=True)
    runs = list(zip(counts.tolist(), kinds.tolist(), strict=True))
    gram: Tensor = Gram.apply(regions)  # type: ignore[no-untyped-call]
    product, square = Attended.apply(scores, gram, runs, gammas.attention)  # type: ignore[no-untyped-call]
    norms = square.clamp(min=MIN_NORM**2).sqrt() * spoken.norm(dim=1, keepdim=True)
    cosine = product / norms.clamp(min=MIN_NORM)
    evidence = cosine.new_full((*words.shape[::2], pictures), float("-inf"))
    evidence = evidence.index_put((caption, place), gammas.words * cosine)
    similarity: Tensor = evidence.logsumexp(dim=1).t()
    return similarity


class Gram(torch.autograd.Function):
    """(I, D, R) -> (I, R, R), products of each two columns; for uses whose gradient is symmetric."""

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


Runs = list[tuple[int, int]]
"""Captions of one length that follow each other: how many, and their words."""


class Attended(torch.autograd.Function):
    """scores (P, I, R) of words with regions -> c.e and |c|^2 (P, I), c being the regions' mixture for each word.

    Its weights are softmax(gamma * a) over regions, a being the softmax of the scores over the words of a caption
    (eq. 8 and 9). gram: the regions' (I, R, R). runs: of the captions that the P words are of.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, scores: Tensor, gram: Tensor, runs: Runs, gamma: float) -> tuple[Tensor, Tensor]:
        over_words = torch.empty_like(scores)
        for mine, out in _by_caption(runs, scores, over_words):
            torch._softmax(mine, 1, False, out=out)
        weights = (gamma * over_words).softmax(dim=2)
        mixed = torch.bmm(weights.transpose(0, 1), gram).transpose(0, 1)
        ctx.save_for_backward(scores, over_words, weights, mixed)
        ctx.runs, ctx.gamma = runs, gamma  # type: ignore[attr-defined]
        return torch.linalg.vecdot(weights, scores), torch.linalg.vecdot(weights, mixed)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(  # type: ignore[override]
        ctx: FunctionCtx, of_product: Tensor, of_square: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None]:
        scores, over_words, weights, mixed = ctx.saved_tensors  # type: ignore[attr-defined]
        runs, gamma = ctx.runs, ctx.gamma  # type: ignore[attr-defined]
        of_product, of_square = of_product.unsqueeze(2), of_square.unsqueeze(2)
        of_weights = (scores * (gamma * of_product)).addcmul_(mixed, 2 * gamma * of_square)
        of_sharpened = torch._softmax_backward_data(of_weights, weights, 2, weights.dtype)
        of_scores = of_weights  # its memory serves again
        for gradient, result, out in _by_caption(runs, of_sharpened, over_words, of_scores):
            torch._softmax_backward_data(gradient, result, 1, weights.dtype, grad_input=out)
        of_scores.addcmul_(weights, of_product)
        of_gram = None
        if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            of_gram = torch.bmm((weights * of_square).permute(1, 2, 0), weights.transpose(0, 1))
        return of_scores, of_gram, None, None


def _by_caption(runs: Runs, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """Views (captions, words of each, numbers of a word) of (P, ...), run by run."""
    sizes = [count * length for count, length in runs]
    for (count, length), *parts in zip(runs, *(tensor.split(sizes) for tensor in tensors), strict=True):
        yield [part.view(count, length, -1) for part in parts]


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(N, ...) -> (groups, B, ...)."""
    return x.reshape(groups, x.shape[0] // groups, *x.shape[1:])


def word_losses(
    regions: Tensor, words: Tensor, lengths: Tensor, class_ids: Tensor, groups: int, gammas: Gammas
) -> RankingLosses:
    """L_1^w and L_2^w of the DAMSM (section 3.2, eq. 11 to 13), means over the samples.

    regions (N, D, R), words (N, D, T), lengths and class_ids (N,).
    """
    with no_autocast(regions):
        similarity = word_similarity(
            _by_group(upcast(regions), groups), _by_group(upcast(words), groups), _by_group(lengths, groups), gammas
        )
        return _ranking_losses(gammas.ranking * similarity, class_ids)


def sentence_losses(images: Tensor, sentences: Tensor, class_ids: Tensor, groups: int, gammas: Gammas) -> RankingLosses:
    """L_1^s and L_2^s of the DAMSM (section 3.2): cosines of image codes and sentence vectors, both (N, D)."""
    with no_autocast(images):
        pictures = _by_group(upcast(images), groups)
        captions = _by_group(upcast(sentences), groups)
        norms = pictures.norm(dim=2).unsqueeze(2) * captions.norm(dim=2).unsqueeze(1)
        cosine = (pictures @ captions.transpose(1, 2)) / norms.clamp(min=MIN_NORM)
        return _ranking_losses(gammas.ranking * cosine, class_ids)


def joint_embedding_losses(
    images: Tensor, sentences: Tensor, class_ids: Tensor, groups: int, margin: float
) -> RankingLosses:
    """The symmetric structured joint embedding loss (DS-SJE; Reed et al. 2016, "Learning Deep Representations of
    Fine-Grained Visual Descriptions").

    Image codes and sentence vectors, both (N, D); their score is the inner product. Each picture's own caption is to
    score higher, by the margin, than each caption of another class in its group, and each caption's own picture than
    each of another class: hinges, summed over the pairs and divided by B**2, as in the released code; the paper writes
    the largest hinge of each.
    """
    with no_autocast(images):
        score = _by_group(upcast(images), groups) @ _by_group(upcast(sentences), groups).transpose(1, 2)
        classes = _by_group(class_ids, groups)
        other = classes.unsqueeze(2) != classes.unsqueeze(1)
        own = score.diagonal(dim1=1, dim2=2)
        hinge_of_captions = (margin + score - own.unsqueeze(2)).clamp(min=0) * other
        hinge_of_images = (margin + score - own.unsqueeze(1)).clamp(min=0) * other
        return RankingLosses(hinge_of_captions.mean(), hinge_of_images.mean())


def damsm_loss(
    regions: Tensor,
    whole: Tensor,
    words: Tensor,
    sentences: Tensor,
    lengths: Tensor,
    class_ids: Tensor,
    groups: int,
    gammas: Gammas,
) -> Tensor:
    """L_DAMSM (AttnGAN, section 3.2, eq. 14): the word and sentence losses in both directions, summed."""
    by_words = word_losses(regions, words, lengths, class_ids, groups, gammas)
    return by_words.sum() + sentence_losses(whole, sentences, class_ids, groups, gammas).sum()
