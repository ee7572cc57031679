"""Turn encoded samples into the rows of a batch in host memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from t2idist.contract import Batch, Captions
from t2idist.data.decoded_cache import DecodedCache
from t2idist.data.pairs import Pairs, halves, outlines
from t2idist.data.reader import parse
from t2idist.data.samples import BadSample, EncodedImage, Sample, StoredSample
from t2idist.data.shards import SentenceVectorInfo, Split
from t2idist.data.tokenizer import Vocabulary
from t2idist.data.transforms import CAPTION, WORD_SUBSET, crop_and_flip, decode, fill_pyramid, shorter_side


@dataclass(frozen=True)
class RowTask:
    """One row of a batch to fill."""

    row: int
    index: int
    """Index of the sample in its split."""
    bits: NDArray[np.uint64] | None
    """(8,) random bits of the sample's position in the run; None: no augmentation (evaluation)."""
    sample: Sample


class BatchBuffer:
    """Host memory of one batch; several threads may fill different rows.

    Args:
        sizes: Pixels of each side of the images, lowest first.
        paired: Whether every sample has two images.
        for_device: The batch goes to an accelerator. Its memory is page-locked: only from such memory the device copies
            while the host goes on. It has images of the largest size, of which the device makes the others.
    """

    def __init__(
        self, samples: int, sizes: Sequence[int], max_words: int, attributes: int, vector_dim: int,
        paired: bool = False, for_device: bool = False,
    ) -> None:  # fmt: skip
        pinned = for_device and torch.accelerator.is_available()

        def zeros(*shape: int, dtype: torch.dtype) -> NDArray[Any]:
            array: NDArray[Any] = torch.zeros(samples, *shape, dtype=dtype, pin_memory=pinned).numpy()
            return array

        def pixels(*shape: int) -> NDArray[np.uint8]:  # `fill` writes all of them
            array: NDArray[np.uint8] = torch.empty(samples, *shape, dtype=torch.uint8, pin_memory=pinned).numpy()
            return array

        self.pyramid_sizes = tuple(sizes) if for_device else ()
        shapes = [(sizes[-1], sizes[-1], 4)] if for_device else [(3, size, size) for size in sizes]
        self.images = [pixels(*shape) for shape in shapes]
        self.partners = [pixels(*shape) for shape in shapes if paired]
        self.tokens = zeros(max_words, dtype=torch.int64)
        self.lengths = zeros(dtype=torch.int64)
        self.lengths[...] = 1
        self.class_ids = zeros(dtype=torch.int64)
        self.attributes = zeros(attributes, dtype=torch.float32)
        self.vectors = zeros(vector_dim, dtype=torch.float32)
        self.ids = [""] * samples
        self.bad: dict[int, str] = {}
        """Rows that could not be filled, with the reason."""

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays)

    @property
    def _arrays(self) -> tuple[NDArray[Any], ...]:
        return *self.images, *self.partners, *self._labels

    @property
    def _labels(self) -> tuple[NDArray[Any], ...]:
        return self.tokens, self.lengths, self.class_ids, self.attributes, self.vectors

    def copy_row(self, source: int, target: int) -> None:
        for array in self._arrays:
            array[target] = array[source]
        self.ids[target] = self.ids[source]

    def select(self, rows: Sequence[int]) -> BatchBuffer:
        """Return these rows, in this order."""
        if len(rows) == len(self.ids):
            return self
        selected = BatchBuffer(0, (), 0, 0, 0)
        selected.pyramid_sizes = self.pyramid_sizes
        selected.images = [image[rows] for image in self.images]
        selected.partners = [image[rows] for image in self.partners]
        labels = (array[rows] for array in self._labels)
        selected.tokens, selected.lengths, selected.class_ids, selected.attributes, selected.vectors = labels
        selected.ids = [self.ids[row] for row in rows]
        return selected

    def to_batch(self, groups: int) -> Batch:
        return Batch(
            images=tuple(torch.from_numpy(image) for image in self.images),
            captions=Captions(*(torch.from_numpy(array) for array in (self.tokens, self.lengths, self.vectors))),
            class_ids=torch.from_numpy(self.class_ids),
            attributes=torch.from_numpy(self.attributes),
            ids=tuple(self.ids),
            groups=groups,
            partners=tuple(torch.from_numpy(image) for image in self.partners),
            pyramid_sizes=self.pyramid_sizes,
        )


@dataclass(frozen=True)
class SampleTransform:
    """The transform from a sample to a row of a batch."""

    split: Split
    vocabulary: Vocabulary
    attributes: Mapping[str, int]
    """Column of each attribute."""
    max_words: int
    crop: float
    """As in DataConfig."""
    flip: bool
    random_crop: bool
    vector_info: SentenceVectorInfo | None
    """The data set's sentence vectors (None: it has none)."""
    vectors_mean_of: int = 1
    """As in DataConfig."""
    caption: int = 0
    """The caption to use if none is drawn."""
    decoded_cache: DecodedCache | None = None
    """Where decoded images are put."""
    pairs: Pairs | None = None
    """How a stored image becomes two (None: it is one)."""

    @property
    def vector_dim(self) -> int:
        return 0 if self.vector_info is None else self.vector_info.dim

    def new_buffer(self, samples: int, sizes: Sequence[int], for_device: bool = False) -> BatchBuffer:
        """Allocate a buffer of that many rows, with images of these sizes."""
        paired = self.pairs is not None
        return BatchBuffer(samples, sizes, self.max_words, len(self.attributes), self.vector_dim, paired, for_device)

    def fill(self, buffer: BatchBuffer, tasks: Sequence[RowTask]) -> None:
        """Fill consecutive rows; record those that cannot be filled in `buffer.bad`."""
        rows = slice(tasks[0].row, tasks[-1].row + 1)
        pyramids = [buffer.images, *([buffer.partners] if buffer.partners else [])]
        if buffer.pyramid_sizes:
            images = [pixels[rows].view(np.uint32)[..., 0] for (pixels,) in pyramids]
        else:
            size = buffer.images[-1].shape[-1]
            images = [np.zeros((len(tasks), size, size), dtype=np.uint32) for _ in pyramids]
        for place, task in enumerate(tasks):
            try:
                self._fill_row(buffer, task, [of_kind[place] for of_kind in images])
            except ValueError as error:
                buffer.bad[task.row] = str(error)
        if not buffer.pyramid_sizes:
            for of_kind, pyramid in zip(images, pyramids, strict=True):
                fill_pyramid(of_kind, [image[rows] for image in pyramid])

    def _fill_row(self, buffer: BatchBuffer, task: RowTask, images: Sequence[NDArray[np.uint32]]) -> None:
        row = task.row
        buffer.ids[row] = self.split.keys[task.index]
        sample = parse(task.sample) if isinstance(task.sample, StoredSample) else task.sample
        if isinstance(sample, BadSample):
            raise ValueError(sample.reason)
        tokens, length, caption = self.encode_caption(task.index, task.bits)
        if self.vector_info is not None:
            buffer.vectors[row] = self._sentence_vector(self.vector_info, task, sample.vectors, caption)
        size = images[0].shape[-1]
        if isinstance(sample, EncodedImage):
            whole = self.pairs is Pairs.STORED  # half of an image at a fraction of its size may end within a pixel
            sample = decode(sample, None if whole else shorter_side(size, self.crop))
            if self.decoded_cache is not None:
                self.decoded_cache.put(task.index, sample)
        stored = halves(sample) if self.pairs is Pairs.STORED else (sample,)
        for each, out in zip(stored, images[-len(stored) :], strict=True):
            crop_and_flip(each, size, self.crop, self.flip, task.bits, self.random_crop, out)
        if self.pairs is Pairs.OUTLINES:
            images[0][...] = outlines(images[1])
        buffer.tokens[row], buffer.lengths[row] = tokens, length
        buffer.class_ids[row] = self.split.class_ids[task.index]
        buffer.attributes[row, [self.attributes[name] for name in self.split.attributes(task.index)]] = 1.0

    def encode_caption(self, index: int, bits: NDArray[np.uint64] | None) -> tuple[NDArray[np.int64], int, int]:
        """Encode a caption of a sample.

        A caption without known words is skipped in favour of the next one. A sample of a set without captions gets one
        token of padding.

        Returns:
            Token ids (max_words,), their number, and the index of the caption.

        Raises:
            ValueError: If the sample has captions, but none with a known word.
        """
        captions = self.split.captions(index)
        if not captions:
            return np.zeros(self.max_words, dtype=np.int64), 1, 0
        first = (self.caption if bits is None else int(bits[CAPTION])) % len(captions)
        seed = None if bits is None else int(bits[WORD_SUBSET])
        for caption in (*range(first, len(captions)), *range(first)):
            try:
                return *self.vocabulary.encode(captions[caption], self.max_words, seed), caption
            except ValueError:
                continue
        raise ValueError("no caption of it has a word of the vocabulary")

    def _sentence_vector(
        self, info: SentenceVectorInfo, task: RowTask, stored: bytes, caption: int
    ) -> NDArray[np.float32]:
        """Return the sentence vector (D,) of a caption; in training, averaged with other captions of the image."""
        captions = len(self.split.captions(task.index))
        vectors = info.decode(stored, captions)
        if not captions:
            return np.zeros(info.dim, dtype=np.float32)
        chosen = [caption]
        if task.bits is not None and self.vectors_mean_of > 1:
            generator = np.random.Generator(np.random.Philox(key=int(task.bits[CAPTION])))
            others = generator.permutation(np.delete(np.arange(captions), caption))
            chosen += others[: self.vectors_mean_of - 1].tolist()
        return np.asarray(vectors[chosen].mean(axis=0), dtype=np.float32)
