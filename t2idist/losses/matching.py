"""Losses that couple images and captions inside each group: mismatched pairs, DAMSM, joint embedding.

N samples are ``groups`` x B, with the samples of one group contiguous. Nothing crosses groups, so the loss of several
groups is the mean of the losses of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from t2idist.nn.fast import word_attention as fast
from t2idist.nn.precision import no_autocast, upcast

MIN_NORM = 1e-8


@dataclass(frozen=True)
class WrongPairs:
    """Mismatched pairs: image n of the batch with caption ``caption[n]``."""

    caption: Tensor
    """(N,) int64."""
    keep: Tensor
    """(N,) bool, false if image and caption are of one class: such a caption may be true."""


def wrong_pairs(class_ids: Tensor, groups: int) -> WrongPairs:
    """Pair every image with the caption of the next sample of its group, cyclically.

    Every sample is used once as image and once as caption, and BatchNorm sees whole groups. (`losses.released` has the
    pairs of the released code.)

    Args:
        class_ids: (N,).

    Raises:
        ValueError: If a group has one sample.
    """
    size = _check_pairs(class_ids, groups)
    caption = torch.arange(class_ids.shape[0], device=class_ids.device).view(groups, size).roll(-1, dims=1).reshape(-1)
    return WrongPairs(caption, class_ids != class_ids[caption])


def _check_pairs(class_ids: Tensor, groups: int) -> int:
    """Return the samples of a group. Raises ValueError if it is one."""
    size = class_ids.shape[0] // groups
    if size < 2:
        raise ValueError(f"group_size is {size}; a mismatched pair needs at least 2 samples in a group")
    return size


def wrong_images(class_ids: Tensor, groups: int) -> Tensor:
    """Choose an image for the caption of each sample: of the next sample of its group, cyclically, of another class.

    If all samples of the group are of one class, it is the next one's.

    Args:
        class_ids: (N,).

    Returns:
        (N,) int64, indices of images.

    Raises:
        ValueError: If a group has one sample.
    """
    size = _check_pairs(class_ids, groups)
    classes = _by_group(class_ids, groups)
    position = torch.arange(size, device=class_ids.device)
    distance = (position - position.unsqueeze(1)) % size  # (B captions, B images)
    distance = distance.masked_fill(classes.unsqueeze(1) == classes.unsqueeze(2), size).amin(dim=2)
    nearest = distance.where(distance < size, 1)  # (groups, B)
    start = size * torch.arange(groups, device=class_ids.device).unsqueeze(1)
    return (start + (position + nearest) % size).flatten()


@dataclass(frozen=True)
class Gammas:
    """The smoothing factors gamma_1 to gamma_3 of AttnGAN."""

    attention: float = 5.0
    """gamma_1 (eq. 9): of the attention over regions."""
    words: float = 5.0
    """gamma_2 (eq. 10): of the maximum over words."""
    ranking: float = 10.0
    """gamma_3 (eq. 11): of the ranking inside a group."""


@dataclass(frozen=True)
class RankingLosses:
    """Losses of retrieval inside a group, in both directions."""

    caption_of_image: Tensor
    """Finding the caption of each image."""
    image_of_caption: Tensor
    """Finding the image of each caption."""

    def sum(self) -> Tensor:
        return self.caption_of_image + self.image_of_caption


def _ranking_losses(similarity: Tensor, class_ids: Tensor) -> RankingLosses:
    """similarity (groups, B images, B captions), class_ids (N,): other samples of the same class are no negatives."""
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


def word_similarity(
    regions: Tensor, words: Tensor, lengths: Tensor, gamma_attention: float, gamma_words: float
) -> Tensor:
    """Score every image with every caption of its group by attention (AttnGAN, section 3.2, eq. 7 to 10).

    As in the released code, eq. 10 is a plain log-sum-exp over words, not raised to 1 / gamma_words.

    Args:
        regions: (G, I, D, R), R regions of each image.
        words: (G, J, D, T).
        lengths: (G, J), words of each caption.

    Returns:
        (G, I, J), without the factor gamma_ranking of eq. 11.
    """
    past = torch.arange(words.shape[3], device=words.device) >= lengths.unsqueeze(2)
    past = past[:, None, :, :, None]
    scores = torch.einsum("gjdt,gidr->gijtr", words, regions)  # eq. 7
    over_words = scores.masked_fill(past, float("-inf")).softmax(dim=3)  # eq. 8
    attention = (gamma_attention * over_words).softmax(dim=4)  # eq. 9
    context = torch.einsum("gijtr,gidr->gijtd", attention, regions)  # eq. 9
    relevance = F.cosine_similarity(context, words.transpose(2, 3).unsqueeze(1), dim=4, eps=MIN_NORM)
    return (gamma_words * relevance).masked_fill(past.squeeze(4), float("-inf")).logsumexp(dim=3)  # eq. 10


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(N, ...) -> (groups, B, ...)."""
    return x.reshape(groups, x.shape[0] // groups, *x.shape[1:])


def word_losses(
    regions: Tensor, words: Tensor, lengths: Tensor, class_ids: Tensor, groups: int, gammas: Gammas
) -> RankingLosses:
    """Compute L_1^w and L_2^w of the DAMSM (AttnGAN, section 3.2, eq. 11 to 13), means over samples.

    Args:
        regions: (N, D, R).
        words: (N, D, T).
        lengths: (N,).
        class_ids: (N,).
    """
    with no_autocast(regions):
        regions, words, lengths = (_by_group(x, groups) for x in (upcast(regions), upcast(words), lengths))
        # on accelerators fewer operations are faster than less work
        score = fast.word_similarity if regions.is_cpu else word_similarity
        similarity = score(regions, words, lengths, gammas.attention, gammas.words)
        return _ranking_losses(gammas.ranking * similarity, class_ids)


def sentence_losses(images: Tensor, sentences: Tensor, class_ids: Tensor, groups: int, gammas: Gammas) -> RankingLosses:
    """Compute L_1^s and L_2^s of the DAMSM (AttnGAN, section 3.2) from image codes and sentence vectors (N, D)."""
    with no_autocast(images):
        images, sentences = _by_group(upcast(images), groups), _by_group(upcast(sentences), groups)
        norms = images.norm(dim=2).unsqueeze(2) * sentences.norm(dim=2).unsqueeze(1)
        cosine = (images @ sentences.transpose(1, 2)) / norms.clamp(min=MIN_NORM)
        return _ranking_losses(gammas.ranking * cosine, class_ids)


def joint_embedding_losses(
    images: Tensor, sentences: Tensor, class_ids: Tensor, groups: int, margin: float
) -> RankingLosses:
    """Compute the symmetric structured joint embedding loss (DS-SJE; Reed et al. 2016, CVPR).

    The score of a pair is the inner product. The matching caption should exceed, by the margin, each caption of another
    class in the group, and the matching image each image of another class. As in the released code, hinges are summed
    over pairs and divided by B**2; the paper takes the largest hinge of each sample.

    Args:
        images: Image codes (N, D).
        sentences: Sentence vectors (N, D).
        class_ids: (N,).
    """
    with no_autocast(images):
        score = _by_group(upcast(images), groups) @ _by_group(upcast(sentences), groups).transpose(1, 2)
        classes = _by_group(class_ids, groups)
        other = classes.unsqueeze(2) != classes.unsqueeze(1)
        own = score.diagonal(dim1=1, dim2=2)
        caption_hinges = (margin + score - own.unsqueeze(2)).clamp(min=0) * other
        image_hinges = (margin + score - own.unsqueeze(1)).clamp(min=0) * other
        return RankingLosses(caption_hinges.mean(), image_hinges.mean())


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
    """Compute L_DAMSM (AttnGAN, section 3.2, eq. 14): the sum of word and sentence losses in both directions.

    Args:
        regions: (N, D, R).
        whole: Image codes (N, D).
        words: (N, D, T).
        sentences: (N, D).
        lengths: (N,).
        class_ids: (N,).
    """
    by_words = word_losses(regions, words, lengths, class_ids, groups, gammas)
    return by_words.sum() + sentence_losses(whole, sentences, class_ids, groups, gammas).sum()
