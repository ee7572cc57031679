"""What couples pictures and captions: mismatched pairs, the DAMSM's losses and Reed's, inside each group of samples.

N samples are ``groups`` x B, those of one group contiguous; nothing crosses a group's border, so several groups in one
call give the mean of the losses that each would give alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from t2idist.nn.precision import full, full_precision

SMALLEST_NORM = 1e-8


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
    groups, images, _, places = regions.shape
    captions, length = words.shape[1], words.shape[3]
    padding = torch.arange(length, device=words.device) >= lengths.unsqueeze(2)  # (G, J, T)
    flat = words.permute(0, 1, 3, 2).reshape(groups, 1, captions * length, -1)  # (G, 1, J*T, D)
    scores = (flat @ regions).view(groups, images, captions, length, places)
    hidden = padding[:, None, :, :, None]
    over_words = scores.masked_fill(hidden, float("-inf")).softmax(dim=3)
    weights = (gammas.attention * over_words).softmax(dim=4)  # (G, I, J, T, R)
    # The context c = sum_r weights_r region_r is never formed: c.e = weights . scores, and |c|^2 comes from the
    # regions' Gram matrix, which is smaller where there are fewer regions than dimensions.
    gram = regions.transpose(2, 3) @ regions
    mixed = weights.view(groups, images, captions * length, places) @ gram
    square = (mixed.view_as(weights) * weights).sum(4)
    norms = square.clamp(min=SMALLEST_NORM**2).sqrt() * words.norm(dim=2).unsqueeze(1)
    cosine = (weights * scores).sum(4) / norms.clamp(min=SMALLEST_NORM)
    evidence: Tensor = (gammas.words * cosine).masked_fill(padding.unsqueeze(1), float("-inf"))
    return evidence.logsumexp(dim=3)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(N, ...) -> (groups, B, ...)."""
    return x.reshape(groups, x.shape[0] // groups, *x.shape[1:])


def word_losses(
    regions: Tensor, words: Tensor, lengths: Tensor, class_ids: Tensor, groups: int, gammas: Gammas
) -> RankingLosses:
    """L_1^w and L_2^w of the DAMSM (section 3.2, eq. 11 to 13), means over the samples.

    regions (N, D, R), words (N, D, T), lengths and class_ids (N,).
    """
    with full_precision(regions):
        similarity = word_similarity(
            _by_group(full(regions), groups), _by_group(full(words), groups), _by_group(lengths, groups), gammas
        )
        return _ranking_losses(gammas.ranking * similarity, class_ids)


def sentence_losses(images: Tensor, sentences: Tensor, class_ids: Tensor, groups: int, gammas: Gammas) -> RankingLosses:
    """L_1^s and L_2^s of the DAMSM (section 3.2): cosines of image codes and sentence vectors, both (N, D)."""
    with full_precision(images):
        pictures = _by_group(full(images), groups)
        captions = _by_group(full(sentences), groups)
        norms = pictures.norm(dim=2).unsqueeze(2) * captions.norm(dim=2).unsqueeze(1)
        cosine = (pictures @ captions.transpose(1, 2)) / norms.clamp(min=SMALLEST_NORM)
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
    with full_precision(images):
        score = _by_group(full(images), groups) @ _by_group(full(sentences), groups).transpose(1, 2)
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
