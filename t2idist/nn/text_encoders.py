"""Text encoders: tokens to a vector for each word and one for the sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from t2idist.nn.char_encoder import char_text_encoder
from t2idist.nn.fast import lstm
from t2idist.nn.precision import no_autocast, upcast

MIN_NORM = 1e-8


class BiLSTM(nn.Module):
    """AttnGAN's text encoder (section 3.2): embedding, dropout, one bidirectional LSTM layer.

    tokens (N, T) int64 with 0 = padding, lengths (N,) at least 1 -> words (N, embedding_dim, T) and sentence
    (N, embedding_dim), as `fast.lstm.bidirectional_lstm`.
    """

    def __init__(self, vocabulary_size: int, embedding_dim: int, word_dim: int, dropout: float) -> None:
        super().__init__()
        if embedding_dim % 2:
            raise ValueError(f"embedding_dim is {embedding_dim}; it must be even, half for each direction")
        self.encoder = nn.Embedding(vocabulary_size, word_dim)
        self.drop = nn.Dropout(dropout)
        self.rnn = nn.LSTM(word_dim, embedding_dim // 2, batch_first=True, bidirectional=True)
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        embedded = self.drop(self.encoder(tokens))
        with no_autocast(embedded):
            return lstm.bidirectional_lstm(self.rnn, embedded, lengths)


def damsm_text_encoder(config: Mapping[str, Any], vocabulary_size: int) -> BiLSTM:
    """Build the text encoder of a `damsm` stage with this config, with new weights."""
    return BiLSTM(vocabulary_size, config["embedding_dim"], config["word_dim"], config["dropout"])


def text_encoder_from_export(export: Mapping[str, Any], vocabulary_size: int) -> BiLSTM:
    """Build the text encoder of a `damsm` stage's export, given its index (``{"system", "config", "plan", ...}``).

    Raises ValueError if the export is of another system or its vocabulary has another size than the data's.
    """
    _check_encoder("damsm", export, vocabulary_size, ("damsm",))
    return damsm_text_encoder(export["config"], vocabulary_size)


def _check_encoder(slot: str, export: Mapping[str, Any], vocabulary_size: int, systems: tuple[str, ...]) -> None:
    if export["system"] not in systems:
        allowed = " or ".join(f"'{system}'" for system in systems)
        raise ValueError(f"uses: {slot}: the export is of system '{export['system']}'; it must be of {allowed}")
    theirs = export["plan"]["vocabulary_size"]
    if theirs != vocabulary_size:
        raise ValueError(
            f"uses: {slot}: its vocabulary has {theirs} words and this data's has {vocabulary_size}; "
            "train it on this data"
        )


def sentence_encoder(
    sources: Mapping[str, Mapping[str, Any]], vocabulary_size: int, vector_dim: int
) -> tuple[nn.Module | None, int]:
    """Build the encoder of a system's sentence vectors: that of slot "text", or None if the data has the vectors.

    Args:
        sources: By slot, the index of the export; "text" is of `damsm` or `char_text`.
        vector_dim: Length of the data's sentence vectors, 0 if it has none.

    Returns:
        The encoder, with new weights (tokens (N, T), lengths (N,) -> words and sentence (N, D)), and D.

    Raises:
        ValueError: If there is neither an encoder nor vectors.
    """
    if "text" in sources:
        source = sources["text"]
        _check_encoder("text", source, vocabulary_size, ("damsm", "char_text"))
        config = source["config"]
        if source["system"] == "char_text":
            placeholder = ("",) * vocabulary_size  # the spelling is part of the export's weights
            return char_text_encoder(config, placeholder), config["embedding_dim"]
        return damsm_text_encoder(config, vocabulary_size), config["embedding_dim"]
    if vector_dim:
        return None, vector_dim
    raise ValueError("uses.text is missing; give an export with a text encoder, or use data with sentence vectors")


def sentence_vectors(encoder: nn.Module | None, tokens: Tensor, lengths: Tensor, given: Tensor, unit: bool) -> Tensor:
    """Return the sentence vectors (N, D) of captions, by the encoder or, if it is None, those of the data.

    Args:
        tokens: (N, T).
        lengths: (N,).
        given: Vectors of the data (N, D), D = 0 if it has none.
        unit: Whether to scale by `unit_scale`.

    Raises:
        ValueError: If there is neither an encoder nor vectors.
    """
    if encoder is None and not given.shape[1]:
        raise ValueError(
            "captions without sentence vectors; a system trained on the data's vectors needs them to sample"
        )
    vectors: Tensor = given if encoder is None else encoder(tokens, lengths)[1]
    return unit_scale(vectors) if unit else vectors


def unit_scale(text: Tensor) -> Tensor:
    """Scale vectors (N, D) or (N, D, T) to a root mean square of 1 over D; zeros stay zeros.

    An encoder trained on cosines, such as DAMSM, leaves the length of its vectors arbitrary.
    """
    x = upcast(text)
    norm: Tensor = x.norm(dim=1, keepdim=True)
    return x / norm.clamp(min=MIN_NORM) * math.sqrt(x.shape[1])


def padding_mask(lengths: Tensor, words: Tensor) -> Tensor:
    """lengths (N,), words (N, D, T) -> (N, T), true past the end of a caption."""
    return torch.arange(words.shape[2], device=words.device) >= lengths.unsqueeze(1)
