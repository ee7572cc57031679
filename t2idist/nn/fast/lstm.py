"""The bidirectional LSTM of captions, without packing."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

# each direction runs by itself; cuDNN copies its few weights into one piece
warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")


def bidirectional_lstm(rnn: nn.LSTM, embedded: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Run a one-layer bidirectional LSTM as one LSTM over whole rows and one over reversed rows.

    torch's form for packed captions needs their lengths on the host, and steps through them gate by gate on CPUs.

    Args:
        embedded: (N, T, word_dim).
        lengths: (N,), at least 1, on the same device.

    Returns:
        Words (N, embedding_dim, T), zero past the length, and sentence (N, embedding_dim), the last state of both
        directions.
    """
    count, length, _ = embedded.shape
    rows, last = torch.arange(count, device=embedded.device), lengths - 1
    positions = torch.arange(length, device=embedded.device)
    reverse = (last.unsqueeze(1) - positions).clamp(min=0).unsqueeze(2)  # position of each reversed word
    start = embedded.new_zeros(1, count, rnn.hidden_size)
    states: list[Tensor] = []
    for inputs, weights in zip((embedded, embedded.take_along_dim(reverse, 1)), rnn.all_weights, strict=True):
        states.append(torch.lstm(inputs, (start, start), [*weights], True, 1, 0.0, rnn.training, False, True)[0])
    forward, backward = states
    words = torch.cat([forward, backward.take_along_dim(reverse, 1)], dim=2).transpose(1, 2)
    sentence = torch.cat([forward[rows, last], backward[rows, last]], dim=1)
    past = positions >= lengths.unsqueeze(1)
    return words.masked_fill(past.unsqueeze(1), 0.0), sentence
