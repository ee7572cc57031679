"""The template environment of the report page, which embeds images so that the page needs no other file."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from t2idist import storage
from t2idist.report.charts import format_short


@functools.cache
def template_environment() -> jinja2.Environment:
    """Build the environment of templates/*.html.j2. Values are escaped; undefined names are errors."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("t2idist.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.filters.update(
        number=format_number,
        thousands="{:,}".format,
        short=format_short,
        percent="{:.1%}".format,
        redact=storage.redact,
    )
    environment.globals.update(
        asset=_read_asset,
        embed_image=embed_image,
        embed_thumbnail=embed_thumbnail,
        evenly_spaced=evenly_spaced,
        is_share=is_share,
        join_url=storage.join,
    )
    environment.globals["macros"] = environment.get_template("macros.html.j2").module
    return environment


def _read_asset(name: str) -> Markup:
    return Markup(resources.files("t2idist.report").joinpath(name).read_text("utf-8"))


def embed_image(url: str, max_width: int, quality: int) -> tuple[int, int, str]:
    """Read a PNG file and encode it as WebP, at most `max_width` wide. Returns its width, height and data URI."""
    image = _open_png(url)
    if image.width > max_width:
        image = image.resize((max_width, round(image.height * max_width / image.width)), Image.Resampling.LANCZOS)
    return image.width, image.height, _data_uri(image, quality)


def embed_thumbnail(url: str) -> str:
    """Return the right end of a grid, its largest scale, as a data URI."""
    image = _open_png(url)
    side = min(image.height - 30, image.width // 4)
    thumbnail = image.crop((image.width - side - 14, 30, image.width - 14, 30 + side))
    return _data_uri(thumbnail.resize((184, 184), Image.Resampling.LANCZOS), 70)


def _open_png(url: str) -> Image.Image:
    with Image.open(io.BytesIO(storage.read_bytes(url)), formats=("PNG",)) as image:
        return image.convert("RGB")


def _data_uri(image: Image.Image, quality: int) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=quality, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def evenly_spaced(items: Sequence[Any], count: int) -> list[Any]:
    """Return at most `count` items, evenly spaced, with the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def is_share(row: Mapping[str, Any]) -> bool:
    """Return whether a score, its chance level and its value for real images lie between 0 and 1."""
    value, chance, real = (row.get(key) for key in ("value", "chance", "real"))
    known = [v for v in (value, chance, real) if isinstance(v, (int, float))]
    return isinstance(value, (int, float)) and chance is not None and all(0 <= v <= 1 for v in known)


def format_number(value: Any) -> str:
    """Format a score or a count; None becomes an empty string."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if 0 < abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"
