"""Images, annotation files and shard sets for the tests of readers."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from t2idist.data.shards import Dataset
from t2idist.ingest.listing import Listing
from t2idist.ingest.writer import IngestOptions, write_set


def encode(image: Image.Image, image_format: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, image_format, **options)
    return out.getvalue()


def make_image(width: int = 60, height: int = 40, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Return an image with smooth colours that depend on the seed."""
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def save_image(path: Path, seed: int = 0, size: tuple[int, int] = (60, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(make_image(*size, seed=seed)))


def write_jsonl(path: Path, rows: list[object]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def make_set(listing: Listing, out: Path, **options: object) -> Dataset:
    """Write the listed images as a shard set, and open it."""
    settings: dict = {"min_count": 1, **options}
    write_set(listing, str(out), IngestOptions(**settings), source="test", licence="none", processes=1)
    return Dataset.open(str(out))


def read_rejects(out: Path) -> list[tuple[str, str, str]]:
    """Return name, reason and effect of each line of rejected.jsonl."""
    rows = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    return [(row["name"], row["reason"], row["effect"]) for row in rows]
