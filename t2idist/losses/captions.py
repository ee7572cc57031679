"""Losses of captions, word by word."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from t2idist.nn.precision import upcast


def word_cross_entropy(logits: Tensor, tokens: Tensor, lengths: Tensor, groups: int) -> Tensor:
    """Cross-entropy of the words that captions have, mean over the words of each group, then over groups.

    logits (N, T, V), tokens (N, T), lengths (N,). L_stream of MirrorGAN (section 3.3, eq. 9) sums over a caption's
    words; the released code takes this mean.
    """
    count, length = tokens.shape
    terms = F.cross_entropy(upcast(logits).flatten(0, 1), tokens.flatten(), reduction="none").view(count, length)
    lengths = lengths.to(tokens.device, non_blocking=True)
    there = torch.arange(length, device=tokens.device) < lengths.unsqueeze(1)
    of_group = (terms * there).view(groups, -1).sum(1) / lengths.view(groups, -1).sum(1)
    return of_group.mean()
