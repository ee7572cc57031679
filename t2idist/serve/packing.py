"""Images of several requests in one batch, each equal to the last bit to what ``t2idist sample`` draws.

`sample` draws the images of a sentence in whole batches of one size: image i is row ``i % size`` of its batch. Rounding
depends on the size of a batch, so every batch here has that size. It may also depend on the row (MirrorGAN), and a
system may mix the rows of a batch (compat=authors); `find_layout` tries out what an export allows.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from t2idist.contract import Captions, Sample, SupportsSample
from t2idist.sampling.draw import images_per_batch
from t2idist.sampling.generate import GaussianNoise, empty_captions, generate
from t2idist.sampling.loading import LoadedExport
from t2idist.sampling.sentence_encoders import vector_captions
from t2idist.sampling.sentence_reader import reads_sentences

TRIALS = 4
"""Pairs of sentences that are drawn apart and together. One is not enough: where the row of an image matters, many
images still have the same bits in every row (in one pair of three, of a small DM-GAN)."""


class Packing(enum.Enum):
    """Which rows of a batch an image may be drawn in."""

    ANY_ROW = "any row"
    OWN_ROW = "the row that it has in `sample`"
    ALONE = "only with images of its own sentence"


@dataclass(frozen=True)
class Row:
    """One image to draw."""

    captions: Captions
    """Its sentence: one caption, on the device."""
    seed: int
    position: int
    """Index of the image among those of its sentence."""
    truncation: float


class RowNoise:
    """``noise(*shape) -> (N, *shape)``: the noise of each row by its own seed and position."""

    def __init__(self, rows: Sequence[Row], device: torch.device) -> None:
        self._rows, self._device = rows, device
        self._sources = [GaussianNoise(row.seed, [row.position], device, truncation=row.truncation) for row in rows]

    def __call__(self, *shape: int) -> Tensor:
        return torch.cat([source(*shape) for source in self._sources])

    def __getitem__(self, rows: slice) -> RowNoise:
        return RowNoise(self._rows[rows], self._device)


def draw_rows(loaded: LoadedExport, rows: Sequence[Row], device: torch.device) -> Sample:
    """Draw one batch; the caller fills it to `images_per_batch`."""
    assert isinstance(loaded.system, SupportsSample)
    captions = Captions(
        torch.cat([row.captions.tokens for row in rows]),
        torch.cat([row.captions.lengths for row in rows]),
        torch.cat([row.captions.vectors for row in rows]),
    )
    noise = RowNoise(rows, device)
    return generate(loaded.system, loaded.nets, captions, noise, device=device, batch_size=len(rows))


def fill(rows: Sequence[Row | None]) -> list[Row]:
    """Fill the empty rows of a batch with copies of another; at least one is not empty."""
    filler = next(row for row in rows if row is not None)
    return [filler if row is None else row for row in rows]


@dataclass(frozen=True)
class Layout:
    """How an export draws a batch."""

    size: int
    """Images in a batch."""
    packing: Packing
    scales: tuple[int, ...]
    """Pixels of a side of the images of each scale, lowest first."""
    attention: bool
    """Whether there are attention maps."""


def find_layout(loaded: LoadedExport, device: torch.device) -> Layout:
    """Draw images of two sentences apart and together, and return how they may share a batch."""
    captions = _two_sentences(loaded, device)
    size, packing = images_per_batch(captions[0]), Packing.ANY_ROW
    for trial in range(TRIALS):
        sentences = [
            [Row(each, seed, i, float("inf")) for i in range(size)] for seed, each in enumerate(captions, 2 * trial)
        ]
        samples = [draw_rows(loaded, rows, device) for rows in sentences]
        packing = _find_packing(loaded, sentences, samples, device, packing)
    scales = tuple(int(scale.shape[-1]) for scale in samples[0].images)
    return Layout(size, packing, scales, bool(samples[0].attention))


def _find_packing(
    loaded: LoadedExport,
    sentences: Sequence[Sequence[Row]],
    samples: Sequence[Sample],
    device: torch.device,
    packing: Packing,
) -> Packing:
    """Draw the rows of two sentences, of which the samples have the images, together in as far as `packing` allows."""
    apart = {id(row): image for rows, s in zip(sentences, samples, strict=True) for row, image in _images(rows, s)}

    def equal(batches: Sequence[Sequence[Row]]) -> bool:
        drawn = (pair for rows in batches for pair in _images(rows, draw_rows(loaded, rows, device)))
        return all(_same(image, apart[id(row)]) for row, image in drawn)

    alternating = [[sentences[(i + start) % 2][i] for i in range(len(sentences[0]))] for start in range(2)]
    if packing is Packing.ALONE or not equal(alternating):
        return Packing.ALONE
    moved = [[*rows[1:], rows[0]] for rows in alternating] + [rows[::-1] for rows in alternating]
    return Packing.ANY_ROW if packing is Packing.ANY_ROW and equal(moved) else Packing.OWN_ROW


def _two_sentences(loaded: LoadedExport, device: torch.device) -> list[Captions]:
    """Return two captions of different words and lengths, as far as the export reads captions."""
    if not reads_sentences(loaded):
        return [empty_captions(1).to(device)] * 2
    generator = torch.Generator().manual_seed(0)
    if "text" not in loaded.nets:
        vectors = torch.randn(2, loaded.build_info.data.vector_dim, generator=generator)
        captions = vector_captions(vectors.numpy()).to(device)
        return [captions[:1], captions[1:]]
    longest, words = loaded.build_info.max_words, max(2, len(loaded.vocabulary))
    sentences = []
    for length in (max(1, longest // 2), longest):
        tokens = torch.zeros(1, longest, dtype=torch.int64)
        tokens[0, :length] = torch.randint(1, words, (length,), generator=generator)
        sentences.append(Captions(tokens, torch.tensor([length]), torch.zeros(1, 0)).to(device))
    return sentences


def _images(rows: Sequence[Row], sample: Sample) -> list[tuple[Row, tuple[Tensor, ...]]]:
    """Return each row with its images and attention maps."""
    return [(row, tuple(x[i] for x in (*sample.images, *sample.attention))) for i, row in enumerate(rows)]


def _same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
