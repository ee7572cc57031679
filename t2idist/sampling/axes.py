"""The two axes of a sheet of pictures: what each row says, and which noise each column has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from t2idist.contract import Captions, SupportsInvert
from t2idist.sampling.generate import ArcDraw, GivenDraw, NormalDraw, RowsDraw
from t2idist.sampling.loading import Loaded

PLACEHOLDER = "{}"
SMALLEST_TRUNCATION = 0.01


# ------------------------------------------------------------------------------------------------ rows
@dataclass(frozen=True)
class Row:
    """One caption, as people read it and as `nets` read it."""

    label: str
    caption: Captions
    nets: Mapping[str, nn.Module]


def changed_words(given: str) -> list[str]:
    """The words of "red, light blue". Raises ValueError where one is empty."""
    words = [word.strip() for word in given.split(",")]
    if not all(words):
        raise ValueError(f'--change-word "{given}": give words with commas between them')
    return words


def fill_in(sentences: Sequence[str], words: Sequence[str]) -> list[str]:
    """Every sentence once with each word in the place of "{}". Raises ValueError where a sentence has no such place."""
    without = next((sentence for sentence in sentences if PLACEHOLDER not in sentence), None)
    if without is not None:
        raise ValueError(f'--change-word: "{without}" has no {PLACEHOLDER} where the word should stand')
    return [sentence.replace(PLACEHOLDER, word) for sentence in sentences for word in words]


def plain_rows(loaded: Loaded, sentences: Sequence[str], captions: Captions) -> list[Row]:
    return [Row(label, captions[i : i + 1], loaded.nets) for i, label in enumerate(sentences)]


def rows_between(loaded: Loaded, sentences: Sequence[str], captions: Captions, steps: int) -> list[Row]:
    """`steps` rows from the first of two captions to the second, in equal steps: what the text encoder says of them
    (words and sentence) goes straight from one to the other, or, without an encoder, the data's vectors do.

    captions: two, on the device of the networks.
    """
    first, second = captions[:1], captions[1:]
    labels = [sentences[0], *(f"{_percent(share)} of the way" for share in shares(steps)[1:-1]), sentences[1]]
    if "text" not in loaded.nets:
        ways = [torch.lerp(first.vectors, second.vectors, share) for share in shares(steps)]
        between = [Captions(first.tokens, first.lengths, vectors) for vectors in ways]
        return [Row(label, caption, loaded.nets) for label, caption in zip(labels, between, strict=True)]
    (words, sentence), (other_words, other_sentence) = aligned(loaded.nets["text"], first, second)
    count = math.lcm(int(first.lengths), int(second.lengths))
    full = Captions(first.tokens.new_zeros(1, count), first.lengths.new_full((1,), count), first.vectors)
    rows = []
    for label, share in zip(labels, shares(steps), strict=True):
        says = Says(torch.lerp(words, other_words, share), torch.lerp(sentence, other_sentence, share))
        rows.append(Row(label, full, {**loaded.nets, "text": says}))
    return rows


def aligned(encoder: nn.Module, first: Captions, second: Captions) -> list[tuple[Tensor, Tensor]]:
    """Words (1, D, L) and sentence (1, D) of each of two captions of one row, their words paired in their order.

    L is the least common multiple of the two lengths, every word standing several times in its place. Attention gives
    the copies of a word together what it gives the word, so that both still say what they say alone, without padding,
    and between them there is no jump. An encoder without words (T = 0) has none here either.
    """
    count = math.lcm(int(first.lengths), int(second.lengths))
    ends = []
    for caption in (first, second):
        with torch.inference_mode():
            words, sentence = encoder(caption.tokens, caption.lengths)
        length = int(caption.lengths)
        ends.append((words[:, :, :length].repeat_interleave(count // length, dim=2), sentence))
    return ends


class Says(nn.Module):
    """In the place of a text encoder: says the same of whatever N captions it is asked about."""

    def __init__(self, words: Tensor, sentence: Tensor) -> None:
        super().__init__()
        self.register_buffer("words", words)
        self.register_buffer("sentence", sentence)

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        words, sentence = self.get_buffer("words"), self.get_buffer("sentence")
        return words.expand(len(tokens), -1, -1), sentence.expand(len(tokens), -1)


# ------------------------------------------------------------------------------------------------ columns
@dataclass(frozen=True)
class Columns:
    """One noise for each column. names: a few letters over each, or none. pictures: (C, 3, S, S) over them, or None."""

    draw: RowsDraw
    count: int
    names: tuple[str, ...] = ()
    pictures: Tensor | None = None


def plain_columns(seed: int, count: int, truncation: float, device: torch.device) -> Columns:
    return Columns(NormalDraw(seed, range(count), device, truncation=truncation), count)


def columns_between(seed: int, steps: int, truncation: float, device: torch.device) -> Columns:
    """From the first of the plain columns to the second, in equal steps."""
    ends = [NormalDraw(seed, [place] * steps, device, truncation=truncation) for place in range(2)]
    names = ("first noise", *map(_percent, shares(steps)[1:-1]), "second noise")
    return Columns(ArcDraw(ends[0], ends[1], shares(steps)), steps, names)


def style_columns(loaded: Loaded, pictures: Tensor, seed: int, truncation: float) -> Columns:
    """One column for each picture (N, 3, S, S): its z is what a system draws first; what it draws after that is of the
    first plain column for all.

    Raises ValueError where the system does not find the z of pictures.
    """
    if not callable(getattr(loaded.system, "invert", None)):
        raise ValueError(f"--style-of: an export of '{loaded.name}' does not find styles; give that of a 'style' stage")
    with torch.inference_mode():
        codes = cast(SupportsInvert, loaded.system).invert(loaded.nets, pictures)
    rest = NormalDraw(seed, [0] * len(pictures), pictures.device, truncation=truncation)
    return Columns(GivenDraw(codes, rest), len(pictures), pictures=pictures.cpu())


def shares(steps: int) -> list[float]:
    """`steps` numbers in equal steps from 0 to 1."""
    return [step / (steps - 1) for step in range(steps)]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
