"""The two axes of a sheet of images: rows are captions, columns are noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from t2idist.contract import Captions, SupportsInvert
from t2idist.sampling.generate import FixedFirstNoise, GaussianNoise, InterpolatedNoise, NoiseSource
from t2idist.sampling.loading import LoadedExport

PLACEHOLDER = "{}"
MIN_TRUNCATION = 0.01
BATCH_IMAGES = 4
"""Images that are drawn together, and the number of columns by default.

Rounding depends on the size of a batch. Columns of independent noise are drawn in whole batches, and what is too many
is dropped: an image is the same to the last bit however many were asked for.
"""


# ------------------------------------------------------------------------------------------------ rows
@dataclass(frozen=True)
class SheetRow:
    """One row of a sheet."""

    label: str
    caption: Captions
    """The caption, encoded."""
    nets: Mapping[str, nn.Module]
    """Networks that generate the row."""


def parse_words(argument: str) -> list[str]:
    """Split the value of --change-word, such as "red, light blue". Raises ValueError if a word is empty."""
    words = [word.strip() for word in argument.split(",")]
    if not all(words):
        raise ValueError(f'--change-word "{argument}": give words separated by commas')
    return words


def fill_placeholders(sentences: Sequence[str], words: Sequence[str]) -> list[str]:
    """Replace "{}" in every sentence by each word in turn. Raises ValueError if a sentence has no placeholder."""
    without = next((sentence for sentence in sentences if PLACEHOLDER not in sentence), None)
    if without is not None:
        raise ValueError(f'--change-word: "{without}" has no {PLACEHOLDER} to replace by the word')
    return [sentence.replace(PLACEHOLDER, word) for sentence in sentences for word in words]


def caption_rows(loaded: LoadedExport, labels: Sequence[str], captions: Captions) -> list[SheetRow]:
    """Return one row per caption."""
    return [SheetRow(label, captions[i : i + 1], loaded.nets) for i, label in enumerate(labels)]


def interpolated_rows(loaded: LoadedExport, sentences: Sequence[str], captions: Captions, steps: int) -> list[SheetRow]:
    """Interpolate linearly between two captions, in `steps` rows including both ends.

    The outputs of the text encoder (word features and sentence vector) are interpolated, or, if the export has no text
    encoder, the sentence vectors of the data.

    Args:
        loaded: export that generates the rows.
        sentences: two sentences, the labels of the ends.
        captions: the two sentences encoded, on the device of the networks.
        steps: number of rows.
    """
    first, second = captions[:1], captions[1:]
    labels = [sentences[0], *(f"{_percent(fraction)} of the way" for fraction in fractions(steps)[1:-1]), sentences[1]]
    if "text" not in loaded.nets:
        vectors = [torch.lerp(first.vectors, second.vectors, fraction) for fraction in fractions(steps)]
        between = [Captions(first.tokens, first.lengths, vector) for vector in vectors]
        return [SheetRow(label, caption, loaded.nets) for label, caption in zip(labels, between, strict=True)]
    (words, sentence), (other_words, other_sentence) = align_words(loaded.nets["text"], first, second)
    length = math.lcm(int(first.lengths), int(second.lengths))
    placeholder = Captions(first.tokens.new_zeros(1, length), first.lengths.new_full((1,), length), first.vectors)
    rows = []
    for label, fraction in zip(labels, fractions(steps), strict=True):
        encoder = ConstantTextEncoder(
            torch.lerp(words, other_words, fraction), torch.lerp(sentence, other_sentence, fraction)
        )
        rows.append(SheetRow(label, placeholder, {**loaded.nets, "text": encoder}))
    return rows


def align_words(encoder: nn.Module, first: Captions, second: Captions) -> list[tuple[Tensor, Tensor]]:
    """Encode two captions with word features of equal length, so that they can be interpolated.

    L is the least common multiple of the two lengths; every word is repeated in place. Attention gives the copies of a
    word together the weight of the word, so each caption keeps its meaning, without padding, and the interpolation has
    no jump.

    Args:
        encoder: text encoder.
        first: one caption.
        second: the other caption.

    Returns:
        Word features (1, D, L) and sentence vector (1, D) of each caption. An encoder without word features (T = 0)
        has none here either.
    """
    length = math.lcm(int(first.lengths), int(second.lengths))
    encoded = []
    for caption in (first, second):
        with torch.inference_mode():
            words, sentence = encoder(caption.tokens, caption.lengths)
        own_length = int(caption.lengths)
        encoded.append((words[:, :, :own_length].repeat_interleave(length // own_length, dim=2), sentence))
    return encoded


class ConstantTextEncoder(nn.Module):
    """Replacement for a text encoder that returns the same features for all captions."""

    def __init__(self, words: Tensor, sentence: Tensor) -> None:
        super().__init__()
        self.register_buffer("words", words)
        self.register_buffer("sentence", sentence)

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        words, sentence = self.get_buffer("words"), self.get_buffer("sentence")
        return words.expand(len(tokens), -1, -1), sentence.expand(len(tokens), -1)


# ------------------------------------------------------------------------------------------------ columns
@dataclass(frozen=True)
class SheetColumns:
    """The columns of a sheet."""

    noise: NoiseSource
    """Noise of `drawn` images."""
    drawn: int
    """Images that are drawn for a row."""
    count: int
    """Images of a row: the first of those that are drawn."""
    names: tuple[str, ...] = ()
    """Short headings, or none."""
    style_images: Tensor | None = None
    """(C, 3, S, S) images whose style the columns have."""


def noise_columns(seed: int, count: int, truncation: float, device: torch.device) -> SheetColumns:
    """Return columns with independent noise."""
    drawn = math.ceil(count / BATCH_IMAGES) * BATCH_IMAGES
    return SheetColumns(GaussianNoise(seed, range(drawn), device, truncation=truncation), drawn, count)


def interpolated_columns(seed: int, steps: int, truncation: float, device: torch.device) -> SheetColumns:
    """Interpolate from the noise of the first column to that of the second, in equal steps."""
    ends = [GaussianNoise(seed, [position] * steps, device, truncation=truncation) for position in range(2)]
    names = ("first noise", *map(_percent, fractions(steps)[1:-1]), "second noise")
    return SheetColumns(InterpolatedNoise(ends[0], ends[1], fractions(steps)), steps, steps, names)


def style_columns(loaded: LoadedExport, images: Tensor, seed: int, truncation: float) -> SheetColumns:
    """Return one column per image (N, 3, S, S), with the noise that the system inverts the image to.

    The inverted noise replaces the first noise that the system draws; further noise is that of the first column of
    `noise_columns` in all columns. Raises ValueError if the system does not invert images.
    """
    if not isinstance(loaded.system, SupportsInvert):
        raise ValueError(f"--style-of: '{loaded.name}' does not invert images; give the export of a 'style' stage")
    with torch.inference_mode():
        inverted = loaded.system.invert(loaded.nets, images)
    rest = GaussianNoise(seed, [0] * len(images), images.device, truncation=truncation)
    return SheetColumns(FixedFirstNoise(inverted, rest), len(images), len(images), style_images=images.cpu())


def fractions(steps: int) -> list[float]:
    """Return `steps` values from 0 to 1 in equal steps."""
    return [step / (steps - 1) for step in range(steps)]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %"
