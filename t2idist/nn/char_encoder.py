"""Reed's text encoder over characters: temporal convolutions, then a recurrent network whose states are averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2idist.nn.precision import no_autocast

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789-,;.!?:'\"/\\|_@#$%^&*~`+-=<>()[]{} "
"""The released one: 70 places, of which the first '-' is never used."""

MAX_WORD_CHARACTERS = 32
"""Longer words lose their end."""

KERNEL = 4
POOL = 3
RECURRENT = {"gru": nn.GRU, "rnn": nn.RNN}

_CHARACTER_IDS = {character: place + 1 for place, character in enumerate(ALPHABET)}  # of two the last counts; 0: none


def spell_words(words: Sequence[str]) -> Tensor:
    """(V, WORD_CHARACTERS) uint8: each word's characters by place in the alphabet + 1, then zeros."""
    known = ([_CHARACTER_IDS[character] for character in word.lower() if character in _CHARACTER_IDS] for word in words)
    rows = (word[:MAX_WORD_CHARACTERS] for word in known)
    return torch.tensor([row + [0] * (MAX_WORD_CHARACTERS - len(row)) for row in rows], dtype=torch.uint8)


def encode_characters(letters: Tensor, tokens: Tensor, lengths: Tensor, characters: int) -> Tensor:
    """Captions as characters (N, characters), words joined by single spaces; 0 past the end, a longer text is cut off.

    letters: `spell_words` of the vocabulary. tokens (N, T), lengths (N,).
    """
    words = letters[tokens].long()  # (N, T, L)
    spaced = F.pad(words, (0, 1))
    sizes = (words > 0).sum(2)
    place = torch.arange(spaced.shape[2], device=tokens.device)
    number = torch.arange(tokens.shape[1], device=tokens.device)
    lengths = lengths.to(tokens.device, non_blocking=True)
    ends = (number + 1 < lengths[:, None])[:, :, None] & (place == sizes[:, :, None])
    spaced = torch.where(ends, _CHARACTER_IDS[" "], spaced)
    spoken = (number < lengths[:, None])[:, :, None] & (spaced > 0)
    at = spoken.flatten(1).cumsum(1) - 1
    at = torch.where(spoken.flatten(1) & (at < characters), at, characters)  # all else goes to one place too many
    text = torch.zeros(len(tokens), characters + 1, dtype=torch.int64, device=tokens.device)
    return text.scatter_(1, at, spaced.flatten(1))[:, :characters]


class CharEncoder(nn.Module):
    """The char-CNN-RNN (Reed et al. 2016, "Learning Deep Representations of Fine-Grained Visual Descriptions").

    tokens (N, T) int64 with 0 = padding, lengths (N,) at least 1 -> words (N, D, 0), for it knows none, and sentence
    (N, D). It spells the tokens by the words that it was made with, which are part of its state.
    widths: channels of the three convolutions, the last one's also of the recurrent network.
    """

    letters: Tensor

    def __init__(
        self, words: Sequence[str], embedding_dim: int, characters: int, widths: Sequence[int], recurrent: str
    ) -> None:
        super().__init__()
        if recurrent not in RECURRENT:
            raise ValueError(f"recurrent is '{recurrent}'; it must be one of {', '.join(RECURRENT)}")
        least = KERNEL - 1 + POOL * (KERNEL - 1 + POOL * KERNEL)  # that leave the recurrent network one step
        if characters < least:
            raise ValueError(f"characters is {characters}; it must be at least {least}")
        self.embedding_dim = embedding_dim
        self.characters = characters
        self.register_buffer("letters", spell_words(words))
        first, second, third = widths
        self.convolutions = nn.Sequential(
            nn.Conv1d(len(ALPHABET), first, KERNEL),
            nn.ReLU(),
            nn.MaxPool1d(POOL),
            nn.Conv1d(first, second, KERNEL),
            nn.ReLU(),
            nn.MaxPool1d(POOL),
            nn.Conv1d(second, third, KERNEL),
            nn.ReLU(),
        )
        self.recurrent = RECURRENT[recurrent](third, third, batch_first=True)
        self.projection = nn.Linear(third, embedding_dim)

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        text = encode_characters(self.letters, tokens, lengths, self.characters)
        weight = self.projection.weight
        one_hot = F.one_hot(text, len(ALPHABET) + 1)[:, :, 1:].to(weight.dtype)
        features = self.convolutions(one_hot.transpose(1, 2)).transpose(1, 2)
        with no_autocast(features):
            states, _ = self.recurrent(features.to(weight.dtype))
        sentence: Tensor = self.projection(states.mean(1))
        return sentence.new_zeros(len(tokens), self.embedding_dim, 0), sentence


def char_text_encoder(config: Mapping[str, Any], words: Sequence[str]) -> CharEncoder:
    """The text encoder that a `char_text` stage with this config trains on data of these words; drawn anew."""
    return CharEncoder(words, config["embedding_dim"], config["characters"], config["widths"], config["recurrent"])
