"""From stored samples to the rows of a batch in host memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from t2idist.contract import Batch, Captions
from t2idist.data.reader import Bad, Encoded
from t2idist.data.shards import Split, VectorFacts
from t2idist.data.tokenizer import Vocabulary
from t2idist.data.transforms import CAPTION, WORDS, crop_and_flip, decode, fill_pyramid, shorter_side


@dataclass(frozen=True)
class RowTask:
    """What goes where: sample `index` of the split, with its random words, into row `row` of the batch."""

    row: int
    index: int
    draw: NDArray[np.uint64] | None
    encoded: Encoded | Bad


class BatchBuffer:
    """Host memory of one batch; rows may be filled by several threads."""

    def __init__(self, samples: int, sizes: Sequence[int], max_words: int, attributes: int, vector_dim: int) -> None:
        self.images = [np.zeros((samples, 3, size, size), dtype=np.uint8) for size in sizes]
        self.tokens = np.zeros((samples, max_words), dtype=np.int64)
        self.lengths = np.ones(samples, dtype=np.int64)
        self.class_ids = np.zeros(samples, dtype=np.int64)
        self.attributes = np.zeros((samples, attributes), dtype=np.float32)
        self.vectors = np.zeros((samples, vector_dim), dtype=np.float32)
        self.ids = [""] * samples
        self.bad: dict[int, str] = {}

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in (*self.images, *self._numbers))

    @property
    def _numbers(self) -> tuple[NDArray[Any], ...]:
        return self.tokens, self.lengths, self.class_ids, self.attributes, self.vectors

    def copy_row(self, source: int, target: int) -> None:
        for array in (*self.images, *self._numbers):
            array[target] = array[source]
        self.ids[target] = self.ids[source]

    def rows(self, kept: Sequence[int]) -> BatchBuffer:
        """Only these rows, in this order."""
        if len(kept) == len(self.ids):
            return self
        fewer = BatchBuffer(0, (), 0, 0, 0)
        fewer.images = [image[kept] for image in self.images]
        numbers = (array[kept] for array in self._numbers)
        fewer.tokens, fewer.lengths, fewer.class_ids, fewer.attributes, fewer.vectors = numbers
        fewer.ids = [self.ids[row] for row in kept]
        return fewer

    def batch(self, groups: int) -> Batch:
        return Batch(
            images=tuple(torch.from_numpy(image) for image in self.images),
            captions=Captions(*(torch.from_numpy(array) for array in (self.tokens, self.lengths, self.vectors))),
            class_ids=torch.from_numpy(self.class_ids),
            attributes=torch.from_numpy(self.attributes),
            ids=tuple(self.ids),
            groups=groups,
        )


@dataclass(frozen=True)
class SampleTransform:
    """How a sample becomes a row.

    attributes: number by name. crop, flip, vectors_mean_of: as in DataConfig. vectors: of the data set (None: it has
    none). caption: which one, where nothing is drawn.
    """

    split: Split
    vocabulary: Vocabulary
    attributes: Mapping[str, int]
    max_words: int
    crop: float
    flip: bool
    vectors: VectorFacts | None
    vectors_mean_of: int = 1
    caption: int = 0

    @property
    def vector_dim(self) -> int:
        return 0 if self.vectors is None else self.vectors.dim

    def arrays(self, samples: int, sizes: Sequence[int]) -> BatchBuffer:
        """Room for so many rows."""
        return BatchBuffer(samples, sizes, self.max_words, len(self.attributes), self.vector_dim)

    def fill(self, arrays: BatchBuffer, places: Sequence[RowTask]) -> None:
        """Fill the rows, which follow on each other; those that cannot be filled are named in `arrays.bad`."""
        size = arrays.images[-1].shape[-1]
        pictures = np.zeros((len(places), size, size, 3), dtype=np.uint8)
        for place, picture in zip(places, pictures, strict=True):
            try:
                self._fill_one(arrays, place, picture)
            except ValueError as error:
                arrays.bad[place.row] = str(error)
        rows = slice(places[0].row, places[-1].row + 1)
        fill_pyramid(pictures, [image[rows] for image in arrays.images])

    def _fill_one(self, arrays: BatchBuffer, place: RowTask, picture: NDArray[np.uint8]) -> None:
        row = place.row
        arrays.ids[row] = self.split.keys[place.index]
        if isinstance(place.encoded, Bad):
            raise ValueError(place.encoded.reason)
        ids, length, number = self.words(place.index, place.draw)
        if self.vectors is not None:
            arrays.vectors[row] = self._vector(self.vectors, place, number)
        size = picture.shape[0]
        decoded = decode(place.encoded, shorter_side(size, self.crop))
        picture[...] = np.asarray(crop_and_flip(decoded, size, self.crop, self.flip, place.draw))
        arrays.tokens[row], arrays.lengths[row] = ids, length
        arrays.class_ids[row] = self.split.class_ids[place.index]
        arrays.attributes[row, [self.attributes[name] for name in self.split.attributes(place.index)]] = 1.0

    def words(self, index: int, draw: NDArray[np.uint64] | None) -> tuple[NDArray[np.int64], int, int]:
        """A caption's word numbers, how many, and which caption; one with no known word gives way to the next."""
        captions = self.split.captions(index)
        if not captions:
            return np.zeros(self.max_words, dtype=np.int64), 1, 0  # a set without captions: one word of padding
        first = (self.caption if draw is None else int(draw[CAPTION])) % len(captions)
        seed = None if draw is None else int(draw[WORDS])
        for number in (*range(first, len(captions)), *range(first)):
            try:
                return *self.vocabulary.encode(captions[number], self.max_words, seed), number
            except ValueError:
                continue
        raise ValueError("no caption of it has a word of the vocabulary")

    def _vector(self, facts: VectorFacts, place: RowTask, number: int) -> NDArray[np.float32]:
        """That of caption `number`; in training the mean with those of others, drawn without repetition."""
        assert isinstance(place.encoded, Encoded)
        captions = len(self.split.captions(place.index))
        vectors = facts.read(place.encoded.vectors, captions)
        if not captions:
            return np.zeros(facts.dim, dtype=np.float32)
        chosen = [number]
        if place.draw is not None and self.vectors_mean_of > 1:
            generator = np.random.Generator(np.random.Philox(key=int(place.draw[CAPTION])))
            others = generator.permutation(np.delete(np.arange(captions), number))
            chosen += others[: self.vectors_mean_of - 1].tolist()
        return np.asarray(vectors[chosen].mean(axis=0), dtype=np.float32)
