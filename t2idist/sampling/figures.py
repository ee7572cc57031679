"""Pictures for people: grids of captions by noise draws, and the attention of every word."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from t2idist import storage
from t2idist.contract import to_float, to_uint8
from t2idist.data.reader import Encoded
from t2idist.data.sample_format import EXTENSIONS
from t2idist.data.transforms import crop_and_flip, decode

PAPER = (255, 255, 255)
INK = (28, 30, 36)
FAINT = (120, 124, 134)
GAP = 4
BLOCK_GAP = 14
HEAD = 30
NAMES = 22
SMALLEST_CELL = 96
CAPTION_WIDTH = 250
WORDS_A_ROW = 9
HEAD_LINES = 3

_HEAT = np.array([(18, 10, 60), (120, 28, 109), (229, 80, 57), (252, 165, 10), (252, 255, 164)], dtype=np.float32)


def to_picture(image: Tensor) -> Image.Image:
    """A PIL picture of one image (3, H, W) in [-1, 1]."""
    levels = to_uint8(image.detach().float().cpu())
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def read_picture(url: str, size: int) -> Tensor:
    """The middle square of a picture file, (3, size, size) in [-1, 1]. Raises ValueError that names the file."""
    where = storage.redact(url)
    extension = url.rpartition(".")[2].lower().replace("jpeg", "jpg")
    if extension not in EXTENSIONS:
        raise ValueError(f"{where}: not a picture that is read here; they end in {', '.join(EXTENSIONS)}")
    try:
        data = storage.read_bytes(url)
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror or type(error).__name__}") from None
    try:
        picture = crop_and_flip(decode(Encoded(data, extension), size), size, 1.0, False, None)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return to_float(torch.from_numpy(np.array(picture)).permute(2, 0, 1))


def png_bytes(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=False)
    return buffer.getvalue()


def grid(
    scales: Sequence[Tensor],
    captions: Sequence[str],
    columns: int,
    real: Tensor | None = None,
    *,
    names: Sequence[str] = (),
    tops: Tensor | None = None,
) -> Image.Image:
    """Fixed captions (rows) by fixed noise draws (columns), one block of columns for each scale, largest last.

    scales: lowest size first, each (R * columns, 3, S, S) in [-1, 1] in row-major order, R = number of captions. Small
    sizes are enlarged without smoothing, so that all scales show equally large. real: (R, 3, S, S), a real picture of
    each caption, shown in a first block. names: a few letters over each column. tops: (columns, 3, S, S), the picture
    over each column whose style it has.
    """
    rows = len(captions)
    for images in scales:
        if len(images) != rows * columns:
            raise ValueError(f"grid: {len(images)} images; {rows} captions in {columns} columns need {rows * columns}")
    if real is not None and len(real) != rows:
        raise ValueError(f"grid: {len(real)} real images for {rows} captions")
    cell = _cell(max(int(images.shape[-1]) for images in scales))
    blocks = [] if real is None else [("real", real, 1)]
    blocks += [(f"{int(images.shape[-1])} px", images, columns) for images in scales]
    font = ImageFont.load_default(size=17)
    tops_at = HEAD + (NAMES if names else 0)
    top = tops_at + (0 if tops is None else cell + BLOCK_GAP)
    width = CAPTION_WIDTH + sum(n * (cell + GAP) + BLOCK_GAP for _, _, n in blocks) + BLOCK_GAP
    sheet = Image.new("RGB", (width, top + rows * (cell + GAP) + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    for row, caption in enumerate(captions):
        _caption(pen, caption, font, (12, top + row * (cell + GAP)), (CAPTION_WIDTH - 24, cell))
    if tops is not None:
        _caption(pen, "in the style of", font, (12, tops_at), (CAPTION_WIDTH - 24, cell))
    left = CAPTION_WIDTH
    for title, images, n in blocks:
        small = ImageFont.load_default(size=15)
        pen.text((left, 7), title, font=small, fill=FAINT)
        if images is not real:
            for i, name in enumerate(names):
                pen.text((left + i * (cell + GAP), HEAD), _fitted(pen, name, small, cell), font=small, fill=INK)
            if tops is not None:
                _paste(sheet, tops, n, cell, (left, tops_at))
        _paste(sheet, images, n, cell, (left, top))
        left += n * (cell + GAP) + BLOCK_GAP
    return sheet


def translation_grid(title: str, columns: Sequence[tuple[str, Tensor]]) -> Image.Image:
    """Pictures (rows) and what was made of them (columns), each column under its name; the first stands apart.

    columns: names and pictures (R, 3, S, S) in [-1, 1], as many rows in each.
    """
    rows = len(columns[0][1])
    cell = _cell(int(columns[0][1].shape[-1]))
    title_font, head_font = ImageFont.load_default(size=17), ImageFont.load_default(size=13)
    top = 30 + HEAD_LINES * 16
    width = BLOCK_GAP * 3 + len(columns) * (cell + GAP)
    sheet = Image.new("RGB", (width, top + rows * (cell + GAP) + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((BLOCK_GAP, 5), title, font=title_font, fill=INK)
    left = BLOCK_GAP
    for i, (name, images) in enumerate(columns):
        if len(images) != rows:
            raise ValueError(f"translation_grid: {len(images)} pictures of '{name}'; the first column has {rows}")
        lines = _wrapped(pen, name.replace("_", " "), head_font, cell)[:HEAD_LINES]
        for number, line in enumerate(lines):
            at = (left, top - 4 - 16 * (len(lines) - number))
            pen.text(at, _fitted(pen, line, head_font, cell), font=head_font, fill=FAINT)
        for row in range(rows):
            sheet.paste(_enlarged(to_picture(images[row]), cell), (left, top + row * (cell + GAP)))
        left += cell + GAP + (BLOCK_GAP if i == 0 else 0)
    return sheet


def attention_figure(image: Tensor, words: Sequence[str], maps: Sequence[Tensor]) -> Image.Image:
    """Every word beside its map laid over the picture, one band for each attention stage (AttnGAN, figures 4 and 5).

    image: (3, S, S) in [-1, 1]. maps: for each stage (T, h, w), T at least the number of words: the weight of each
    word at each place, which sum to 1 over the words. A map's brightness is relative to its own peak; the peak is
    printed beside the word, so that a word that draws no attention is known from one that does.
    """
    short = next((m for m in maps if len(m) < len(words)), None)
    if short is not None:
        raise ValueError(f"attention_figure: {len(short)} maps for {len(words)} words")
    cell = _cell(int(image.shape[-1]))
    picture = _enlarged(to_picture(image), cell)
    word_font, note_font = ImageFont.load_default(size=17), ImageFont.load_default(size=14)
    lines = max(1, -(-len(words) // WORDS_A_ROW))
    across = -(-max(len(words), 1) // lines)
    line, head = cell + 46, 28
    width = BLOCK_GAP + cell + BLOCK_GAP * 2 + across * (cell + GAP * 2) + BLOCK_GAP
    sheet = Image.new("RGB", (width, GAP * 2 + max(1, len(maps)) * (head + lines * line)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for stage, stage_maps in enumerate(maps):
        top = GAP + stage * (head + lines * line)
        title = f"attention stage {stage + 1}, {int(stage_maps.shape[-2])} x {int(stage_maps.shape[-1])}"
        pen.text((BLOCK_GAP, top + 5), title, font=note_font, fill=FAINT)
        sheet.paste(picture, (BLOCK_GAP, top + head))
        for i, word in enumerate(words):
            x = BLOCK_GAP * 3 + cell + (i % across) * (cell + GAP * 2)
            y = top + head + (i // across) * line
            weights = stage_maps[i].detach().float().cpu().numpy()
            sheet.paste(_overlay(picture, weights), (x, y))
            pen.text((x + 1, y + cell + 2), _fitted(pen, word, word_font, cell), font=word_font, fill=INK)
            pen.text((x + 1, y + cell + 22), f"peak {weights.max():.2f}", font=note_font, fill=FAINT)
    return sheet


def stacked(figures: Sequence[Image.Image]) -> Image.Image:
    """The figures below each other on one sheet."""
    sheet = Image.new("RGB", (max(f.width for f in figures), sum(f.height for f in figures)), PAPER)
    top = 0
    for figure in figures:
        sheet.paste(figure, (0, top))
        top += figure.height
    return sheet


def _cell(size: int) -> int:
    """The shown size of pictures of `size` pixels: a whole multiple, large enough to see."""
    return size * -(-SMALLEST_CELL // size)


def _paste(sheet: Image.Image, images: Tensor, columns: int, cell: int, corner: tuple[int, int]) -> None:
    """Pictures (N, 3, S, S) in so many columns from this corner on."""
    for i, image in enumerate(images):
        place = (corner[0] + (i % columns) * (cell + GAP), corner[1] + (i // columns) * (cell + GAP))
        sheet.paste(_enlarged(to_picture(image), cell), place)


def _enlarged(picture: Image.Image, cell: int) -> Image.Image:
    if picture.size == (cell, cell):
        return picture
    return picture.resize((cell, cell), Image.Resampling.NEAREST)


def _overlay(picture: Image.Image, weights: np.ndarray) -> Image.Image:
    """The map in heat colours over the darkened picture."""
    peak = float(weights.max())
    strength = Image.fromarray((weights / peak if peak > 0 else weights).astype(np.float32), mode="F")
    s = np.clip(np.asarray(strength.resize(picture.size, Image.Resampling.BICUBIC)), 0, 1)[..., None]
    position = s[..., 0] * (len(_HEAT) - 1)
    heat = np.stack([np.interp(position, range(len(_HEAT)), _HEAT[:, c]) for c in range(3)], -1)
    base = np.asarray(picture, dtype=np.float32)
    dim = base.mean(-1, keepdims=True) * 0.35 + 12
    lit = 0.5 * base + 0.5 * heat
    return Image.fromarray((dim * (1 - s) + lit * s).clip(0, 255).astype(np.uint8))


def _fitted(pen: ImageDraw.ImageDraw, word: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if pen.textlength(word, font=font) <= width:
        return word
    while word and pen.textlength(word + "..", font=font) > width:
        word = word[:-1]
    return word + ".."


def _caption(
    pen: ImageDraw.ImageDraw,
    caption: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    corner: tuple[int, int],
    box: tuple[int, int],
) -> None:
    """The caption wrapped into its box, centred in height; what does not fit ends in dots."""
    lines = _wrapped(pen, caption, font, box[0])
    room = max(1, box[1] // 20)
    if len(lines) > room:
        lines = [*lines[: room - 1], lines[room - 1] + " .."]
    y = corner[1] + max(0, (box[1] - 20 * len(lines)) // 2)
    for i, text in enumerate(lines):
        pen.text((corner[0], y + 20 * i), _fitted(pen, text, font, box[0]), font=font, fill=INK)


def _wrapped(
    pen: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[str]:
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and pen.textlength(longer, font=font) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    return [*lines, line]
