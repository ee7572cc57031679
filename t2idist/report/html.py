"""Parts of a page that needs no other file: pictures, numbers and bars as HTML."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from typing import Any

from PIL import Image

from t2idist import storage

WIDEST_SMALL = 1200
WIDEST_LARGE = 2200


def image(url: str, alternative: str, widest: int, quality: int, attributes: str = "") -> str:
    """A PNG file as part of the page."""
    picture = open_png(url)
    if picture.width > widest:
        picture = picture.resize((widest, round(picture.height * widest / picture.width)), Image.Resampling.LANCZOS)
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img class="picture" {size} alt="{escape(alternative)}" src="{data_uri(picture, quality)}"{attributes}>'


def open_png(url: str) -> Image.Image:
    with Image.open(io.BytesIO(storage.read_bytes(url)), formats=("PNG",)) as picture:
        return picture.convert("RGB")


def data_uri(picture: Image.Image, quality: int) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=quality, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def scale(row: Mapping[str, Any]) -> str:
    """A bar from 0 to 1 with marks for chance and real, where the score is a share."""
    value, chance, real = (row.get(key) for key in ("value", "chance", "real"))
    known = [v for v in (value, chance, real) if isinstance(v, (int, float))]
    if not isinstance(value, (int, float)) or chance is None or any(not 0 <= v <= 1 for v in known):
        return ""
    marks = f'<i style="width:{value:.1%}"></i>'
    if isinstance(chance, (int, float)):
        marks += f'<b class="chance" style="left:{chance:.1%}"></b>'
    if isinstance(real, (int, float)):
        marks += f'<b style="left:calc({real:.1%} - 2px)"></b>'
    return f'<div class="scale">{marks}</div>'


def number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "" if value is None else escape(str(value))
    if isinstance(value, int):
        return f"{value:,}"
    if 0 < abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"
