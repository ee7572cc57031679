"""The Python API: draw, translate and embed with an export, as the commands do."""

from __future__ import annotations

import functools
import io
import operator
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import numpy as np
from numpy.typing import NDArray
from PIL import ImageOps
from torch import Tensor

from t2idist import storage
from t2idist.contract import Captions, Sample
from t2idist.data.pillow import Image
from t2idist.data.sample_format import MAX_PIXELS
from t2idist.data.single_image import image_of_file
from t2idist.nn.fast.layers import use_fast_layers
from t2idist.sampling.axes import BATCH_IMAGES, SheetRow, noise_columns
from t2idist.sampling.draw import check_count, check_draws, check_truncation, draw_attention, draw_row
from t2idist.sampling.figures import png_bytes, read_image, tiles, to_pil
from t2idist.sampling.generate import empty_captions
from t2idist.sampling.loading import LoadedExport, load_export, open_device
from t2idist.sampling.sentence_reader import SentenceReader, reads_sentences
from t2idist.sampling.translate import change_of

SHOWN_IMAGES = 64
SHOWN_WIDTH = 1100
"""Width of the grid that a notebook shows, in pixels."""
_FILE_MODES = {"1": "PNG", "L": "PNG", "LA": "PNG", "P": "PNG", "RGB": "PNG", "RGBA": "PNG"}
_FILE_MODES |= {"I": "TIFF", "I;16": "PNG", "F": "TIFF"}
"""Format of a file that holds an image of this mode without loss."""


class Images(list[Image.Image]):
    """A list of images that a notebook shows as a grid: the first `SHOWN_IMAGES` of them."""

    def _repr_png_(self) -> bytes | None:
        return png_bytes(tiles(self[:SHOWN_IMAGES], SHOWN_WIDTH)) if self else None


class Model:
    """An export that is ready to draw images from sentences, translate images or embed sentences.

    What it draws is what the commands ``t2idist sample`` and ``t2idist translate`` draw, to the last bit. Words that
    the model does not read are named in a `UserWarning`. Every method raises ValueError for input that it cannot use.

    Args:
        loaded: the export.
        device: where its networks are, such as "cpu" or "cuda".
        encoder: encoder of sentence vectors, for an export that reads them (as ``t2idist sample --encoder``).
    """

    def __init__(self, loaded: LoadedExport, device: str = "cpu", encoder: str | None = None) -> None:
        self.loaded = loaded
        self._device = open_device(device, "device")
        self._encoder = encoder
        for net in loaded.nets.values():
            use_fast_layers(net)
        if encoder is not None:
            _ = self._reader

    def __repr__(self) -> str:
        loaded = self.loaded
        where, size = storage.redact(loaded.url), loaded.system.sizes[-1]
        return f"<t2idist.Model {where}: {loaded.name}, {size} px, after {loaded.images:,} images>"

    def draw(
        self, text: str | None = None, n: int = BATCH_IMAGES, seed: int = 0, *, truncation: float | None = None
    ) -> Images:
        """Draw images of a sentence; equal arguments give equal images, and image i does not depend on `n`.

        Args:
            text: the sentence; None for a model without text.
            n: number of images, each of other noise.
            seed: seed of the noise.
            truncation: redraw noise of a magnitude above this: better images, less variety.

        Returns:
            A list of n PIL images, which a notebook shows as a grid.
        """
        sample = self._draw(text, n, seed, truncation)
        return Images(to_pil(image) for image in sample.images[-1])

    def attention(self, text: str, n: int = 1, seed: int = 0, *, truncation: float | None = None) -> Images:
        """Draw the attention map of every word over the images that `draw` returns for the same arguments.

        Returns:
            A list of n PIL images, one figure for each image, as ``t2idist sample --attention`` writes them.
        """
        sample = self._draw(text, n, seed, truncation)
        if not sample.attention:
            raise ValueError(f"{self._where}: '{self.loaded.name}' has no attention to show; use draw()")
        return Images(draw_attention(self.loaded, text, sample, column) for column in range(len(sample.images[-1])))

    def translate(
        self,
        image: str | os.PathLike[str] | Image.Image,
        *,
        set: str | Sequence[str] = (),
        clear: str | Sequence[str] = (),
        domain: int = 0,
        to: str | None = None,
    ) -> Image.Image:
        """Change attributes of an image, or translate it to another domain, as ``t2idist translate`` does.

        Args:
            image: path or URL of an image file, or a PIL image; its central square is used.
            set: attributes to set, or one; those that exclude them are cleared.
            clear: attributes to clear, or one.
            domain: index of the data set with these attributes.
            to: domain to translate to, of a model that translates between domains; None: the only one it has.
        """
        change = change_of(self.loaded, _names("set", set), _names("clear", clear), _whole_number("domain", domain), to)
        pixels = _read(image, self.loaded.system.sizes[-1])
        return to_pil(change.apply(self.loaded, pixels, self._device))

    def embed(self, text: str) -> NDArray[np.float32]:
        """Return the vector (D,) of a sentence: of the export's text encoder, or of the encoder given to `load`."""
        if not reads_sentences(self.loaded):
            raise ValueError(f"{self._where}: '{self.loaded.name}' has no text encoder")
        vector: NDArray[np.float32] = self._reader.embed(self._read_text(text))[0]
        return vector

    @property
    def _where(self) -> str:
        return storage.redact(self.loaded.url)

    @functools.cached_property
    def _reader(self) -> SentenceReader:
        if not reads_sentences(self.loaded):
            raise ValueError(f"encoder: {self._where} reads no sentences; remove it")
        reader = SentenceReader(self.loaded, self._device, self._encoder, option="encoder")
        _warn(reader.warnings)
        return reader

    def _draw(self, text: str | None, n: int, seed: int, truncation: float | None) -> Sample:
        check_draws(self.loaded, "translate()")
        n, seed = _whole_number("n", n), _whole_number("seed", seed)
        check_count(n, "n")
        check_truncation(truncation, "truncation")
        if reads_sentences(self.loaded):
            captions = self._read_text(text)
        elif text is None:
            captions = empty_captions(1)
        else:
            raise ValueError(f"{self._where}: this export is unconditional; give no text")
        columns = noise_columns(seed, n, float("inf") if truncation is None else truncation, self._device)
        row = SheetRow(text or "", captions.to(self._device), self.loaded.nets)
        return draw_row(self.loaded, row, columns, self._device)

    def _read_text(self, text: str | None) -> Captions:
        """Encode a sentence, and warn of what is left out of it."""
        read = self._reader.read_text(text)
        _warn(read.warnings)
        return read.captions


def load(url: str | os.PathLike[str], *, device: str = "cpu", encoder: str | None = None, system: str = "") -> Model:
    """Load an export, so that Python code can draw with it.

    Args:
        url: folder of the export: a path, or a URL such as "s3://bucket/runs/mine/attngan/export".
        device: "cpu" or "cuda". On GPUs, TF32 is switched off for the whole process, as the commands do.
        encoder: name, folder or URL of the sentence encoder, if the export reads sentence vectors.
        system: module of the custom system that the export names; its code runs.

    Raises:
        ValueError: there is no export, it is damaged, or does not fit the other arguments.
    """
    loaded = load_export(os.fspath(url), open_device(device, "device"), system, option="system=")
    return Model(loaded, device, encoder)


def _warn(messages: Sequence[str]) -> None:
    """Issue warnings at the line of the caller's code that called this package."""
    package = os.path.dirname(os.path.dirname(__file__)) + os.sep
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        frame, level = frame.f_back, level + 1
    for message in messages:
        warnings.warn(message, UserWarning, stacklevel=level)


def _names(name: str, given: str | Sequence[str]) -> tuple[str, ...]:
    if not isinstance(given, Iterable):
        raise ValueError(f"{name} is {given!r}; give the name of an attribute, or a list of them")
    return (given,) if isinstance(given, str) else tuple(given)


def _whole_number(name: str, value: SupportsIndex) -> int:
    """Return the value as an int. Raises ValueError if it is not a whole number."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}; give a whole number") from None


def _read(image: str | os.PathLike[str] | Image.Image, size: int) -> Tensor:
    """Return the central square of an image, (3, size, size) in [-1, 1]."""
    if isinstance(image, Image.Image):
        return image_of_file(_file_of(image), size, "image")
    if not isinstance(image, str | os.PathLike):
        raise ValueError(f"image is a {type(image).__name__}; give a path, a URL or a PIL image")
    return read_image(os.fspath(image), size)


def _file_of(image: Image.Image) -> bytes:
    """Encode a PIL image as an upright file, without loss, so that it is read as every other file."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"image: {image.width} x {image.height} pixels; at most {MAX_PIXELS}")
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode not in _FILE_MODES:
            upright = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
        buffer = io.BytesIO()
        upright.save(buffer, format=_FILE_MODES[upright.mode])
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise ValueError(f"image: does not decode: {type(error).__name__}: {error}") from None
    return buffer.getvalue()
