"""Figures: grids of captions by noise, grids of translated images, and attention maps by word."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from t2idist import storage
from t2idist.data.single_image import image_of_file
from t2idist.nn.images import to_uint8
from t2idist.observability.command import describe_error

BACKGROUND = (255, 255, 255)
TEXT_COLOUR = (28, 30, 36)
MUTED_COLOUR = (120, 124, 134)
GAP = 4
BLOCK_GAP = 14
HEADER_HEIGHT = 30
NAMES_HEIGHT = 22
MIN_CELL_SIZE = 96
CAPTION_WIDTH = 250
WORDS_PER_ROW = 9
HEADER_LINES = 3

_HEAT_COLOURS = np.array(
    [(18, 10, 60), (120, 28, 109), (229, 80, 57), (252, 165, 10), (252, 255, 164)], dtype=np.float32
)


def to_pil(image: Tensor) -> Image.Image:
    """Convert an image (3, H, W) in [-1, 1] to PIL."""
    pixels = to_uint8(image.detach().float().cpu())
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def read_image(url: str, size: int, *, as_outlines: bool = False) -> Tensor:
    """Read the central square of an image file, as the sharding tools see it: (3, size, size) in [-1, 1].

    as_outlines: draw its outlines, as `data.outlines` does. Raises ValueError, naming the file, if it cannot be read.
    """
    try:
        data = storage.read_bytes(url)
    except OSError as error:
        raise ValueError(describe_error(error)) from None
    return image_of_file(data, size, storage.redact(url), as_outlines=as_outlines)


def png_bytes(image: Image.Image) -> bytes:
    """Encode an image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=False)
    return buffer.getvalue()


def grid(
    scales: Sequence[Tensor],
    captions: Sequence[str],
    columns: int,
    real: Tensor | None = None,
    *,
    column_names: Sequence[str] = (),
    style_images: Tensor | None = None,
) -> Image.Image:
    """Draw a grid of captions (rows) by noise (columns), one block of columns per scale, the largest scale last.

    All scales are shown at the same size: small images are enlarged without smoothing.

    Args:
        scales: lowest size first, each (R * columns, 3, S, S) in [-1, 1] in row-major order.
        captions: R captions, one per row.
        columns: images per row and scale.
        real: (R, 3, S, S), a real image of each caption, shown in a block of its own on the left.
        column_names: short headings of the columns, or none.
        style_images: (columns, 3, S, S), shown above the columns that have their style.
    """
    rows = len(captions)
    for images in scales:
        if len(images) != rows * columns:
            raise ValueError(f"grid: {len(images)} images; {rows} captions in {columns} columns need {rows * columns}")
    if real is not None and len(real) != rows:
        raise ValueError(f"grid: {len(real)} real images for {rows} captions")
    cell = _cell_size(max(int(images.shape[-1]) for images in scales))
    blocks = [] if real is None else [("real", real, 1)]
    blocks += [(f"{int(images.shape[-1])} px", images, columns) for images in scales]
    font = ImageFont.load_default(size=17)
    style_top = HEADER_HEIGHT + (NAMES_HEIGHT if column_names else 0)
    top = style_top + (0 if style_images is None else cell + BLOCK_GAP)
    width = CAPTION_WIDTH + sum(n * (cell + GAP) + BLOCK_GAP for _, _, n in blocks) + BLOCK_GAP
    sheet = Image.new("RGB", (width, top + rows * (cell + GAP) + GAP), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for row, caption in enumerate(captions):
        _draw_caption(pen, caption, font, (12, top + row * (cell + GAP)), (CAPTION_WIDTH - 24, cell))
    if style_images is not None:
        _draw_caption(pen, "in the style of", font, (12, style_top), (CAPTION_WIDTH - 24, cell))
    left = CAPTION_WIDTH
    for title, images, n in blocks:
        small_font = ImageFont.load_default(size=15)
        pen.text((left, 7), title, font=small_font, fill=MUTED_COLOUR)
        if images is not real:
            for i, name in enumerate(column_names):
                pen.text(
                    (left + i * (cell + GAP), HEADER_HEIGHT),
                    _truncate_to_width(pen, name, small_font, cell),
                    font=small_font,
                    fill=TEXT_COLOUR,
                )
            if style_images is not None:
                _paste(sheet, style_images, n, cell, (left, style_top))
        _paste(sheet, images, n, cell, (left, top))
        left += n * (cell + GAP) + BLOCK_GAP
    return sheet


def translation_grid(title: str, columns: Sequence[tuple[str, Tensor]]) -> Image.Image:
    """Draw a grid of images (rows) by translations (columns); the first column is set apart.

    Args:
        title: heading of the grid.
        columns: name and images (R, 3, S, S) in [-1, 1] of each column, all with the same number of rows.
    """
    rows = len(columns[0][1])
    cell = _cell_size(int(columns[0][1].shape[-1]))
    title_font, header_font = ImageFont.load_default(size=17), ImageFont.load_default(size=13)
    top = 30 + HEADER_LINES * 16
    width = BLOCK_GAP * 3 + len(columns) * (cell + GAP)
    sheet = Image.new("RGB", (width, top + rows * (cell + GAP) + GAP), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    pen.text((BLOCK_GAP, 5), title, font=title_font, fill=TEXT_COLOUR)
    left = BLOCK_GAP
    for i, (name, images) in enumerate(columns):
        if len(images) != rows:
            raise ValueError(f"translation_grid: {len(images)} images in '{name}'; the first column has {rows}")
        lines = _wrap_words(pen, name.replace("_", " "), header_font, cell)[:HEADER_LINES]
        for line_index, line in enumerate(lines):
            corner = (left, top - 4 - 16 * (len(lines) - line_index))
            pen.text(corner, _truncate_to_width(pen, line, header_font, cell), font=header_font, fill=MUTED_COLOUR)
        for row in range(rows):
            sheet.paste(_enlarge(to_pil(images[row]), cell), (left, top + row * (cell + GAP)))
        left += cell + GAP + (BLOCK_GAP if i == 0 else 0)
    return sheet


def attention_figure(image: Tensor, words: Sequence[str], maps: Sequence[Tensor]) -> Image.Image:
    """Draw the attention map of every word over the image, one band per attention stage (AttnGAN, figures 4 and 5).

    The brightness of a map is relative to its own peak. The peak is printed under the word, which distinguishes a word
    without attention from one with.

    Args:
        image: (3, S, S) in [-1, 1].
        words: words of the caption.
        maps: (T, h, w) per stage, T at least the number of words; weights that sum to 1 over the words.
    """
    short = next((m for m in maps if len(m) < len(words)), None)
    if short is not None:
        raise ValueError(f"attention_figure: {len(short)} maps for {len(words)} words")
    cell = _cell_size(int(image.shape[-1]))
    enlarged = _enlarge(to_pil(image), cell)
    word_font, note_font = ImageFont.load_default(size=17), ImageFont.load_default(size=14)
    lines = max(1, -(-len(words) // WORDS_PER_ROW))
    per_line = -(-max(len(words), 1) // lines)
    line_height, header = cell + 46, 28
    width = BLOCK_GAP + cell + BLOCK_GAP * 2 + per_line * (cell + GAP * 2) + BLOCK_GAP
    sheet = Image.new("RGB", (width, GAP * 2 + max(1, len(maps)) * (header + lines * line_height)), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for stage, stage_maps in enumerate(maps):
        top = GAP + stage * (header + lines * line_height)
        title = f"attention stage {stage + 1}, {int(stage_maps.shape[-2])} x {int(stage_maps.shape[-1])}"
        pen.text((BLOCK_GAP, top + 5), title, font=note_font, fill=MUTED_COLOUR)
        sheet.paste(enlarged, (BLOCK_GAP, top + header))
        for i, word in enumerate(words):
            x = BLOCK_GAP * 3 + cell + (i % per_line) * (cell + GAP * 2)
            y = top + header + (i // per_line) * line_height
            weights = stage_maps[i].detach().float().cpu().numpy()
            sheet.paste(_overlay(enlarged, weights), (x, y))
            pen.text(
                (x + 1, y + cell + 2), _truncate_to_width(pen, word, word_font, cell), font=word_font, fill=TEXT_COLOUR
            )
            pen.text((x + 1, y + cell + 22), f"peak {weights.max():.2f}", font=note_font, fill=MUTED_COLOUR)
    return sheet


def tiles(images: Sequence[Image.Image], width: int) -> Image.Image:
    """Lay out images of any size in rows, from left to right, on a sheet of about this width."""
    cell_width = max(_cell_size(image.width) for image in images)
    cell_height = max(image.height * _cell_size(image.width) // image.width for image in images)
    columns = max(1, min(len(images), width // (cell_width + GAP)))
    rows = -(-len(images) // columns)
    size = (columns * (cell_width + GAP) + GAP, rows * (cell_height + GAP) + GAP)
    sheet = Image.new("RGB", size, BACKGROUND)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        shown = (_cell_size(image.width), image.height * _cell_size(image.width) // image.width)
        corner = (GAP + column * (cell_width + GAP), GAP + row * (cell_height + GAP))
        sheet.paste(image.resize(shown, Image.Resampling.NEAREST), corner)
    return sheet


def stack_figures(figures: Sequence[Image.Image]) -> Image.Image:
    """Stack figures vertically on one sheet."""
    sheet = Image.new("RGB", (max(f.width for f in figures), sum(f.height for f in figures)), BACKGROUND)
    top = 0
    for figure in figures:
        sheet.paste(figure, (0, top))
        top += figure.height
    return sheet


def _cell_size(size: int) -> int:
    """Return the displayed size of images of `size` pixels: an integer multiple, at least MIN_CELL_SIZE."""
    return size * -(-MIN_CELL_SIZE // size)


def _paste(sheet: Image.Image, images: Tensor, columns: int, cell: int, corner: tuple[int, int]) -> None:
    """Paste images (N, 3, S, S) in rows of `columns`, starting at the corner."""
    for i, image in enumerate(images):
        position = (corner[0] + (i % columns) * (cell + GAP), corner[1] + (i // columns) * (cell + GAP))
        sheet.paste(_enlarge(to_pil(image), cell), position)


def _enlarge(image: Image.Image, cell: int) -> Image.Image:
    if image.size == (cell, cell):
        return image
    return image.resize((cell, cell), Image.Resampling.NEAREST)


def _overlay(image: Image.Image, weights: np.ndarray) -> Image.Image:
    """Blend an attention map in heat colours over the darkened image."""
    peak = float(weights.max())
    strength = Image.fromarray((weights / peak if peak > 0 else weights).astype(np.float32), mode="F")
    s = np.clip(np.asarray(strength.resize(image.size, Image.Resampling.BICUBIC)), 0, 1)[..., None]
    position = s[..., 0] * (len(_HEAT_COLOURS) - 1)
    heat = np.stack([np.interp(position, range(len(_HEAT_COLOURS)), _HEAT_COLOURS[:, c]) for c in range(3)], -1)
    base = np.asarray(image, dtype=np.float32)
    dim = base.mean(-1, keepdims=True) * 0.35 + 12
    lit = 0.5 * base + 0.5 * heat
    return Image.fromarray((dim * (1 - s) + lit * s).clip(0, 255).astype(np.uint8))


def _truncate_to_width(
    pen: ImageDraw.ImageDraw, word: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> str:
    if pen.textlength(word, font=font) <= width:
        return word
    while word and pen.textlength(word + "..", font=font) > width:
        word = word[:-1]
    return word + ".."


def _draw_caption(
    pen: ImageDraw.ImageDraw,
    caption: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    corner: tuple[int, int],
    box: tuple[int, int],
) -> None:
    """Draw a caption wrapped into a box and centred vertically; text that does not fit is cut with dots."""
    lines = _wrap_words(pen, caption, font, box[0])
    max_lines = max(1, box[1] // 20)
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], lines[max_lines - 1] + " .."]
    y = corner[1] + max(0, (box[1] - 20 * len(lines)) // 2)
    for i, text in enumerate(lines):
        pen.text((corner[0], y + 20 * i), _truncate_to_width(pen, text, font, box[0]), font=font, fill=TEXT_COLOUR)


def _wrap_words(
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
