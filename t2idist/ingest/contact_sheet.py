"""A contact sheet: pictures of a shard set with their captions, to look at."""

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
_CHARACTERS = 32


def choose(dataset: Dataset, count: int = 24) -> list[str]:
    """Keys for a sheet: spread evenly over each split, the splits by name."""
    of_each = max(1, count // max(1, len(dataset.splits)))
    chosen = []
    for name in sorted(dataset.splits):
        split = dataset.splits[name]
        places = sorted({i * len(split) // of_each for i in range(of_each)})
        chosen += [split.keys[i] for i in places if i < len(split)]
    return chosen


def thumbnail(image: Image.Image) -> bytes:
    """As PNG, its longer side 176 pixels."""
    scale = _SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    out = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def draw_sheet(dataset: Dataset, thumbnails: Mapping[str, bytes]) -> bytes:
    """The sheet as PNG."""
    cells = [
        (thumbnails[split.keys[i]], _text(name, split.keys[i], split.captions(i), split.attributes(i)))
        for name, split in sorted(dataset.splits.items())
        for i in range(len(split))
        if split.keys[i] in thumbnails
    ]
    high = _SIDE + _TEXT_LINES * _LINE + _GAP
    rows = -(-len(cells) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * (_SIDE + _GAP) + _GAP, max(1, rows) * high + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    for place, (png, text) in enumerate(cells):
        left = _GAP + place % _COLUMNS * (_SIDE + _GAP)
        upper = _GAP + place // _COLUMNS * high
        sheet.paste(Image.open(io.BytesIO(png)), (left, upper))
        for number, line in enumerate(text):
            pen.text((left, upper + _SIDE + 2 + number * _LINE), line, fill="black" if number else "#777777", font=font)
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


def _text(split: str, key: str, captions: Sequence[str], attributes: Sequence[str]) -> list[str]:
    said = list(captions) or ([", ".join(attributes)] if attributes else ["(no caption)"])
    lines = [f"{split} {key}"[: _CHARACTERS + 4]]
    for caption in said:
        lines += textwrap.wrap(caption[:400], _CHARACTERS)
    return lines if len(lines) <= _TEXT_LINES else [*lines[: _TEXT_LINES - 1], "..."]
