"""Images that a command draws, each with the settings that it was drawn with, and the folder that they go to.

The settings are a text of the PNG. An image is replaced only by one of the same settings, which is the same image.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from t2idist import storage
from t2idist.engine.checkpoint import export
from t2idist.storage.outputs import check_not_input

TEXT_KEY = "t2idist"

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class PlannedImages:
    """Images that a command is about to write."""

    prefix: str
    """What their file names begin with; with its extension, the name of one image."""
    settings: Settings


def sample_settings(
    export_hash: str,
    *,
    seed: int,
    columns: int,
    scale: str = "largest",
    attention: bool = False,
    precision: str = "float32",
    steps: int | None = None,
    interpolate_text: Sequence[str] | None = None,
    interpolate_noise: bool = False,
    truncation: float | None = None,
    style_of_sha256: Sequence[str] = (),
    encoder: str | None = None,
) -> dict[str, Any]:
    """Return what images of ``t2idist sample`` depend on, besides their sentence; the arguments are its options.

    Args:
        export_hash: `export_sha256`.
        columns: images of a row.
        style_of_sha256: hashes of the images of --style-of.
    """
    return {
        "command": "sample",
        "export_sha256": export_hash,
        "seed": seed,
        "scale": scale,
        "attention": attention,
        "precision": precision,
        "steps": steps,
        "interpolate_text": interpolate_text,
        "interpolate_noise": interpolate_noise,
        "truncation": truncation,
        "columns": columns,
        "style_of_sha256": style_of_sha256,
        "encoder": None if encoder is None else storage.redact(encoder),
    }


def png_with_settings(image: Image.Image, settings: Settings) -> bytes:
    """Encode an image as PNG that holds its settings."""
    info = PngInfo()
    info.add_text(TEXT_KEY, json.dumps(settings, sort_keys=True))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=False, pnginfo=info)
    return buffer.getvalue()


def read_settings(url: str) -> dict[str, Any] | None:
    """Return the settings that an image was drawn with; None if it is not an image of these commands."""
    try:
        with Image.open(io.BytesIO(storage.read_bytes(url)), formats=["PNG"]) as image:
            settings = json.loads(image.info[TEXT_KEY])
    except (OSError, ValueError, KeyError, SyntaxError, Image.DecompressionBombError):
        return None
    return settings if isinstance(settings, dict) else None


def export_sha256(url: str) -> str:
    """Return the hash of an export's index, which holds those of its networks. Raises ValueError if there is none."""
    export.read_index(url)
    return storage.sha256(storage.read_bytes(storage.join(url, export.INDEX)))


def choose_folder(given: str | None, default: str, planned: Sequence[PlannedImages], inputs: Sequence[str]) -> str:
    """Return the folder for the planned images.

    Args:
        given: value of --out; None: the first of `default`, `default`-2, ... in which nothing is lost.
        default: folder if --out is not given.
        planned: what will be written.
        inputs: URLs that the command reads.

    Raises:
        ValueError: the given folder has an input, or an image of other settings, of the name of a planned image.
    """
    if given is not None:
        check_folder(given, planned, inputs)
        return given
    for number in itertools.count(1):
        folder = default if number == 1 else f"{default}-{number}"
        try:
            check_folder(folder, planned, inputs)
        except ValueError:
            continue
        return folder
    raise AssertionError


def check_folder(folder: str, planned: Iterable[PlannedImages], inputs: Sequence[str]) -> None:
    """Check that nothing is lost if the planned images are written to a folder; raises as `choose_folder` does."""
    listed = storage.list_dir(folder)  # without hidden files
    for images in planned:
        if images.prefix.endswith(".png"):
            names = [images.prefix]
        else:
            names = [name for name in listed if name.startswith(images.prefix) and name.endswith(".png")]
        for name in names:
            _check_image(storage.join(folder, name), images.settings, inputs)


def _check_image(url: str, settings: Settings, inputs: Sequence[str]) -> None:
    check_not_input(url, inputs, "--out")
    if not storage.exists(url):
        return
    before, ours = read_settings(url), json.loads(json.dumps(settings))
    if before == ours:
        return
    reason = "is not an image of this command"
    if before is not None:
        keys = [key for key in dict.fromkeys((*ours, *before)) if before.get(key) != ours.get(key)]
        different = "; ".join(f"{key}: {ours.get(key)} here, {before.get(key)} there" for key in keys)
        reason = f"was drawn with other settings ({different})"
    raise ValueError(f"{storage.redact(url)}: {reason} and would be lost; give another --out")
