"""Reed's text encoder over characters: temporal convolutions, then a recurrent network whose states are averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2idist.nn.precision import no_autocast

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789-,;.!?:'\"/\\|_@#$%^&*~`+-=<>()[]{} "
"""As released: 70 characters, with '-' twice, of which the first is never used."""

MAX_WORD_CHARACTERS = 32
"""Longer words are truncated."""

KERNEL = 4
POOL = 3
RECURRENT = {"gru": nn.GRU, "rnn": nn.RNN}

_CHARACTER_IDS = {character: i + 1 for i, character in enumerate(ALPHABET)}  # 0 = padding


def spell_words(words: Sequence[str]) -> Tensor:
    """Return (V, MAX_WORD_CHARACTERS) uint8: the character ids of each word, then zeros."""
    known = ([_CHARACTER_IDS[character] for character in word.lower() if character in _CHARACTER_IDS] for word in words)
    rows = (word[:MAX_WORD_CHARACTERS] for word in known)
    return torch.tensor([row + [0] * (MAX_WORD_CHARACTERS - len(row)) for row in rows], dtype=torch.uint8)


def check_spelling(words: Sequence[str]) -> None:
    """Raise ValueError if most words of a vocabulary have no character of the alphabet, so that they are all alike."""
    empty = [word for word in words if word and not set(word.lower()) & _CHARACTER_IDS.keys()]
    if 2 * len(empty) > len(words):
        raise ValueError(
            f"{len(empty)} of the data's {len(words)} words, such as {empty[0]!r}, have no character that char_text "
            "spells, which are those of ASCII; use the text encoder of damsm"
        )


def encode_characters(letters: Tensor, tokens: Tensor, lengths: Tensor, characters: int) -> Tensor:
    """Convert captions to character ids (N, characters), words joined by single spaces, truncated or padded with 0.

    Args:
        letters: `spell_words` of the vocabulary.
        tokens: (N, T).
        lengths: (N,).
    """
    words = letters[tokens].long()  # (N, T, L)
    spaced = F.pad(words, (0, 1))
    sizes = (words > 0).sum(2)
    character = torch.arange(spaced.shape[2], device=tokens.device)
    word = torch.arange(tokens.shape[1], device=tokens.device)
    ends = (word + 1 < lengths[:, None])[:, :, None] & (character == sizes[:, :, None])
    spaced = torch.where(ends, _CHARACTER_IDS[" "], spaced)
    used = (word < lengths[:, None])[:, :, None] & (spaced > 0)
    target = used.flatten(1).cumsum(1) - 1
    target = torch.where(used.flatten(1) & (target < characters), target, characters)  # the rest to a dropped column
    text = torch.zeros(len(tokens), characters + 1, dtype=torch.int64, device=tokens.device)
    return text.scatter_(1, target, spaced.flatten(1))[:, :characters]


class CharEncoder(nn.Module):
    """The char-CNN-RNN (Reed et al. 2016, "Learning Deep Representations of Fine-Grained Visual Descriptions").

    tokens (N, T) int64 with 0 = padding, lengths (N,) at least 1 -> words (N, D, 0), since it has no word vectors, and
    sentence (N, D). The spelling of the vocabulary is part of its state.

    Args:
        words: The vocabulary.
        characters: Characters read of a caption.
        widths: Channels of the three convolutions; the last also of the recurrent network.
        recurrent: "gru" or "rnn".
    """

    letters: Tensor

    def __init__(
        self, words: Sequence[str], embedding_dim: int, characters: int, widths: Sequence[int], recurrent: str
    ) -> None:
        super().__init__()
        if recurrent not in RECURRENT:
            raise ValueError(f"recurrent is '{recurrent}'; it must be one of {', '.join(RECURRENT)}")
        minimum = KERNEL - 1 + POOL * (KERNEL - 1 + POOL * KERNEL)  # leaves one recurrent step
        if characters < minimum:
            raise ValueError(f"characters is {characters}; it must be at least {minimum}")
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
    """Build the text encoder of a `char_text` stage with this config and vocabulary, with new weights."""
    return CharEncoder(words, config["embedding_dim"], config["characters"], config["widths"], config["recurrent"])
