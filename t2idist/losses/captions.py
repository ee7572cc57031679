"""The captioning loss of MirrorGAN."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from t2idist.nn.precision import upcast


def word_cross_entropy(logits: Tensor, tokens: Tensor, lengths: Tensor, groups: int) -> Tensor:
    """Cross-entropy of caption words: mean over the words of each group, then over groups.

    L_stream of MirrorGAN (section 3.3, eq. 9) sums over the words of a caption; the released code takes this mean.

    Args:
        logits: (N, T, V).
        tokens: (N, T) int64.
        lengths: (N,).
    """
    count, length = tokens.shape
    terms = F.cross_entropy(upcast(logits).flatten(0, 1), tokens.flatten(), reduction="none").view(count, length)
    present = torch.arange(length, device=tokens.device) < lengths.unsqueeze(1)
    group_means = (terms * present).view(groups, -1).sum(1) / lengths.view(groups, -1).sum(1)
    return group_means.mean()
