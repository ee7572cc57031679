"""Fast form of the bidirectional LSTM in nn/text_encoders.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def bidirectional_lstm(rnn: nn.LSTM, embedded: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Run one LSTM over whole rows and one over reversed rows; same arguments and results as the packed form.

    On CPUs torch steps through packed captions gate by gate, but hands whole rows to oneDNN.
    """
    count, length, _ = embedded.shape
    rows, last = torch.arange(count), lengths - 1
    reverse = (last.unsqueeze(1) - torch.arange(length)).clamp(min=0).unsqueeze(2)  # position of each reversed word
    start = embedded.new_zeros(1, count, rnn.hidden_size)
    states: list[Tensor] = []
    for inputs, weights in zip((embedded, embedded.take_along_dim(reverse, 1)), rnn.all_weights, strict=True):
        states.append(torch.lstm(inputs, (start, start), [*weights], True, 1, 0.0, rnn.training, False, True)[0])
    forward, backward = states
    words = torch.cat([forward, backward.take_along_dim(reverse, 1)], dim=2).transpose(1, 2)
    sentence = torch.cat([forward[rows, last], backward[rows, last]], dim=1)
    past = torch.arange(length) >= lengths.unsqueeze(1)
    return words.masked_fill(past.to(words.device).unsqueeze(1), 0.0), sentence
