"""Draw a contact sheet: images of a shard set with their captions."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from t2idist.data.shards import Dataset

_SIDE = 176
_GAP = 12
_COLUMNS = 6
_LINE = 13
_TEXT_LINES = 8
_CHARACTERS = 28


def choose_keys(dataset: Dataset, count: int = 24) -> list[str]:
    """Choose the keys for a sheet, spread evenly over each split; splits are sorted by name."""
    per_split = max(1, count // max(1, len(dataset.splits)))
    chosen = []
    for name in sorted(dataset.splits):
        split = dataset.splits[name]
        indices = sorted({i * len(split) // per_split for i in range(per_split)})
        chosen += [split.keys[i] for i in indices if i < len(split)]
    return chosen


def thumbnail(image: Image.Image) -> bytes:
    """Encode a thumbnail as PNG; its longer side is 176 pixels."""
    scale = _SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    out = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def draw_sheet(dataset: Dataset, thumbnails: Mapping[str, bytes]) -> bytes:
    """Draw the sheet as PNG."""
    cells = [
        (thumbnails[split.keys[i]], _sample_lines(name, split.keys[i], split.captions(i), split.attributes(i)))
        for name, split in sorted(dataset.splits.items())
        for i in range(len(split))
        if split.keys[i] in thumbnails
    ]
    cell_height = _SIDE + _TEXT_LINES * _LINE + _GAP
    rows = -(-len(cells) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * (_SIDE + _GAP) + _GAP, max(1, rows) * cell_height + _GAP), "white")
    canvas = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    for index, (png, text) in enumerate(cells):
        left = _GAP + index % _COLUMNS * (_SIDE + _GAP)
        upper = _GAP + index // _COLUMNS * cell_height
        sheet.paste(Image.open(io.BytesIO(png)), (left, upper))
        for number, line in enumerate(text):
            canvas.text(
                (left, upper + _SIDE + 2 + number * _LINE), line, fill="black" if number else "#777777", font=font
            )
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


def _sample_lines(split: str, key: str, captions: Sequence[str], attributes: Sequence[str]) -> list[str]:
    texts = list(captions) or ([", ".join(attributes)] if attributes else ["(no caption)"])
    lines = [f"{split} {key}"[:_CHARACTERS]]
    for text in texts:
        lines += textwrap.wrap(text[:400], _CHARACTERS)
    return lines if len(lines) <= _TEXT_LINES else [*lines[: _TEXT_LINES - 1], "..."]
