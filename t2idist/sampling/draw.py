"""Draw the images of one sentence: what the command ``t2idist sample`` and the Python API have in common."""

from __future__ import annotations

import sys
from numbers import Real

import torch
from PIL import Image

from t2idist import storage
from t2idist.contract import Captions, Sample, SupportsDomains, SupportsSample, SupportsTranslate
from t2idist.data.tokenizer import known_words
from t2idist.sampling.axes import BATCH_IMAGES, MIN_TRUNCATION, SheetColumns, SheetRow
from t2idist.sampling.figures import attention_figure
from t2idist.sampling.generate import generate
from t2idist.sampling.loading import LoadedExport

MAX_IMAGES = 1000
"""Most images of a sentence in one call: they are held in memory, 1 GB at 256 px."""
MAX_WORDS_PER_BATCH = 1024
"""Words in all captions of a batch; the memory of attention grows with it."""


def check_draws(loaded: LoadedExport, remedy: str) -> None:
    """Raise ValueError if an export draws no images; `remedy` says what to do with one that translates images."""
    where = storage.redact(loaded.url)
    if isinstance(loaded.system, SupportsTranslate | SupportsDomains):
        raise ValueError(f"{where}: this export translates images and generates none from sentences; use {remedy}")
    if not isinstance(loaded.system, SupportsSample):
        raise ValueError(f"{where}: this export does not generate images; give that of a generator")


def check_count(count: int, option: str) -> None:
    """Raise ValueError if so many images cannot be drawn; `option` is how the caller names the number."""
    if not 1 <= count <= MAX_IMAGES:
        raise ValueError(f"{option} {count}: give at least 1 and at most {MAX_IMAGES}")


def check_truncation(truncation: float | None, option: str) -> None:
    """Raise ValueError if noise cannot be limited to this magnitude; None is no limit."""
    if truncation is None:
        return
    if not isinstance(truncation, Real):
        raise ValueError(f"{option} is {truncation!r}; give a number")
    if not truncation >= MIN_TRUNCATION:
        raise ValueError(f"{option} {truncation:g}: give at least {MIN_TRUNCATION}")
    if sys.float_info.max < truncation < float("inf"):
        raise ValueError(f"{option}: the number has too many digits; give at most {sys.float_info.max:.0e}")


def images_per_batch(captions: Captions) -> int:
    """Return the number of images that are drawn together: fewer than `BATCH_IMAGES` only of very long captions."""
    return min(BATCH_IMAGES, max(1, MAX_WORDS_PER_BATCH // captions.tokens.shape[1]))


def draw_row(
    loaded: LoadedExport, row: SheetRow, columns: SheetColumns, device: torch.device, precision: str = "float32"
) -> Sample:
    """Draw the images of a row, and their attention maps, on the host."""
    assert isinstance(loaded.system, SupportsSample), "check_draws was not called"
    captions = row.caption.repeat_each(columns.drawn)
    sample = generate(
        loaded.system,
        row.nets,
        captions,
        columns.noise,
        device=device,
        batch_size=images_per_batch(captions),
        precision=precision,
    )
    return Sample(
        tuple(images[: columns.count] for images in sample.images),
        tuple(maps[: columns.count] for maps in sample.attention),
    )


def draw_attention(loaded: LoadedExport, sentence: str, sample: Sample, column: int) -> Image.Image:
    """Draw the attention map of every word of the sentence over one image of its row."""
    words = known_words(loaded.vocabulary, sentence)[: loaded.build_info.max_words]
    return attention_figure(sample.images[-1][column], words, [stage[column] for stage in sample.attention])
