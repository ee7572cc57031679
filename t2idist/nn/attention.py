"""Attention of image features to the words and the sentence of a caption."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from t2idist.nn.precision import upcast


def attend(
    features: Tensor, keys: Tensor, values: Tensor, padding: Tensor, groups: int, compat: str
) -> tuple[Tensor, Tensor]:
    """Mix the values of the words at every position, by a softmax of the inner products of features and keys.

    Args:
        features: (N, C, H, W).
        keys: (N, C, T), one for each word.
        values: (N, D, T).
        padding: (N, T), true past the end of a caption.
        groups: Matters only with compat "authors".
        compat: See `WordAttention`.

    Returns:
        The mixed values (N, D, H, W) and the weights (N, T, H, W), which sum to one over T.
    """
    count, _, height, width = features.shape
    positions = height * width
    rows = features.permute(0, 2, 3, 1).flatten(1, 2)  # (N, H*W, C)
    scores = torch.bmm(rows.to(keys.dtype), keys)  # (N, H*W, T)
    if compat == "authors":
        size = count // groups
        mask = padding.view(groups, size, -1).repeat(1, positions, 1).view(count, positions, -1)
    else:
        mask = padding.unsqueeze(1)
    weights = upcast(scores).masked_fill(mask, float("-inf")).softmax(dim=2)
    mixed = torch.bmm(weights.to(values.dtype), values.transpose(1, 2))  # (N, H*W, D)
    mixed = mixed.view(count, height, width, -1).permute(0, 3, 1, 2)
    return mixed, weights.transpose(1, 2).unflatten(2, (height, width))


class WordAttention(nn.Module):
    """F^attn of AttnGAN (section 3.1, eq. 2): the scores are h^T (U e), without scaling.

    features (N, C, H, W), words (N, D, T), padding (N, T) true past the end of a caption -> context (N, C, H, W) and
    weights (N, T, H, W) that sum to one over T.

    compat "authors" reproduces the mask layout of the released code, for its weights: row b * H * W + q gets the
    padding of sample (b * H * W + q) mod B instead of b, where B is the number of samples in a group.
    """

    def __init__(self, channels: int, word_dim: int, compat: str = "") -> None:
        super().__init__()
        self.conv_context = nn.Conv2d(word_dim, channels, kernel_size=1, bias=False)
        self.compat = compat

    def forward(self, features: Tensor, words: Tensor, padding: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
        projected = self.conv_context(words.unsqueeze(3)).squeeze(3)  # (N, C, T)
        return attend(features, projected, projected, padding, groups, self.compat)


class GlobalLocalAttention(WordAttention):
    """GLAM of MirrorGAN (section 3.2, eq. 4 and 5): attention to words and, in parallel, to the sentence."""

    def __init__(self, channels: int, word_dim: int, condition_dim: int, compat: str = "") -> None:
        super().__init__(channels, word_dim, compat)
        self.linear = nn.Linear(condition_dim, channels)
        self.conv_sentence_vis = nn.Conv2d(channels, channels, kernel_size=1, bias=False)

    def sentence(self, features: Tensor, condition: Tensor) -> Tensor:
        """Attend to the sentence: features (N, C, H, W), condition (N, condition_dim) -> context (N, C, H, W).

        As released, features times the projected sentence pass one more 1x1 convolution, and the softmax is over
        channels; the paper does not specify its dimension.
        """
        rows = features.permute(0, 2, 3, 1)  # (N, H, W, C), contiguous in channels-last layout
        projected = self.linear(condition).to(rows.dtype)[:, None, None]
        scores = self.conv_sentence_vis((rows * projected).permute(0, 3, 1, 2))
        weights = upcast(scores).permute(0, 2, 3, 1).softmax(dim=3)
        mixed: Tensor = weights.to(rows.dtype) * projected
        return mixed.permute(0, 3, 1, 2)
